"""How large a rank a budget allows, and every method at the same budget.
[arXiv 2310.11028 §4]

    r = floor( CR n d B_nq / (n B + d B') )

Glossary: ``CR`` allowed ratio of the bits of L and R to those of naive quantisation at ``B_nq``
bits, ``B`` and ``B'`` bits per entry of L (n x r) and R (r x d).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.decompose import Decomposition
from lplr_q.bits import rank_for_budget
from lplr_q.data_agnostic.compressed import CompressedMatrix, relative_error
from lplr_q.data_agnostic.dsvd import compress_dsvd
from lplr_q.data_agnostic.iterative import compress_iterative, compress_lplr_q
from lplr_q.data_agnostic.lplr import compress_lplr
from lplr_q.data_agnostic.lsvd import compress_lsvd
from lplr_q.data_agnostic.naive import compress_naive
from workbench.errors import ConfigError, unknown_name

Result = CompressedMatrix | Decomposition

# name -> low-rank method of (matrix, rank, bits, bits_right, generator)
METHODS: dict[str, Callable[..., CompressedMatrix]] = {
    "dsvd": compress_dsvd,
    "lsvd": compress_lsvd,
    "lplr": compress_lplr,
    "iterative": compress_iterative,
}
OTHERS = ("naive", "lplr-q")
TITLES = {
    "naive": "naive",
    "dsvd": "direct SVD",
    "lsvd": "LPLR-SVD",
    "lplr": "LPLR",
    "iterative": "iterative LPLR",
    "lplr-q": "LPLR-Q",
}


def rank_for_ratio(
    n: int, d: int, *, naive_bits: float, bits: int, bits_right: int, ratio: float = 1.0
) -> int:
    """The rank whose codes take ``ratio`` times those of naive quantisation, at most min(n, d).

    >>> rank_for_ratio(256, 256, naive_bits=1, bits=8, bits_right=8)
    16

    Raises:
        ConfigError: not even one component fits.
    """
    if not (naive_bits > 0 and ratio > 0):
        raise ConfigError(f"naive_bits={naive_bits}, ratio={ratio}; both must be positive")
    # a relative 1e-12 so that an exact quotient is not lost to rounding
    rank = math.floor(ratio * n * d * naive_bits / (n * bits + d * bits_right) * (1 + 1e-12))
    if rank < 1:
        raise ConfigError(
            f"{ratio:g} x {naive_bits:g} bits per entry of a {n}x{d} matrix hold no component of "
            f"{bits}- and {bits_right}-bit factors; raise the budget or lower the factor bits"
        )
    return min(rank, n, d)


def compress_to_budget(
    matrix: Float[Tensor, "n d"],
    method: str,
    *,
    naive_bits: int,
    bits: int = 8,
    bits_right: int | None = None,
    ratio: float = 1.0,
    side: Literal["columns", "rows"] = "columns",
    generator: torch.Generator,
    **options: Any,
) -> Result:
    """Any method at the size of naive quantisation: the rank follows from the budget.

    ``side="rows"`` works on A^T: for LPLR a sketch S A of the rows, R = Q'(S A), L = Q(A R^+).

    ``lplr-q`` spends all but one bit per entry on Q (none when there is one) and the rest on
    4-bit factors. ``options`` go to the method.

    Raises:
        ConfigError: unknown method, or a budget without room.
    """
    n, d = matrix.shape
    bits_right = bits if bits_right is None else bits_right
    if method == "naive":
        return compress_naive(matrix, bits=naive_bits, **options)
    if method == "lplr-q":
        return _lplr_q_to_budget(matrix, naive_bits * ratio, generator, options)
    if method not in METHODS:
        raise unknown_name("method", method, [*METHODS, *OTHERS])
    rank = rank_for_ratio(
        n, d, naive_bits=naive_bits, bits=bits, bits_right=bits_right, ratio=ratio
    )
    if side == "columns":
        return METHODS[method](
            matrix, rank=rank, bits=bits, bits_right=bits_right, generator=generator, **options
        )
    flipped = METHODS[method](
        matrix.T, rank=rank, bits=bits_right, bits_right=bits, generator=generator, **options
    )
    return flipped.transpose()


def search_bits(
    matrix: Float[Tensor, "n d"],
    method: str,
    *,
    naive_bits: int,
    candidates: Sequence[int] = (2, 3, 4, 6, 8),
    seed: int = 0,
    **options: Any,
) -> CompressedMatrix:
    """A low-rank method at a budget with the width of its factor codes chosen by measurement.

    Few bits buy a high rank, many bits a fine grid; which is better depends on how fast the
    singular values fall. Every candidate is made with the same stream, the one with the smallest
    relative error is returned.

    Raises:
        ConfigError: unknown method, or no candidate leaves room for a component.
    """
    if method not in METHODS:
        raise unknown_name("low-rank method", method, METHODS)
    best: tuple[float, CompressedMatrix] | None = None
    refused: ConfigError | None = None
    for bits in candidates:
        generator = torch.Generator().manual_seed(seed)
        try:
            made = compress_to_budget(
                matrix, method, naive_bits=naive_bits, bits=bits, generator=generator, **options
            )
        except ConfigError as error:
            refused = error
            continue
        assert isinstance(made, CompressedMatrix)
        error = relative_error(matrix, made.dequantize().to(matrix))
        if best is None or error < best[0]:
            best = (error, made)
    if best is None:
        raise refused or ConfigError("candidates=(): no width of the factor codes to try")
    return best[1]


def _lplr_q_to_budget(
    matrix: Tensor, budget: float, generator: torch.Generator, options: dict[str, Any]
) -> Decomposition:
    settings = {"codebook": "lloyd-max", "factor_bits": 4, **options}
    q_bits = max(0, math.ceil(budget) - 1)
    rank = rank_for_budget(
        *matrix.shape,
        budget,
        codebook=settings["codebook"],
        q_bits=q_bits,
        factor_bits=settings["factor_bits"],
    )
    if rank < 1:
        raise ConfigError(f"{budget:g} bits per entry leave no room for Q and a component")
    return compress_lplr_q(matrix, rank=rank, q_bits=q_bits, generator=generator, **settings)


def bits_per_weight(result: Result) -> float:
    """Stored bits per entry of any method's result."""
    if isinstance(result, CompressedMatrix):
        return result.bits_per_weight
    assert result.bits is not None
    return result.bits.per_weight
