"""Scalar codebook of equally spaced levels, with the step that is best for a unit Gaussian.

Levels step (k - (2^b - 1) / 2), k = 0 .. 2^b - 1. Gaussian MSE 0.1188, 0.0374, 0.0115 at 2, 3, 4
bits; a third of a bit per halving worse than Lloyd-Max as bits grow.   [Max 1960, table II]
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.codebooks.scalar import ScalarCodebook, gaussian_mse
from lplr_q.constants import on_cpu


@lru_cache(maxsize=8)
@on_cpu
def uniform_levels(bits: int) -> Float[Tensor, " levels"]:
    """The 2^bits equally spaced levels of smallest mean squared error for N(0, 1), float64."""
    count = 2**bits
    places = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    low, high = 1e-3, 4.0
    for _ in range(80):  # the error is unimodal in the step
        first, second = low + (high - low) / 3, high - (high - low) / 3
        if gaussian_mse(places * first) < gaussian_mse(places * second):
            high = second
        else:
            low = first
    return places * (low + high) / 2


class UniformCodebook(ScalarCodebook):
    """One of 2^b equally spaced levels per weight."""

    name = "uniform"
    levels_of = staticmethod(uniform_levels)
