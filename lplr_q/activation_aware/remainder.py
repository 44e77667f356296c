"""What is left of a matrix when Q, L R or both are taken away, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.activation_aware.factors import LowRank
from lplr_q.linalg.ldlq import CodebookBlocks, weighted_loss
from lplr_q.linalg.rows import row_chunks
from lplr_q.linalg.scales import Scale, scaled_points


@dataclass(frozen=True)
class CodedQ:
    """Q as its codes: points of ``blocks`` times ``scale``."""

    blocks: CodebookBlocks
    codes: Sequence[Tensor]
    scale: Scale

    def __getitem__(self, rows: slice | Int64[Tensor, " k"]) -> Float[Tensor, "k n"]:
        """These rows."""
        points = self.blocks.decode([part[rows] for part in self.codes])
        return scaled_points(points, self.scale, rows)


class Remainder:
    """W - Q - L R, or W less one of them; rows are decoded when they are asked for."""

    def __init__(
        self, target: Float[Tensor, "m n"], q: CodedQ | None = None, low: LowRank | None = None
    ) -> None:
        self.target, self.q = target, q
        self.shape, self.dtype, self.device = target.shape, target.dtype, target.device
        self.factors = None if low is None else (low.left.decode().T, low.right.decode())

    def __getitem__(self, rows: slice | Int64[Tensor, " k"]) -> Float[Tensor, "k n"]:
        """These rows; a view of W where nothing is taken away."""
        part = self.target[rows]
        if self.q is not None:
            part = part - self.q[rows]
        if self.factors is not None:
            part = part - self.factors[0][rows] @ self.factors[1]
        return part

    def whole(self) -> Float[Tensor, "m n"]:
        """All rows; W itself where nothing is taken away."""
        if self.q is None and self.factors is None:
            return self.target
        found = torch.empty_like(self.target)
        for rows in row_chunks(len(found)):
            found[rows] = self[rows]
        return found

    def loss(self, hessian: Float[Tensor, "n n"]) -> float:
        """tr(E H E^T) of E = these rows."""
        return sum(weighted_loss(self[rows], hessian) for rows in row_chunks(self.shape[0]))
