"""Which compiled form decodes or multiplies a coded matrix, if any."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q import native
from lplr_q.activation_aware.layer_state import decode_rows, unpack_tail
from lplr_q.codebooks.base import make_codebook
from lplr_q.kernels import cpu, triton_e8p
from lplr_q.linalg.ldlq import CodebookBlocks


@lru_cache(maxsize=64)
def _blocks(name: str, bits: int, n: int) -> CodebookBlocks:
    return CodebookBlocks(make_codebook(name, bits), n)


MAX_BATCH = 8
"""Rows of activations up to which decoding inside the product pays."""


def rows(
    codes: list[Tensor],
    tail: Tensor | None,
    name: str,
    bits: int,
    shape: tuple[int, int],
    low: int,
    high: int,
) -> Float[Tensor, "rows n"]:
    """:func:`decode_rows`, in C where that is possible: the same values."""
    m, n = shape
    book = make_codebook(name, bits)
    if tail is not None or not cpu.usable(codes, book):
        return decode_rows(codes, tail, name, bits, n, low, high)
    scale = _blocks(name, bits, n).scale
    return cpu.decode(codes, book, scale, n // book.dim, (m, low, high))


def gemv(
    x: Float[Tensor, "batch n"],
    codes: list[Tensor],
    tail: Tensor | None,
    scale: Tensor,
    name: str,
    bits: int,
    m: int,
    group: int = 0,
) -> Float[Tensor, "batch m"] | None:
    """The product by a compiled kernel, or None when there is none for this form: none multiplies
    with a scale per group of columns, one per row is a factor of the result."""
    book, n = make_codebook(name, bits), x.shape[1]
    if x.shape[0] > MAX_BATCH or x.dtype == torch.float64 or (group and scale.shape[1] > 1):
        return None
    engine = cpu if x.device.type == "cpu" else triton_e8p
    if (engine is triton_e8p and not x.is_cuda) or not engine.usable(codes, book):
        return None
    blocks = _blocks(name, bits, n)
    whole = n // book.dim
    y = engine.multiply(x[:, : whole * book.dim], codes, book, blocks.scale, whole, m)
    if tail is not None and blocks.tail_codebook is not None:
        rest = unpack_tail(tail, book, n, 0, m)
        points = blocks.tail_codebook.decode(rest[..., None])[..., 0]
        y += x[:, whole * book.dim :].float() @ points.T
    factor = scale.view(torch.bfloat16).to(y.dtype)[:, 0] if group else scale.view(y.dtype)
    return y.mul_(factor).to(x.dtype)


def status(device: torch.device, *, grouped: bool = False) -> str:
    """One line for a run's log: what multiplies with codes on this device, and why; ``grouped``
    where Q has scales per group of columns."""
    if grouped:
        return "products with codes: no kernel for scales per group of columns → torch decodes"
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return "products with E8P codes: " + ("Triton" if found else "no Triton → torch decodes")
    if device.type != "cpu":
        return f"products with codes: no kernel for {device.type} → torch decodes"
    if native.library(cpu.SOURCE) is None:
        why = "FIVEFOLD_NATIVE=0" if native.load(cpu.SOURCE)[0] else native.load(cpu.SOURCE)[1]
        return f"products with codes: {why} → torch decodes"
    return f"products with codes: {native.load(cpu.SOURCE)[1]}"
