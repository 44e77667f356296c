"""LPLR: low precision, low rank.   [arXiv 2310.11028, Algorithm 1]

    L = Q(A S),   R = Q'(L^+ A)

The second factor is fitted to the *rounded* first one, so it undoes part of its rounding.
No singular value decomposition is made: two thin products and a thin QR.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.data_agnostic.compressed import (
    CompressedMatrix,
    Term,
    UniformCodes,
    check_matrix,
    check_rank,
    fit_affine,
)
from lplr_q.data_agnostic.naive import Rounding, quantise_uniform
from lplr_q.data_agnostic.sketch import sketch_range


def least_squares(left: Float[Tensor, "n r"], matrix: Float[Tensor, "n d"]) -> Float[Tensor, "r d"]:
    """L^+ A: the R with the smallest |A - L R|_F.

    QR in float64 on the thin factor; the pseudo-inverse where L has (nearly) dependent columns, as
    coarse codes can make them.
    """
    basis, triangle = torch.linalg.qr(left.double())
    diagonal = triangle.diagonal().abs()
    if float(diagonal.min()) > 1e-10 * float(diagonal.max()):
        seen = (basis.to(matrix.dtype).T @ matrix).double()
        return torch.linalg.solve_triangular(triangle, seen, upper=True).to(matrix.dtype)
    return (torch.linalg.pinv(left.double(), rtol=1e-10).to(matrix.dtype)) @ matrix


def factors_from_left(
    matrix: Float[Tensor, "n d"],
    columns: Float[Tensor, "n r"],
    *,
    bits: int,
    bits_right: int,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Term:
    """L = Q(columns), R = Q'(L^+ A)."""
    left = quantise_uniform(columns, bits, rounding=rounding, generator=generator)
    return Term(left, right_for(matrix, left, bits_right, rounding, generator))


def right_for(
    matrix: Float[Tensor, "n d"],
    left: UniformCodes,
    bits: int,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> UniformCodes:
    """Q'(L^+ A) for the codes of L."""
    fitted = least_squares(left.decode(matrix.dtype), matrix)
    return quantise_uniform(fitted, bits, rounding=rounding, generator=generator)


def compress_lplr(
    matrix: Float[Tensor, "n d"],
    *,
    rank: int,
    bits: int = 8,
    bits_right: int | None = None,
    sketch: str = "gaussian",
    power_iterations: int = 0,
    orthogonal: bool = False,
    rounding: Rounding = "nearest",
    affine: bool = False,
    generator: torch.Generator,
) -> CompressedMatrix:
    """A ~ L R from one random sketch of the columns; ``compress_lplr(A.T, ...).transpose()`` uses
    one of the rows.

    Args:
        matrix: A, n x d; never changed.
        rank: columns of L.
        bits: bits per entry of L (n x r).
        bits_right: bits per entry of R (r x d); None = the same.
        sketch: ``gaussian``, ``sparse`` or ``srht``.
        power_iterations: q; sharpens the range when the singular values fall slowly.
        orthogonal: round an orthonormal basis of the range instead of A S.
        rounding: ``nearest`` or ``stochastic``.
        affine: fit alpha and beta afterwards.
        generator: of the sketch (and of stochastic rounding).

    Raises:
        ConfigError: rank, bits or sketch out of range.
        DataError: no finite matrix.
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    columns = sketch_range(
        matrix,
        rank,
        kind=sketch,
        power_iterations=power_iterations,
        orthogonal=orthogonal,
        generator=generator,
    )
    term = factors_from_left(
        matrix,
        columns,
        bits=bits,
        bits_right=bits if bits_right is None else bits_right,
        rounding=rounding,
        generator=generator,
    )
    return finish("lplr", matrix, term, affine)


def finish(method: str, matrix: Tensor, term: Term, affine: bool) -> CompressedMatrix:
    """The compressed matrix of one term, with the affine post-fit when asked."""
    made = CompressedMatrix(method, (matrix.shape[0], matrix.shape[1]), (term,))
    return fit_affine(matrix, made) if affine else made
