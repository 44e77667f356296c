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
        "Calibration": "lplr_q.hessian",
        "CompressionSettings": "lplr_q.quantize_model",
        "Decomposition": "lplr_q.decompose",
        "LPLRQuantizedLinear": "lplr_q.layer",
        "SecondMoment": "lplr_q.hessian",
        "SecondMomentAccumulator": "lplr_q.hessian",
        "collect_hessians": "lplr_q.hessian",
        "compress_sublayer": "lplr_q.quantize_model",
        "decompose": "lplr_q.decompose",
        "gptq": "lplr_q.baselines",
        "hadamard_transform": "lplr_q.hadamard",
        "layer_bits": "lplr_q.bits",
        "make_codebook": "lplr_q.codebooks.base",
        "prepare_hessian": "lplr_q.decompose",
        "prepare_sublayer": "lplr_q.quantize_model",
        "round_to_nearest": "lplr_q.baselines",
        "save_compressed": "lplr_q.hf",
        "set_mode": "lplr_q.layer",
        "storage_report": "lplr_q.hf",
    },
)

register_with_transformers()
