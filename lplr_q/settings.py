"""How each matrix of a model is compressed: method, budget, and the arguments of ``decompose``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lplr_q.bits import (
    FactorBits,
    group_bits,
    group_for_budget,
    one_or_two,
    rank_for_budget,
)
from lplr_q.linalg.hadamard import ROTATIONS
from workbench.errors import ConfigError, unknown_name

METHODS = ("lplr-ldlq", "quip-sharp", "lplr", "rtn", "gptq")
"""Q + L R; Q alone in one pass; L R alone; group-wise rounding without and with feedback."""


@dataclass(frozen=True)
class CompressionSettings:
    """How each matrix is compressed: the arguments of ``decompose``, a budget and a method."""

    bits: float | None = 2.5
    """Total budget in bits per weight, overheads included; None: q_bits and rank say it."""
    codebook: str = "e8p"
    """Codebook of Q."""
    q_bits: int | None = None
    """Bits of Q; None takes the widest that fits."""
    try_widths: int = 1
    """With q_bits None: how many widths to try, widest first; the smallest error wins."""
    factor_bits: FactorBits = 4
    """Bits per entry of L and R; two numbers: of L, of R."""
    rounds: int = 3
    inner_iterations: int = 5
    sweeps: int = 2
    init: str = "lr_first"
    rht: bool = True
    sigma_reg: float = 1e-2
    method: str = "lplr-ldlq"
    """One of METHODS."""
    rank: int | None = None
    """Components of L R; None takes what the budget leaves. Clipped to the sides of a matrix."""
    factor_codebook: str = "lloyd-max"
    """Codebook of L and R."""
    q_hessian: str = "plain"
    """What the Q step minimises: plain, downdate, projq or auto."""
    update_order: tuple[str, ...] = ("LR", "Q")
    """Components in the order of their updates."""
    feedback: bool = True
    """False rounds Q without looking at H."""
    activation_aware_lr: bool = True
    """False takes the plain SVD for L R."""
    randomised_svd: bool | str = "auto"
    scale_search: bool = False
    """Search the multiplier of Q's scale on the true loss."""
    scale_multiplier: float = 1.0
    compute_q: bool = True
    compute_lr: bool = True
    rotation: str = "had"
    """Where rht is on: had, kron or fft."""
    q_group: int = 0
    """Scales of Q: 0 one for the matrix, -1 one per row, else one per row and so many columns."""
    rescale: bool = False
    """Balance input channels before the rotation (rescale_WH)."""
    ft_rank: int = 0
    """Components of L R that stay trainable 16-bit parameters (bits on top of the budget)."""
    group: int | None = None
    """Columns per scale of rtn and gptq; None takes the smallest that fits the budget."""
    seed: int = 0
    """Seed of the signs; used by :func:`compress_model`."""

    def __post_init__(self) -> None:
        """Settings that cannot work together."""
        object.__setattr__(self, "factor_bits", one_or_two(self.factor_bits))
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.rotation not in ROTATIONS:
            raise unknown_name("rotation", self.rotation, ROTATIONS)
        if self.q_group and self.method == "quip-sharp":
            raise ConfigError(
                f"q_group={self.q_group}: quip-sharp has one scale per matrix; use method lplr-ldlq"
            )
        rounding = self.method in ("rtn", "gptq")
        if self.bits is None and (
            (self.q_bits is None and self.method != "lplr")
            or (self.rank is None and self.method in ("lplr", "lplr-ldlq"))
        ):
            raise ConfigError(
                f"bits=None with q_bits={self.q_bits}, rank={self.rank}: give a budget, or both"
            )
        if rounding and self.bits is None and self.group is None:
            raise ConfigError(f"method={self.method} without bits needs group, e.g. 128")

    def record(self) -> dict[str, Any]:
        """The fields, for a manifest; those that came later only where they are changed."""
        later = {"rotation": "had", "q_group": 0}
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in later or v != later[k]}


DECOMPOSE_FIELDS = (
    "codebook", "factor_bits", "factor_codebook", "rounds", "inner_iterations", "sweeps", "init",
    "q_hessian", "update_order", "feedback", "activation_aware_lr", "randomised_svd",
    "scale_search", "scale_multiplier", "compute_q", "compute_lr", "rescale", "q_group",
)  # fmt: skip
"""Settings that go to ``decompose`` under the same name."""


def candidates(m: int, n: int, settings: CompressionSettings) -> list[tuple[int, int]]:
    """(q_bits, rank) pairs that fill the budget, the widest Q first.

    Raises:
        ConfigError: not even the narrowest Q fits.
    """
    no_q = settings.method == "lplr" or not settings.compute_q
    no_lr = settings.method == "quip-sharp" or not settings.compute_lr
    widths = [0] if no_q else [settings.q_bits] if settings.q_bits is not None else [4, 3, 2]
    fixed = 0 if no_lr else None if settings.rank is None else min(settings.rank, m, n)
    found = []
    for q_bits in widths:
        assert q_bits is not None
        if settings.bits is None:
            rank = 0 if fixed is None else fixed
        else:
            rank = rank_for_budget(
                m,
                n,
                settings.bits,
                codebook=settings.codebook,
                q_bits=q_bits,
                factor_bits=settings.factor_bits,
                rotated=settings.rht,
                factor_codebook=settings.factor_codebook,
                rescaled=settings.rescale,
                q_group=settings.q_group,
            )
            if fixed is not None and (rank >= fixed or settings.q_bits is not None):
                rank = fixed
            elif fixed is not None:
                continue
        if rank >= 0 and (q_bits or rank):
            found.append((q_bits, rank))
    if not found:
        raise ConfigError(
            f"{settings.bits} bits per weight do not hold a {m}x{n} matrix with "
            f"q_bits={settings.q_bits or 2}: raise --bits or --overhead, or --target-bpw"
        )
    return found[: max(1, settings.try_widths)]


def rounding_grid(m: int, n: int, settings: CompressionSettings) -> tuple[int, int]:
    """(bits, group) of rtn and gptq: the widest codes whose scales and zero points fit too.

    Raises:
        ConfigError: not even one group per row fits beside 2-bit codes.
    """
    for bits in [settings.q_bits] if settings.q_bits is not None else [4, 3, 2]:
        budget = math.inf if settings.bits is None else settings.bits
        group = settings.group or group_for_budget(n, budget, bits=bits)
        group = min(group, n)
        if group_bits(m, n, bits=bits, group=group) <= budget + 1e-9:
            return bits, group
    raise ConfigError(
        f"{settings.bits} bits per weight do not hold a {m}x{n} matrix rounded to "
        f"{settings.q_bits or 2} bits with its scales: raise the budget"
    )


def settings_for(
    name: str, settings: CompressionSettings, allocation: Mapping[str, Any] | None
) -> CompressionSettings:
    """The settings of one sublayer: those of the allocation where it has an entry.

    Raises:
        ConfigError: the allocation lacks the sublayer, or has fields it should not have.
    """
    if allocation is None:
        return settings
    if settings.q_group:
        raise ConfigError(
            f"q_group={settings.q_group} with an allocation: its bits are counted with one scale "
            "per matrix; use q_group=0"
        )
    modules = allocation.get("modules")
    if not isinstance(modules, Mapping) or name not in modules:
        raise ConfigError(
            f"the allocation has no entry for {name}; make it for the same model and --include"
        )
    entry = dict(modules[name])
    surplus = set(entry) - {"codebook", "q_bits", "rank", "factor_bits"}
    if surplus or not {"q_bits", "rank"} <= set(entry):
        raise ConfigError(
            f"allocation of {name}: expected codebook, q_bits, rank, factor_bits; found "
            f"{', '.join(sorted(entry))}"
        )
    return dataclasses.replace(settings, bits=None, **entry)
