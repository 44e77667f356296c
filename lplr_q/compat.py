"""Names of the published packages, so that code written for them finds its way.
[github.com/pilancilab/caldera and its predecessor lplr_llm]

    from lplr_q.compat import ActivationAwareQuantParams, LPLRq, TransformerSubLayers

Each name is one of ours under its old name; no code of the published packages is in here.

=========================================== ===================================================
published                                   here
=========================================== ===================================================
TransformerSubLayers, DevSet                lplr_q.utils.enums: SubLayer, CalibSet
ActivationAwareQuantParams, CalderaParams   LPLRParams
QuIPArgs                                    QuipArgs
DataParameters, ModelParameters             the same
SubLayerInfo                                the same; its lplr_q is called decomposition
LPLRQInfo, CalderaDecomposition             Decomposition (codes; q_matrix(), dequantize(), error)
LPLRq(params, W, H, device), caldera(...)   the function below; H may be unregularised
ActivationAwareWeightCompressor             the same
ActivationAwareLayerQuant                   the same; made by get_layer_quantizer
LPLRQuantizedLinear, CalderaQuantizedLinear LPLRQuantizedLinear.from_decomposition
AbstractQuantizer, QuantizerFactory         lplr_q.utils.quantization: Quantizer, QuantizerFactory
=========================================== ===================================================

What differs on purpose: `update_order` may not be empty (it decomposed nothing); L and R have
Lloyd-Max codes by default; the second stage of a codebook has one scale, not an override; sweeps
after LDLQ are guarded, two by default instead of ten.
Gone, because nothing depends on them: `chunk_size`, `devices`, `hardcode_attn_mask`, `verbose`,
`AccumulatorArgs`, `QuantInfo`, `hadamard_transform_L`, `hadamard_transform_R`, `Haar_transform_L`;
`quip_sharp_initialization` is `init="q_first"`, `quant_factory_Q` and `quant_factory_LR` are
`codebook` and `factor_codebook`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from lplr_q.activation_aware.dataclasses import LPLRParams
    from lplr_q.activation_aware.decompose import Decomposition

_AWARE = "lplr_q.activation_aware"

RENAMED: dict[str, str] = {
    "TransformerSubLayers": "lplr_q.utils.enums:SubLayer",
    "DevSet": "lplr_q.utils.enums:CalibSet",
    "DataParameters": f"{_AWARE}.dataclasses:DataParameters",
    "ModelParameters": f"{_AWARE}.dataclasses:ModelParameters",
    "QuIPArgs": f"{_AWARE}.dataclasses:QuipArgs",
    "QuipArgs": f"{_AWARE}.dataclasses:QuipArgs",
    "ActivationAwareQuantParams": f"{_AWARE}.dataclasses:LPLRParams",
    "CalderaParams": f"{_AWARE}.dataclasses:LPLRParams",
    "SubLayerInfo": f"{_AWARE}.dataclasses:SubLayerInfo",
    "LPLRQInfo": f"{_AWARE}.decompose:Decomposition",
    "CalderaDecomposition": f"{_AWARE}.decompose:Decomposition",
    "ActivationAwareWeightCompressor": f"{_AWARE}.weight_compression:"
    "ActivationAwareWeightCompressor",
    "ActivationAwareLayerQuant": f"{_AWARE}.layer_quantization:ActivationAwareLayerQuant",
    "LPLRQuantizedLinear": f"{_AWARE}.quantized_layer:LPLRQuantizedLinear",
    "CalderaQuantizedLinear": f"{_AWARE}.quantized_layer:LPLRQuantizedLinear",
    "AbstractQuantizer": "lplr_q.utils.quantization:Quantizer",
    "QuantizerFactory": "lplr_q.utils.quantization:QuantizerFactory",
}
"""Published name -> where it is here."""


def __getattr__(name: str) -> Any:
    """The object that a published name stands for."""
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = RENAMED[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """All published names that are here."""
    return sorted({*RENAMED, "LPLRq", "caldera", *globals()})


def LPLRq(
    quant_params: LPLRParams,
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Decomposition:
    """W ~ Q + L R under the second moment ``H`` of the inputs (None: the identity).

    ``H`` is regularised here, by `quip_args.sigma_reg`; W and H stay as they are. ``seed`` is of
    the random signs, where there are any.
    """
    from lplr_q.activation_aware.decompose import prepare_hessian
    from lplr_q.activation_aware.layer_quantization import decompose_with
    from workbench.seeding import Streams

    streams = Streams(seed)
    prepared = prepare_hessian(
        None if H is None else H.to(device),
        W.shape[1],
        generator=streams.torch("signs/in") if quant_params.rotated else None,
        sigma=quant_params.quip_args.sigma_reg,
        rotation=quant_params.quip_args.incoh_mode,
    )
    return decompose_with(quant_params, W.to(device), prepared, streams.torch("signs/out"))


caldera = LPLRq
"""The successor's name of the same function."""
