"""LPLR: low precision, low rank.   [arXiv 2310.11028, Algorithm 1]

    L = Q(A S),   R = Q'(L^+ A)

The second factor is fitted to the *rounded* first one, so it undoes part of its rounding; a ridge
that foresees its own rounding is added unless ``damped=False``.
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

SPAN = 7.5
"""Largest minus smallest of about 10^4 standard normal values."""


def least_squares(
    left: Float[Tensor, "n r"], matrix: Float[Tensor, "n d"], *, ridge: float = 0.0
) -> Float[Tensor, "r d"]:
    """The R with the smallest |A - L R|_F^2 + ridge |R|_F^2; L^+ A without a ridge.

    A thin QR of L and the SVD of its triangle, in float64. Directions below 1e-10 of the largest,
    as coarse codes can make them, are left out.
    """
    basis, triangle = torch.linalg.qr(left.double())
    u, s, vt = torch.linalg.svd(triangle)
    gain = torch.where(s > 1e-10 * s[0], s / (s * s + ridge).clamp_min(1e-300), 0.0)
    seen = basis.to(matrix.dtype).T @ matrix
    return ((vt.T * gain) @ u.T).to(matrix.dtype) @ seen


def rounding_ridge(left: Float[Tensor, "n r"], bits: int) -> float:
    """The ridge that foresees the rounding of R.

    Rounding on a grid of 2^B' levels over c rms(R) adds an error of variance
    v = c^2 |R|_F^2 / (12 r d (2^B' - 1)^2) to each entry, and thus |L|_F^2 d v to the loss, hence

        ridge = |L|_F^2 c^2 / (12 r (2^B' - 1)^2)                              [our derivation]

    with c = 7.5, the usual span of ten thousand Gaussian values in standard deviations. It keeps
    weak, noisy directions of L from blowing up R and with it the step of the grid.
    """
    energy = float(left.double().square().sum()) / left.shape[1]
    return energy * SPAN**2 / (12 * (2**bits - 1) ** 2)


def from_columns(
    method: str,
    matrix: Float[Tensor, "n d"],
    columns: Float[Tensor, "n r"],
    *,
    bits: int,
    bits_right: int | None = None,
    damped: bool = True,
    rounding: Rounding = "nearest",
    affine: bool = False,
    generator: torch.Generator | None = None,
) -> CompressedMatrix:
    """L = Q(columns), R = Q'(L^+ A), or with the ridge of :func:`rounding_ridge`."""
    left = quantise_uniform(columns, bits, rounding=rounding, generator=generator)
    right = right_for(
        matrix,
        left,
        bits if bits_right is None else bits_right,
        damped=damped,
        rounding=rounding,
        generator=generator,
    )
    return finish(method, matrix, Term(left, right), affine)


def right_for(
    matrix: Float[Tensor, "n d"],
    left: UniformCodes,
    bits: int,
    *,
    damped: bool = True,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> UniformCodes:
    """The rounded R for the codes of L."""
    decoded = left.decode(matrix.dtype)
    ridge = rounding_ridge(decoded, bits) if damped else 0.0
    fitted = least_squares(decoded, matrix, ridge=ridge)
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
    damped: bool = True,
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
        damped: fit R with :func:`rounding_ridge`; False is the published L^+ A.
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
    return from_columns(
        "lplr",
        matrix,
        columns,
        bits=bits,
        bits_right=bits_right,
        damped=damped,
        rounding=rounding,
        affine=affine,
        generator=generator,
    )


def finish(method: str, matrix: Tensor, term: Term, affine: bool) -> CompressedMatrix:
    """The compressed matrix of one term, with the affine post-fit when asked."""
    made = CompressedMatrix(method, (matrix.shape[0], matrix.shape[1]), (term,))
    return fit_affine(matrix, made) if affine else made
