"""Bits per weight, counted in full: codes, scales, signs, padding to bytes.
[lplr_q README, "Bits"]

bits(W) = codes of Q + r (m + n) B_LR + 32 (scale of Q) + 2 * 16 r (scales of L and R) + m + n
(signs)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lplr_q.codebooks.base import make_codebook


@dataclass(frozen=True)
class LayerBits:
    """Bits of one compressed matrix, by what they are spent on; every part is a whole number of
    bytes."""

    weights: int
    """m n, the number of weights."""
    q_codes: int
    factors: int
    scales: int
    signs: int

    @property
    def total(self) -> int:
        """All bits."""
        return self.q_codes + self.factors + self.scales + self.signs

    @property
    def per_weight(self) -> float:
        """Bits per weight, overheads included."""
        return self.total / self.weights


def _bytes(bits: int) -> int:
    """Bits padded to whole bytes, in bits."""
    return 8 * math.ceil(bits / 8)


def layer_bits(
    m: int,
    n: int,
    *,
    codebook: str = "e8p",
    q_bits: int = 2,
    rank: int = 0,
    factor_bits: int = 4,
    rotated: bool = True,
) -> LayerBits:
    """Exact storage of an m x n matrix as Q + L R."""
    codes = 0
    if q_bits:
        book = make_codebook(codebook, q_bits)
        whole, tail = divmod(n, book.dim)
        codes = sum(_bytes(m * whole * bits) for bits in book.streams)
        codes += _bytes(m * tail * int(book.bits))
    factors = _bytes(rank * m * factor_bits) + _bytes(rank * n * factor_bits)
    per_component = 0 if factor_bits == 16 else 2 * 16 * rank
    scales = (32 if q_bits else 0) + per_component
    signs = _bytes(m) + _bytes(n) if rotated else 0
    return LayerBits(m * n, codes, factors, scales, signs)


def rank_for_budget(
    m: int,
    n: int,
    budget: float,
    *,
    codebook: str = "e8p",
    q_bits: int = 2,
    factor_bits: int = 4,
    rotated: bool = True,
) -> int:
    """Largest rank whose total bits per weight stay within ``budget``; -1 when Q alone exceeds
    it."""
    rank = -1
    for candidate in range(min(m, n) + 1):
        bits = layer_bits(
            m,
            n,
            codebook=codebook,
            q_bits=q_bits,
            rank=candidate,
            factor_bits=factor_bits,
            rotated=rotated,
        )
        if bits.per_weight > budget + 1e-9:
            break
        rank = candidate
    return rank


def group_bits(m: int, n: int, *, bits: int, group: int, symmetric: bool = False) -> float:
    """Bits per weight of group-wise rounding: codes, a 16-bit scale and a ``bits``-bit zero point
    per group."""
    groups = math.ceil(n / group)
    per_group = 16 + (0 if symmetric else bits)
    return (m * n * bits + m * groups * per_group) / (m * n)


def group_for_budget(n: int, budget: float, *, bits: int, symmetric: bool = False) -> int:
    """Smallest group size within ``budget`` bits per weight; n (one group per row) when none is."""
    per_group = 16 + (0 if symmetric else bits)
    groups = max(1, math.floor((budget - bits) * n / per_group + 1e-9))
    return math.ceil(n / groups)


def matched_budget(m: int, n: int, bits: float, overhead: float) -> float:
    """What group-wise rounding spends of ``bits + overhead`` on this matrix, and never more than
    that.

    Groups come in whole numbers, so rounding rarely spends all of it; a method held to this budget
    uses no more bits than the baseline beside it.
    """
    width = int(bits)
    group = group_for_budget(n, bits + overhead, bits=width)
    return min(bits + overhead, group_bits(m, n, bits=width, group=group))


def average(parts: Iterable[tuple[float, int]]) -> float:
    """Weighted mean of (bits per weight, weights)."""
    parts = list(parts)
    return sum(b * w for b, w in parts) / sum(w for _, w in parts)
