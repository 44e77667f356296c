"""Scales of Q per row, or per row and group of columns.

    Q_ij = s_i,g(j) P_ij,   s_i,g = rms of the target's row i over the columns of group g

``P`` are points of a codebook for input of unit rms. With one scale for the matrix rounding may
work on W / s; with several it works in the domain of W, where the loss tr(E H E^T) is the true one,
and only the rounding of a block divides by the scales of its rows.

Scales are bfloat16: any magnitude, exact under a power of two, and a relative error of 2^-9 that
rounding already knows of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from lplr_q.linalg.ldlq import CodebookBlocks
from lplr_q.linalg.rows import Rows, row_chunks
from workbench.errors import ConfigError

LEAST_SHARE = 1 / 64
"""Of the row's rms: the smallest scale of a group, so that feedback into a group of zeros stays
within the reach of the codebook."""


def scale_width(q_group: int, n: int, dim: int) -> int:
    """Columns per scale for -1 (a row) or a number of columns; 0 where the matrix has one scale.

    >>> scale_width(-1, 40, 8), scale_width(16, 40, 8), scale_width(0, 40, 8)
    (40, 16, 0)

    Raises:
        ConfigError: a group that would cut a block of the codebook.
    """
    if q_group < -1 or (q_group % dim and q_group != -1):
        raise ConfigError(
            f"q_group={q_group}: use 0 (one scale), -1 (one per row), or a multiple of {dim}, the "
            "columns that the codebook codes together"
        )
    return n if q_group == -1 else q_group


@dataclass(frozen=True)
class RowScales:
    """Scales of some rows: bit patterns of bfloat16."""

    patterns: Int16[Tensor, "m groups"]
    n: int
    """Columns of the matrix."""
    width: int
    """Columns per scale; the last group may have fewer."""

    def __getitem__(self, rows: slice | Int64[Tensor, " k"]) -> RowScales:
        """Those of these rows."""
        return replace(self, patterns=self.patterns[rows])

    def values(self) -> Float[Tensor, "m groups"]:
        """As float32."""
        return self.patterns.view(torch.bfloat16).float()

    def spread(self) -> Float[Tensor, "m columns"]:
        """A factor per weight; a single column where all weights of a row share it."""
        values = self.values()
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.width, dim=1)[:, : self.n]

    def times(self, power: float) -> RowScales:
        """The scales times a power of two, exactly."""
        moved = self.patterns.view(torch.bfloat16) * power
        return replace(self, patterns=moved.view(torch.int16))


Scale = float | RowScales
"""One for the matrix, or several."""


def row_scales(target: Rows, width: int, multiplier: float = 1.0) -> RowScales:
    """rms / multiplier of every row's groups of ``width`` columns, rounded."""
    (m, n), kept = target.shape, []
    count = -(-n // width)
    lengths = torch.full((count,), width, dtype=torch.float32, device=target.device)
    lengths[-1] = n - (count - 1) * width
    for rows in row_chunks(m):
        square = torch.nn.functional.pad(target[rows].square(), (0, count * width - n))
        sums = square.unflatten(1, (count, width)).sum(2)
        rms = (sums / lengths).sqrt()
        least = (sums.sum(1, keepdim=True) / n).sqrt() * LEAST_SHARE
        kept.append((torch.maximum(rms, least).clamp_min(1e-20) / multiplier).to(torch.bfloat16))
    return RowScales(torch.cat(kept).view(torch.int16), n, width)


class ScaledBlocks:
    """The blocks of a codebook for rows with scales of their own, in the domain of W."""

    def __init__(self, blocks: CodebookBlocks, scales: RowScales) -> None:
        self.blocks, self.scales = blocks, scales
        self.bounds, self.rows = blocks.bounds, blocks.rows
        self.values = scales.values()

    def quantise(
        self, target: Float[Tensor, "m b"], block: int
    ) -> tuple[Int64[Tensor, "m s"], Float[Tensor, "m b"]]:
        """Codes and points of one block, which lies within a group."""
        group = self.bounds[block][0] // self.scales.width
        own = self.values[:, group : group + 1].to(target.dtype)
        codes, points = self.blocks.quantise(target / own, block)
        return codes, points * own

    def decode(self, codes: list[Tensor]) -> Float[Tensor, "m n"]:
        """The matrix of all blocks' codes."""
        return self.blocks.decode(codes) * self.scales.spread()


def scaled_rows(
    target: Rows, rows: slice, scale: Scale, blocks: CodebookBlocks
) -> tuple[Float[Tensor, "k n"], CodebookBlocks | ScaledBlocks]:
    """These rows as they are rounded, new memory, and what rounds them: divided by the scale of the
    matrix, or as they are with scales of their own."""
    if isinstance(scale, RowScales):
        return target[rows].clone(), ScaledBlocks(blocks, scale[rows])
    return target[rows] / scale, blocks


def scaled_points(
    points: Float[Tensor, "k n"], scale: Scale, rows: slice | Int64[Tensor, " k"]
) -> Float[Tensor, "k n"]:
    """Points of unit rms in these rows, times their scales."""
    return points * (scale[rows].spread() if isinstance(scale, RowScales) else scale)
