"""LPLR-SVD: the best rank-r columns instead of a sketch.   [arXiv 2310.11028 §3]

    L = Q(U_r Sigma_r),   R = Q'(L^+ A)

At 16 bits this is the truncated SVD, the optimum over rank r [Eckart & Young 1936].
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.data_agnostic.compressed import CompressedMatrix, check_matrix, check_rank
from lplr_q.data_agnostic.lplr import from_columns
from lplr_q.data_agnostic.naive import Rounding
from lplr_q.data_agnostic.sketch import random_rotation


def compress_lsvd(
    matrix: Float[Tensor, "n d"],
    *,
    rank: int,
    bits: int = 8,
    bits_right: int | None = None,
    mix: bool = True,
    damped: bool = True,
    rounding: Rounding = "nearest",
    affine: bool = False,
    generator: torch.Generator | None = None,
) -> CompressedMatrix:
    """A ~ L R from a full SVD.

    ``mix`` turns the columns of U_r Sigma_r by a random rotation before they are rounded: they then
    have equal scale and share one grid better. It needs ``generator``; without one the columns are
    rounded as they are. Other arguments as of :func:`~lplr_q.data_agnostic.lplr.compress_lplr`.
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    columns = u[:, :rank] * s[:rank]
    if mix and generator is not None:
        columns = columns @ random_rotation(rank, generator, matrix)
    return from_columns(
        "lsvd",
        matrix,
        columns,
        bits=bits,
        bits_right=bits_right,
        damped=damped,
        rounding=rounding,
        affine=affine,
        generator=generator,
    )
