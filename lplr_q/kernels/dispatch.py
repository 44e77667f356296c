"""Which compiled form multiplies a few activations with a coded matrix, if any."""

from __future__ import annotations

from torch import Tensor

MAX_BATCH = 8
"""Rows of activations up to which decoding inside the product pays."""


def gemv(
    x: Tensor, codes: list[Tensor], tail: Tensor | None, scale: Tensor, book: str, bits: int, m: int
) -> Tensor | None:
    """The product by a compiled kernel, or None when there is none for this form."""
    return None
