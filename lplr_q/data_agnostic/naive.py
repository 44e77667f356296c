"""Naive quantisation: one uniform grid from the smallest to the largest entry of the matrix.
[arXiv 2310.11028 §2]

    q(x) = low + step round((x - low) / step),   step = (high - low) / (2^B - 1)

Nearest rounding errs by at most step / 2. With ``rounding="stochastic"`` the neighbour above is
taken with a probability equal to the fraction left: unbiased, the form of the paper's analysis.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.data_agnostic.compressed import (
    CompressedMatrix,
    Term,
    UniformCodes,
    check_matrix,
    fit_affine,
)
from workbench.errors import ConfigError

Rounding = Literal["nearest", "stochastic"]


def quantise_uniform(
    matrix: Float[Tensor, "n d"],
    bits: int,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> UniformCodes:
    """Codes of every entry on the grid of 2^bits levels whose ends are the extremes of the matrix.

    Raises:
        ConfigError: bits not in 1..16, or stochastic rounding without a generator.
    """
    if not 1 <= bits <= 16:
        raise ConfigError(f"bits={bits} of a uniform grid; choose 1 to 16")
    # the grid is stored as float32: round it first, then choose codes on the stored one
    ends = torch.stack([matrix.min(), matrix.max()]).to(torch.float32)
    low = float(ends[0])
    step = float(((ends[1].double() - ends[0].double()) / (2**bits - 1)).float())
    if step <= 0.0:
        return UniformCodes(torch.zeros_like(matrix, dtype=torch.int32), low, 0.0, bits)
    place = (matrix - low) / step
    if rounding == "stochastic":
        if generator is None:
            raise ConfigError("stochastic rounding needs a generator")
        noise = torch.rand(matrix.shape, generator=generator, dtype=torch.float32)
        codes = (place + noise.to(place.device, place.dtype)).floor()
    else:
        codes = place.round()
    return UniformCodes(codes.clamp_(0, 2**bits - 1).to(torch.int32), low, step, bits)


def compress_naive(
    matrix: Float[Tensor, "n d"],
    *,
    bits: int,
    rounding: Rounding = "nearest",
    affine: bool = False,
    generator: torch.Generator | None = None,
) -> CompressedMatrix:
    """Every entry rounded on its own: the baseline of the budget (NQ)."""
    check_matrix(matrix)
    codes = quantise_uniform(matrix, bits, rounding=rounding, generator=generator)
    made = CompressedMatrix("naive", (matrix.shape[0], matrix.shape[1]), (Term(None, codes),))
    return fit_affine(matrix, made) if affine else made
