"""Scalar codebooks: one level per weight; the Lloyd-Max quantiser of a unit Gaussian.
[Max 1960]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.codebooks.base import require_bits
from lplr_q.constants import on_cpu


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@lru_cache(maxsize=8)
@on_cpu
def lloyd_max_levels(bits: int) -> Float[Tensor, " levels"]:
    """The 2^bits levels that minimise E (x - q(x))^2 for x ~ N(0, 1), ascending, float64.

    They solve: boundaries halfway between levels, levels = centroids of their cells. A few rounds
    of Lloyd's iteration, then Newton's method; the Jacobian of the centroids is tridiagonal.
    """
    count = 2**bits
    start = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = torch.special.ndtri(start) * math.sqrt(3)  # asymptotic point density ~ p^(1/3)
    for step in range(60):
        bounds = (levels[1:] + levels[:-1]) / 2
        new, jacobian = _centroids(bounds)
        if step >= 10:
            system = torch.eye(count, dtype=torch.float64) - jacobian
            new = levels + torch.linalg.solve(system, new - levels)
        new = (new - new.flip(0)) / 2  # the optimum is symmetric; keep it exactly so
        moved, levels = float((new - levels).abs().max()), new
        if moved < 1e-13:
            break
    return levels


def _centroids(
    bounds: Float[Tensor, " inner"],
) -> tuple[Float[Tensor, " levels"], Float[Tensor, "levels levels"]]:
    """Means of N(0, 1) between boundaries halfway between levels; their derivatives by the
    levels."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    ends = torch.cat([-edge, bounds, edge])
    density = _density(ends)
    mass = _cdf(ends[1:]) - _cdf(ends[:-1])
    means = (density[:-1] - density[1:]) / mass
    # a boundary moves half as far as each of its two levels
    above = 0.5 * density[1:-1] * (bounds - means[:-1]) / mass[:-1]
    below = 0.5 * density[1:-1] * (means[1:] - bounds) / mass[1:]
    zero = torch.zeros(1, dtype=torch.float64)
    diagonal = torch.cat([above, zero]) + torch.cat([zero, below])
    return means, torch.diag(diagonal) + torch.diag(above, 1) + torch.diag(below, -1)


def gaussian_mse(levels: Float[Tensor, " levels"]) -> float:
    """E (x - q(x))^2 of nearest-level rounding for x ~ N(0, 1), in closed form."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    bounds = torch.cat([-edge, (levels[1:] + levels[:-1]) / 2, edge])
    mass = _cdf(bounds[1:]) - _cdf(bounds[:-1])
    first = _density(bounds[:-1]) - _density(bounds[1:])
    return float(1 - 2 * (levels * first).sum() + (levels**2 * mass).sum())


class ScalarCodebook:
    """One of 2^b ascending levels per weight, the nearest; a kind of it has a name and levels."""

    name: str
    dim = 1
    opt_scale = 1.0
    levels_of: Callable[[int], Tensor]
    """Levels of so many bits."""

    def __init__(self, bits: int) -> None:
        require_bits(self.name, bits, tuple(range(1, 9)))
        self.bits = float(bits)
        self.streams: tuple[int, ...] = (bits,)
        self._levels = type(self).levels_of(bits)

    def encode(self, x: Float[Tensor, "*batch 1"]) -> Int64[Tensor, "*batch 1"]:
        """Index of the nearest level."""
        levels = self._levels.to(device=x.device, dtype=x.dtype)
        return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)

    def decode(self, codes: Int64[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 1"]:
        """The levels."""
        return self._levels.to(device=codes.device, dtype=torch.float32)[codes]


class LloydMaxCodebook(ScalarCodebook):
    """Levels of least error; Gaussian MSE 0.1175, 0.0345, 0.0095 at 2, 3, 4 bits."""

    name = "lloyd-max"
    levels_of = staticmethod(lloyd_max_levels)
