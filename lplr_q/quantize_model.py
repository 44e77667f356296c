"""Compress every linear layer of a decoder, one sublayer at a time.

Each sublayer is one unit of work: its result depends only on its weight, its Hessian, the settings
and a named random stream, so units can be done in any order, kept, and skipped when they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q.activation_aware.decompose import (
    Decomposition,
    PreparedHessian,
    decompose,
    prepare_hessian,
)
from lplr_q.activation_aware.hessian import Calibration
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, pack_decomposition
from lplr_q.bits import rank_for_budget
from workbench.errors import ConfigError, DataError


@dataclass(frozen=True)
class CompressionSettings:
    """How each matrix is compressed."""

    bits: float = 2.5
    """Total budget in bits per weight, overheads included."""
    codebook: str = "e8p"
    """Codebook of Q."""
    q_bits: int | None = None
    """Bits of Q; None takes the widest that fits."""
    try_widths: int = 1
    """With q_bits None: how many widths to try, widest first; the smallest error wins."""
    factor_bits: int = 4
    """Bits per entry of L and R."""
    rounds: int = 3
    inner_iterations: int = 5
    sweeps: int = 2
    init: str = "lr_first"
    rht: bool = True
    sigma_reg: float = 1e-2


def candidates(m: int, n: int, settings: CompressionSettings) -> list[tuple[int, int]]:
    """(q_bits, rank) pairs that fill the budget, the widest Q first.

    Raises:
        ConfigError: not even the narrowest Q fits.
    """
    widths = [settings.q_bits] if settings.q_bits is not None else [4, 3, 2]
    found = []
    for q_bits in widths:
        rank = rank_for_budget(
            m,
            n,
            settings.bits,
            codebook=settings.codebook,
            q_bits=q_bits,
            factor_bits=settings.factor_bits,
            rotated=settings.rht,
        )
        if rank >= 0 and (q_bits or rank):
            found.append((q_bits, rank))
    if not found:
        raise ConfigError(
            f"{settings.bits:.3f} bits per weight do not hold a {m}x{n} matrix with "
            f"q_bits={settings.q_bits or 2}: raise --bits or --overhead"
        )
    return found[: max(1, settings.try_widths)]


def prepare_sublayer(
    calibration: Calibration,
    name: str,
    n: int,
    settings: CompressionSettings,
    generator_of: Callable[[str], torch.Generator],
) -> PreparedHessian:
    """Rotated and factored Hessian of the layer's input; the same for all layers that share it."""
    key = calibration.key_of.get(name)
    if key is None:
        raise DataError(f"no Hessian for {name}; collect Hessians with this layer included")
    moment = calibration.moments[key]
    try:
        return prepare_hessian(
            moment.matrix(),
            n,
            generator=generator_of(f"signs/in/{key}") if settings.rht else None,
            sigma=settings.sigma_reg,
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def compress_sublayer(
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    name: str,
    settings: CompressionSettings,
    generator_of: Callable[[str], torch.Generator],
) -> Decomposition:
    """The candidate (q_bits, rank) with the smallest activation-aware error."""

    def run(q_bits: int, rank: int, *, quick: bool) -> Decomposition:
        return decompose(
            weight,
            prepared,
            codebook=settings.codebook,
            q_bits=q_bits,
            rank=rank,
            factor_bits=settings.factor_bits,
            rounds=1 if quick else settings.rounds,
            inner_iterations=min(2, settings.inner_iterations)
            if quick
            else settings.inner_iterations,
            sweeps=0 if quick else settings.sweeps,
            init=settings.init,
            generator=generator_of(f"signs/out/{name}") if settings.rht else None,
        )

    pairs = candidates(*weight.shape, settings)
    try:
        if len(pairs) > 1:  # one plain round tells them apart
            errors = [run(*pair, quick=True).error for pair in pairs]
            pairs = [pairs[errors.index(min(errors))]]
        return run(*pairs[0], quick=False)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def result_tree(result: Decomposition) -> dict[str, Any]:
    """What a finished unit stores: packed buffers, the layer's form and the measured figures."""
    layer = LPLRQuantizedLinear.from_decomposition(result)
    assert result.bits is not None
    return {
        "buffers": pack_decomposition(result),
        "settings": layer.settings(),
        "error": result.error,
        "frobenius": result.frobenius,
        "bits_per_weight": result.bits.per_weight,
        "history": result.history,
    }


def install(model: nn.Module, name: str, tree: dict[str, Any]) -> LPLRQuantizedLinear:
    """Put the compressed layer of a finished unit in the place of the linear layer; its bias is
    kept."""
    old = model.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise DataError(f"{name} is a {type(old).__name__}, not a linear layer")
    settings = {**tree["settings"], "bias": old.bias is not None}
    layer = LPLRQuantizedLinear.from_settings(settings, dtype=old.weight.dtype)
    state = dict(tree["buffers"])
    if old.bias is not None:
        state["bias"] = old.bias.detach()
    layer.load_state_dict(state)
    layer.to(old.weight.device)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
    return layer
