"""W = Q + L R in few bits: activation-aware low-rank plus quantised weight compression.

Importing this package is enough for plain ``AutoModelForCausalLM.from_pretrained`` to read
compressed folders.
"""

from lplr_q.registration import register_with_transformers
from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "CODEBOOKS": "lplr_q.codebooks.base",
        "Calibration": "lplr_q.activation_aware.hessian",
        "CompressionSettings": "lplr_q.quantize_model",
        "Decomposition": "lplr_q.activation_aware.decompose",
        "LPLRQuantizedLinear": "lplr_q.activation_aware.quantized_layer",
        "SecondMoment": "lplr_q.activation_aware.hessian",
        "SecondMomentAccumulator": "lplr_q.activation_aware.hessian",
        "collect_hessians": "lplr_q.activation_aware.hessian",
        "compress_sublayer": "lplr_q.quantize_model",
        "decompose": "lplr_q.activation_aware.decompose",
        "gptq": "lplr_q.baselines",
        "hadamard_transform": "lplr_q.linalg.hadamard",
        "layer_bits": "lplr_q.bits",
        "make_codebook": "lplr_q.codebooks.base",
        "prepare_hessian": "lplr_q.activation_aware.decompose",
        "prepare_sublayer": "lplr_q.quantize_model",
        "round_to_nearest": "lplr_q.baselines",
        "save_compressed": "lplr_q.hf",
        "set_mode": "lplr_q.activation_aware.quantized_layer",
        "storage_report": "lplr_q.hf",
    },
)

register_with_transformers()
