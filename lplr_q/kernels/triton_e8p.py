"""Products of a few activations with E8P codes on CUDA, in Triton.

Every program decodes a tile of codes by table (65 536 points, 1 MB of float16: it stays in the
cache) and multiplies at once; the dense matrix is never written. Triton comes with torch on CUDA;
without it the codes are decoded by torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.codebooks.base import Codebook
from lplr_q.codebooks.e8p import E8PCodebook, decode_e8p
from lplr_q.codebooks.rvq import ResidualE8PCodebook, e8_short_vectors

tl: Any = None  # triton.language, once the kernel was asked for


def usable(codes: list[Tensor], book: Codebook) -> bool:
    """Whether there is a kernel for this codebook, and Triton to compile it."""
    known = isinstance(book, E8PCodebook | ResidualE8PCodebook)
    return known and bool(codes) and importlib.util.find_spec("triton") is not None


def _rows(  # noqa: PLR0913 - what the kernel reads, and its tile
    x, first, second, points, more, y, blocks, m, width, inverse_rho,
    STAGES: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[b, i] = sum_k < x[b, k], points[first[i, k]] + more[second[i, k]] / rho >."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1)
    lane = tl.arange(0, 8)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, blocks, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        place = row[:, None].to(tl.int64) * blocks + k[None, :]
        inside = (row[:, None] < m) & (k[None, :] < blocks)
        code = tl.load(first + place, mask=inside, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(points + code[:, :, None] * 8 + lane[None, None, :]).to(tl.float32)
        if STAGES == 2:
            code = tl.load(second + place, mask=inside, other=0).to(tl.int32) & MASK
            rest = tl.load(more + code[:, :, None] * 8 + lane[None, None, :]).to(tl.float32)
            value += rest * inverse_rho
        at = batch * width + k[:, None] * 8 + lane[None, :]
        part = tl.load(x + at, mask=k[:, None] < blocks, other=0.0).to(tl.float32)
        total += tl.sum(value * part[None, :, :], axis=2)
    tl.store(y + batch * m + row, tl.sum(total, axis=1), mask=row < m)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    global tl  # the kernel's source names it
    triton: Any = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    return triton.jit(_rows)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Points of the first and of an 8-bit second stage; exact in float16."""
    points = decode_e8p(torch.arange(65536, device=device)).half().contiguous()
    return points, e8_short_vectors().to(device).half().contiguous()


def multiply(
    x: Float[Tensor, "batch width"],
    codes: list[Tensor],
    book: Codebook,
    scale: float,
    blocks: int,
    m: int,
    *,
    rows: int = 16,
    columns: int = 16,
) -> Float[Tensor, "batch m"]:
    """x W^T for the whole blocks, float32, in unit-rms units."""
    x = x.contiguous()
    points, shorts = _tables(x.device)
    second = codes[1] if len(codes) > 1 else codes[0]
    wide = second.element_size() == 2
    out = torch.empty(x.shape[0], m, dtype=torch.float32, device=x.device)
    grid = (-(-m // rows), x.shape[0])
    _compiled()[grid](
        x, codes[0], second, points, points if wide else shorts, out, blocks, m, x.shape[1],
        1 / book.rho if isinstance(book, ResidualE8PCodebook) else 1.0,
        STAGES=len(codes), MASK=0xFFFF if wide else 0xFF, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return out / scale
