"""W = Q + L R in few bits: activation-aware low-rank plus quantised weight compression.

Importing this package is enough for plain ``AutoModelForCausalLM.from_pretrained`` to read
compressed folders.
"""

from lplr_q.registration import register_with_transformers
from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ActivationAwareLayerQuant": "lplr_q.activation_aware.layer_quantization",
        "ActivationAwareWeightCompressor": "lplr_q.activation_aware.weight_compression",
        "CODEBOOKS": "lplr_q.codebooks.base",
        "Calibration": "lplr_q.activation_aware.hessian",
        "CompressionSettings": "lplr_q.quantize_model",
        "DataParameters": "lplr_q.activation_aware.dataclasses",
        "Decomposition": "lplr_q.activation_aware.decompose",
        "LPLRParams": "lplr_q.activation_aware.dataclasses",
        "LPLRQuantizedLinear": "lplr_q.activation_aware.quantized_layer",
        "ModelParameters": "lplr_q.activation_aware.dataclasses",
        "QuipArgs": "lplr_q.activation_aware.dataclasses",
        "SecondMoment": "lplr_q.activation_aware.hessian",
        "SecondMomentAccumulator": "lplr_q.activation_aware.hessian",
        "SubLayerInfo": "lplr_q.activation_aware.dataclasses",
        "collect_hessians": "lplr_q.activation_aware.hessian",
        "compress_sublayer": "lplr_q.quantize_model",
        "decompose": "lplr_q.activation_aware.decompose",
        "export_adapter": "lplr_q.peft",
        "get_peft_model": "lplr_q.peft",
        "gptq": "lplr_q.baselines",
        "hadamard_transform": "lplr_q.linalg.hadamard",
        "import_adapter": "lplr_q.peft",
        "layer_bits": "lplr_q.bits",
        "load_adapter": "lplr_q.peft",
        "make_codebook": "lplr_q.codebooks.base",
        "merge_trained": "lplr_q.activation_aware.quantized_layer",
        "prepare_hessian": "lplr_q.activation_aware.decompose",
        "prepare_sublayer": "lplr_q.quantize_model",
        "release_components": "lplr_q.activation_aware.components",
        "round_to_nearest": "lplr_q.baselines",
        "save_compressed": "lplr_q.hf",
        "set_mode": "lplr_q.activation_aware.quantized_layer",
        "storage_report": "lplr_q.hf",
    },
)

register_with_transformers()
