"""Direct SVD: both factors rounded, neither fitted to the other.   [arXiv 2310.11028 §3]

    L = Q(U_r),   R = Q'(Sigma_r V_r^T)

The baseline that shows what fitting R to the rounded L is worth.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.data_agnostic.compressed import CompressedMatrix, Term, check_matrix, check_rank
from lplr_q.data_agnostic.lplr import finish
from lplr_q.data_agnostic.naive import Rounding, quantise_uniform


def compress_dsvd(
    matrix: Float[Tensor, "n d"],
    *,
    rank: int,
    bits: int = 8,
    bits_right: int | None = None,
    rounding: Rounding = "nearest",
    affine: bool = False,
    generator: torch.Generator | None = None,
) -> CompressedMatrix:
    """A ~ Q(U_r) Q'(Sigma_r V_r^T). Arguments as of ``compress_lplr``."""
    check_matrix(matrix)
    check_rank(matrix, rank)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    left = quantise_uniform(u[:, :rank], bits, rounding=rounding, generator=generator)
    right = quantise_uniform(
        s[:rank, None] * vt[:rank],
        bits if bits_right is None else bits_right,
        rounding=rounding,
        generator=generator,
    )
    return finish("dsvd", matrix, Term(left, right), affine)
