"""Round-to-nearest and GPTQ with group-wise scales: what every table compares with.
[GPTQ, arXiv 2210.17323]

Asymmetric min-max grids: scale = (max - min) / (2^b - 1) in float16, integer zero point of b bits,
both counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lplr_q.linalg.ldl import cholesky_, require_finite
from workbench.errors import ConfigError, DataError


@dataclass(frozen=True)
class GroupGrid:
    """Scale and zero point of each row for one group of columns."""

    scale: Float[Tensor, " m"]
    zero: Float[Tensor, " m"]
    bits: int

    def round(self, x: Float[Tensor, "m b"]) -> tuple[Int64[Tensor, "m b"], Float[Tensor, "m b"]]:
        """Codes 0 .. 2^bits - 1 and the values they stand for."""
        scale, zero = self.scale[:, None].to(x.dtype), self.zero[:, None].to(x.dtype)
        codes = ((x / scale).round() + zero).clamp(0, 2**self.bits - 1)
        return codes.long(), (codes - zero) * scale


def min_max_grid(block: Float[Tensor, "m b"], bits: int, *, symmetric: bool = False) -> GroupGrid:
    """The grid that covers 0 and every entry of each row; the scale is rounded to float16 first."""
    top = 2**bits - 1
    low, high = block.amin(1).clamp_max(0), block.amax(1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / top).to(torch.float16).to(block.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    return GroupGrid(scale, zero.clamp(0, top), bits)


@dataclass(frozen=True)
class Rounded:
    """Integer codes, the grids of all groups, and the matrix they decode to."""

    codes: UInt8[Tensor, "m n"]
    grids: list[GroupGrid]
    group: int
    weight: Float[Tensor, "m n"]


def _check(weight: Tensor, bits: int, group: int) -> None:
    require_finite("weight", weight)
    if not 1 <= bits <= 8:
        raise ConfigError(f"rounding to {bits} bits; choose 1 to 8")
    if group < 1:
        raise ConfigError(f"group={group}; use at least 1 column per group")


def round_to_nearest(
    weight: Float[Tensor, "m n"], *, bits: int, group: int = 128, symmetric: bool = False
) -> Rounded:
    """Each weight to the nearest point of its group's grid (RTN)."""
    _check(weight, bits, group)
    codes, points, grids = [], [], []
    for low in range(0, weight.shape[1], group):
        block = weight[:, low : low + group]
        grid = min_max_grid(block, bits, symmetric=symmetric)
        c, p = grid.round(block)
        codes.append(c.to(torch.uint8))
        points.append(p)
        grids.append(grid)
    return Rounded(torch.cat(codes, 1), grids, group, torch.cat(points, 1))


def _upper_factor_of_inverse(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """U with U^T U = H^-1, float64; everything happens in one copy of H."""
    factor = cholesky_(hessian.to(torch.float64, copy=True), lambda: hessian)
    factor = torch.cholesky_inverse(factor, out=factor)
    info = torch.empty(0, dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, upper=True, check_errors=True, out=(factor, info))
    return factor


def gptq(
    weight: Float[Tensor, "m n"],
    hessian: Float[Tensor, "n n"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    buffer: int = 128,
    grid_of: Callable[[Tensor, int], GroupGrid] | None = None,
) -> Rounded:
    """Columns in order, each column's error spread over those to its right.   [GPTQ, Algorithm 1]

    With U the upper Cholesky factor of H^-1:  W_:,j+1: -= (w_j - q_j) / U_jj  U_j,j+1:. The grid
    of a group is fixed from the updated weights when its first column is reached; ``grid_of(block,
    first_column)`` replaces that rule. ``hessian`` must be regularised.

    Raises:
        ConfigError: bits or group out of range.
        DataError: non-finite numbers; a Hessian of another width, or not positive definite.
    """
    _check(weight, bits, group)
    m, n = weight.shape
    if hessian.shape != (n, n):
        raise DataError(f"Hessian of shape {tuple(hessian.shape)} for a weight with {n} inputs")
    require_finite("Hessian", hessian)
    upper = _upper_factor_of_inverse(hessian).to(weight.dtype)
    work = weight.clone()
    codes = torch.empty(m, n, dtype=torch.uint8, device=weight.device)
    points = torch.empty_like(work)
    grids: list[GroupGrid] = []
    for low in range(0, n, buffer):
        high = min(low + buffer, n)
        scaled_error = torch.zeros(m, high - low, dtype=work.dtype, device=work.device)
        for j in range(low, high):
            if j % group == 0:
                block = work[:, j : j + group]
                if j + group > high > j:  # columns beyond the buffer still lack its corrections
                    block = block.clone()
                    beyond = slice(high, min(j + group, n))
                    done = scaled_error[:, : j - low] @ upper[low:j, beyond]
                    block[:, high - j :] -= done
                grids.append(
                    grid_of(block, j)
                    if grid_of is not None
                    else min_max_grid(block, bits, symmetric=symmetric)
                )
            codes[:, j : j + 1], points[:, j : j + 1] = grids[-1].round(work[:, j : j + 1])
            error = (work[:, j] - points[:, j]) / upper[j, j]
            scaled_error[:, j - low] = error
            work[:, j + 1 : high] -= error[:, None] * upper[j, j + 1 : high]
        work[:, high:] -= scaled_error @ upper[low:high, high:]
    return Rounded(codes, grids, group, points)
