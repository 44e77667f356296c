"""Hessians and compression in turns: each block is calibrated on what the compressed ones give it.

Optionally the weights make up for a share of the error that has come so far.   [QEP §3]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn

from lplr_q.activation_aware.hessian import (
    BlockMoments,
    corrected_weight,
    stream_blocks,
)
from lplr_q.hf import require_uncompressed
from lplr_q.manifest import MANIFEST, agree_on_manifest, digest_of, read_record, read_unit
from lplr_q.quantize_model import Group, Job, groups_of, install
from lplr_q.settings import CompressionSettings
from lplr_q.weights import ModuleWeights, TensorWeights, Weights

UNCORRECTED = (".down_proj", ".fc2", ".mlp.c_proj", ".dense_4h_to_h")
"""Last sublayers of the MLP: the correction there does harm.   [QEP §4]"""


def compress_in_turns(
    model: nn.Module,
    tokens: Int64[Tensor, "rows length"],
    settings: CompressionSettings,
    folder: Path | str,
    *,
    fingerprint: Mapping[str, Any],
    allocation: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
    alpha: float = 0.0,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Compress ``model`` block by block, **in place**; the record of each sublayer by name.

    ``alpha`` > 0 compresses W* = W + alpha W (C - H^) H^^-1 instead of W (not for the last layer of
    the MLP). Units that ``folder/work`` holds already are put in at once; errors are relative to
    the weights that were compressed. ``options`` go to :func:`stream_blocks`.

    Raises:
        ConfigError: the folder holds units of another origin; the model is compressed already.
    """
    require_uncompressed(model)
    folder = Path(folder)
    (folder / "work" / ".locks").mkdir(parents=True, exist_ok=True)
    agree_on_manifest(
        folder / MANIFEST,
        {
            "calibration": {**fingerprint, "inputs": "compressed", "error_propagation": alpha},
            "settings": settings.record(),
            "allocation": None if allocation is None else digest_of(allocation),
        },
        what="compressed sublayers",
    )
    wanted = None if names is None else set(names)
    job = Job(folder, settings, allocation)
    records: dict[str, dict[str, Any]] = {}
    stream = stream_blocks(
        model,
        tokens,
        inputs="compressed",
        cross=alpha > 0,
        **options,
    )
    for block in stream:
        known = [name for name in block.calibration.key_of if wanted is None or name in wanted]
        for group in groups_of(block.calibration, known):
            weights = _weights(model, block, group, alpha, settings.sigma_reg)
            job.compress(group, weights, block.calibration)
        done = (n for n in block.calibration.key_of if read_record(folder, n) is not None)
        for name in done:
            tree = read_unit(folder, name)
            install(model, name, tree)
            records[name] = {key: value for key, value in tree.items() if key != "buffers"}
    return records


def _weights(
    model: nn.Module, block: BlockMoments, group: Group, alpha: float, sigma: float
) -> Weights:
    """The matrices of a group, corrected where they should be."""
    cross = block.cross.get(group.key)
    if not alpha or cross is None:
        return ModuleWeights(model)
    moment = block.calibration.moments[group.key]
    plain = ModuleWeights(model)
    tensors = {}
    for name in group.names:
        share = 0.0 if name.endswith(UNCORRECTED) else alpha
        tensors[name] = corrected_weight(plain(name), moment, cross, alpha=share, sigma=sigma)
    return TensorWeights(tensors)
