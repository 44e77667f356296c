"""Matrices taken a few rows at a time, so that what is computed from them stays small."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Rows(Protocol):
    """A matrix of which a few rows at a time are asked for: a tensor, or computed then."""

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        ...

    def __getitem__(self, rows: slice, /) -> Float[Tensor, "k n"]:
        """These rows."""
        ...


class LazyRows(Rows, Protocol):
    """One that is computed."""

    def whole(self) -> Float[Tensor, "m n"]:
        """All rows."""
        ...


def row_chunks(m: int) -> list[slice]:
    """Rows that are worked on together where every row stands alone: few enough that what is held
    for them counts little beside the matrix, and whole tiles of every codebook."""
    size = 512 if m <= 512 else min(512, max(256, m // 4 // 64 * 64))
    return [slice(low, min(low + size, m)) for low in range(0, m, size)]


def squared_norm(matrix: Rows) -> float:
    """|A|^2 in float64."""
    norm = torch.linalg.vector_norm
    chunks = row_chunks(matrix.shape[0])
    return sum(float(norm(matrix[rows], dtype=torch.float64)) ** 2 for rows in chunks)


def times(
    matrix: Rows, right: Float[Tensor, "n k"], *, lower: bool = False
) -> Float[Tensor, "m k"]:
    """A B; with ``lower`` B is lower triangular and its zeros are passed over."""
    m, k = matrix.shape[0], right.shape[1]
    product = torch.empty(m, k, dtype=matrix.dtype, device=matrix.device)
    step = max(256, k // 8) if lower else k
    for rows in row_chunks(m):
        part = matrix[rows]
        for low in range(0, k, step):
            own, above = slice(low, min(low + step, k)), low if lower else 0
            product[rows, own] = part[:, above:] @ right[above:, own]
    return product
