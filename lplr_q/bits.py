"""Bits per weight, counted in full: codes, scales, signs, padding to bytes.
[lplr_q README, "Bits"]

    bits(W) = m n B_Q + (r - r_t) (m B_L + n B_R) + 16 r_t (m + n)  codes, trained components
              + 32 (or 16 per group) + 2 * 16 (r - r_t) + 16 n      scales: Q, L and R, inputs
              + m + n                                               signs (16 each when trained)

Columns beyond the last whole block of a codebook are scalar codes of B_Q bits; every stored tensor
is padded to whole bytes. What a layer stores is these numbers exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lplr_q.codebooks.base import Codebook, make_codebook
from workbench.errors import ConfigError

FactorBits = int | tuple[int, int]
"""Bits per entry of both factors, or of L and of R."""


def factor_pair(bits: FactorBits) -> tuple[int, int]:
    """(bits of L, bits of R).

    >>> factor_pair(4), factor_pair((3, 16))
    ((4, 4), (3, 16))

    Raises:
        ConfigError: neither one number nor two.
    """
    pair = (bits, bits) if isinstance(bits, int) else tuple(bits)
    if len(pair) != 2 or not all(isinstance(b, int) for b in pair):
        raise ConfigError(f"factor_bits={bits}: give one number, or two: of L and of R")
    return pair


def one_or_two(bits: FactorBits) -> FactorBits:
    """One number where both are equal, a list from a file as a tuple.

    >>> one_or_two((4, 4)), one_or_two([3, 16])
    (4, (3, 16))
    """
    left, right = factor_pair(bits)
    return left if left == right else (left, right)


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


def coded_bits(rows: int, width: int, book: Codebook) -> int:
    """Bits of the codes of a (rows, width) matrix: one tensor per run of equal streams, one for the
    columns that fill no block."""
    whole, tail = divmod(width, book.dim)
    runs = [(bits, len(list(run))) for bits, run in itertools.groupby(book.streams)]
    codes = sum(_bytes(rows * whole * bits * count) for bits, count in runs)
    return codes + _bytes(rows * tail * int(book.bits))


def scales_per_row(n: int, q_group: int) -> int:
    """How many scales of Q a row has of its own.

    >>> scales_per_row(40, 0), scales_per_row(40, -1), scales_per_row(40, 16)
    (0, 1, 3)
    """
    return math.ceil(n / q_group) if q_group > 0 else -q_group


def layer_bits(
    m: int,
    n: int,
    *,
    codebook: str = "e8p",
    q_bits: int = 2,
    rank: int = 0,
    factor_bits: FactorBits = 4,
    rotated: bool = True,
    factor_codebook: str = "lloyd-max",
    ft_rank: int = 0,
    rescaled: bool = False,
    float_signs: bool = False,
    q_group: int = 0,
) -> LayerBits:
    """Exact storage of an m x n matrix as Q + L R.

    Args:
        m: outputs.
        n: inputs.
        codebook: of Q; ``q_bits`` = 0 leaves Q out.
        q_bits: bits per entry of Q.
        rank: components of L R, those in 16 bits included.
        factor_bits: bits per entry of the coded components, one number or (of L, of R).
        rotated: signs of both sides are stored.
        factor_codebook: of L and R; scalar ones have a scale per component, others one per factor.
        ft_rank: components kept in 16 bits for training.
        rescaled: a 16-bit divisor per input is stored.
        float_signs: signs were trained and take 16 bits each.
        q_group: a 16-bit scale of Q per so many columns of each row (-1: per row) instead of one
            32-bit scale.
    """
    q_codes = coded_bits(m, n, make_codebook(codebook, q_bits)) if q_bits else 0
    coded = rank - ft_rank
    factors = 16 * ft_rank * (m + n)
    scales = 0
    if q_bits:
        scales += 16 * m * scales_per_row(n, q_group) if q_group else 32
    for length, bits in zip((m, n), factor_pair(factor_bits), strict=True):
        if coded and bits == 16:
            factors += 16 * coded * length
        elif coded:
            book = make_codebook(factor_codebook, bits)
            factors += coded_bits(coded, length, book)
            scales += 16 * (coded if book.dim == 1 else 1)
    if rescaled:
        scales += 16 * n
    signs = 0
    if rotated:
        signs = 16 * (m + n) if float_signs else _bytes(m) + _bytes(n)
    return LayerBits(m * n, q_codes, factors, scales, signs)


def rank_for_budget(m: int, n: int, budget: float, **settings: Any) -> int:
    """Largest rank whose total bits per weight stay within ``budget``; -1 when Q alone exceeds it.

    ``settings`` are those of :func:`layer_bits`. Bits grow with the rank, so bisection finds it.
    """

    def fits(rank: int) -> bool:
        return layer_bits(m, n, rank=rank, **settings).per_weight <= budget + 1e-9

    if not fits(low := int(settings.get("ft_rank", 0))):
        return -1
    high = min(m, n) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
