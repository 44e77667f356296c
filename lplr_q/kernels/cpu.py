"""Rows of E8P and trellis codes in C: decoded, or multiplied with a few activations as they are.

``kernels/rows.c`` is compiled at first use (:mod:`lplr_q.native`); where that is impossible
the functions return None and torch does the work with the same values.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q import native
from lplr_q.codebooks.base import Codebook, rows_of
from lplr_q.codebooks.e8p import E8PCodebook, e8p_patterns
from lplr_q.codebooks.rvq import ResidualE8PCodebook, e8_short_vectors
from lplr_q.codebooks.tcq import TrellisCodebook, trellis_table
from lplr_q.constants import on_cpu

SOURCE = Path(__file__).with_name("rows.c")
_POINTER, _FLOAT, _LONG = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64


class _Lattice(ctypes.Structure):
    _fields_ = (
        ("first", _POINTER),
        ("second", _POINTER),
        ("second_bits", ctypes.c_int32),
        ("rho", _FLOAT),
        ("patterns", _POINTER),
        ("flips", _POINTER),
        ("parity", _POINTER),
        ("shorts", _POINTER),
        ("scale", _FLOAT),
    )


class _Trellis(ctypes.Structure):
    _fields_ = (
        ("packed", _POINTER),
        ("bytes", _LONG),
        ("values", _POINTER),
        ("bits", ctypes.c_int32),
        ("span", ctypes.c_int32),
        ("tall", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("scale", _FLOAT),
    )


@lru_cache(maxsize=1)
@on_cpu
def _lattice_tables() -> dict[str, Tensor]:
    """Magnitudes, sign bits by (7 bits of the code, parity), parity of each pattern, short
    vectors."""
    patterns = e8p_patterns().contiguous()
    index = torch.arange(256)
    negative = torch.zeros(256, 8, dtype=torch.long)
    for place in range(1, 8):
        negative[:, place] = (index >> (place - 1)) & 1
    negative[:, 0] = (negative[:, 1:].sum(1) + (index >> 7)) % 2
    flips = torch.where(negative.bool(), -(2**31), 0).to(torch.int32).contiguous()
    parity = ((patterns.sum(1).long() % 2) * 128).to(torch.int32).contiguous()
    shorts = e8_short_vectors().float().contiguous()
    return {"patterns": patterns, "flips": flips, "parity": parity, "shorts": shorts}


@lru_cache(maxsize=32)
@on_cpu
def _trellis_values(window: int, kind: str, bits: int) -> tuple[Tensor, int]:
    """Value by the last ``span`` symbols, the oldest in the lowest bits; span."""
    span = -(-window // bits)
    index = torch.arange(1 << (span * bits))
    state = torch.zeros_like(index)
    for symbol in range(span):
        value = (index >> (symbol * bits)) & ((1 << bits) - 1)
        state = state | (value << ((span - 1 - symbol) * bits))
    table = trellis_table(window, kind, bits)
    return table[state & ((1 << window) - 1)].contiguous(), span


def _lattice(codes: list[Tensor], book: Codebook, scale: float) -> _Lattice:
    tables = _lattice_tables()
    second = codes[1] if len(codes) > 1 else None
    residual = isinstance(book, ResidualE8PCodebook)
    return _Lattice(
        codes[0].data_ptr(),
        None if second is None else second.data_ptr(),
        0 if second is None else 8 * second.element_size(),
        book.rho if residual else 1.0,
        tables["patterns"].data_ptr(),
        tables["flips"].data_ptr(),
        tables["parity"].data_ptr(),
        tables["shorts"].data_ptr(),
        scale,
    )


def usable(codes: list[Tensor], book: Codebook) -> bool:
    """Whether there is C code for this codebook and these tensors, and it was compiled."""
    if not codes or any(c.device.type != "cpu" or not c.is_contiguous() for c in codes):
        return False
    if isinstance(book, TrellisCodebook):
        if len(book.streams) * int(book.bits) > 32 or book.window > 16:
            return False
    elif not isinstance(book, E8PCodebook | ResidualE8PCodebook):
        return False
    return native.library(SOURCE) is not None


def _run(
    codes: list[Tensor],
    book: Codebook,
    scale: float,
    blocks: int,
    rows: tuple[int, int, int],
    x: Tensor | None,
    out: Tensor,
) -> None:
    """Fill ``out`` with the rows low..high of m, or with their products with x."""
    m, low, high = rows
    kernels = native.library(SOURCE)
    assert kernels is not None
    if isinstance(book, TrellisCodebook):
        values, span = _trellis_values(book.window, book.kind, int(book.bits))
        tall, wide = rows_of(book), book.dim
        form = _Trellis(
            codes[0].data_ptr(), codes[0].numel(), values.data_ptr(), int(book.bits), span, tall,
            wide, scale,
        )  # fmt: skip
        function = kernels.trellis_rows
    else:
        form = _lattice(codes, book, scale)
        function = kernels.lattice_rows
    width = blocks * book.dim
    batch = 0 if x is None else x.shape[0]

    def work(start: int, end: int) -> int:
        offset = 0 if x is not None else start * width * 4
        return function(
            ctypes.byref(form),
            _LONG(blocks),
            _LONG(m),
            _LONG(low + start),
            _LONG(low + end),
            _POINTER(None if x is None else x.data_ptr()),
            _LONG(batch),
            _POINTER(out.data_ptr() + offset),
        )

    if any(native.in_threads(work, high - low, 64)):
        raise MemoryError(f"no memory for a row of {width} weights")


def decode(
    codes: list[Tensor], book: Codebook, scale: float, blocks: int, rows: tuple[int, int, int]
) -> Float[Tensor, "rows width"]:
    """Rows (m, low, high) of the whole blocks in unit-rms units, float32."""
    out = torch.empty(rows[2] - rows[1], blocks * book.dim)
    _run(codes, book, scale, blocks, rows, None, out)
    return out


def multiply(
    x: Float[Tensor, "batch width"],
    codes: list[Tensor],
    book: Codebook,
    scale: float,
    blocks: int,
    m: int,
) -> Float[Tensor, "batch m"]:
    """x W^T for the whole blocks, float32."""
    x = x.to(torch.float32).contiguous()
    out = torch.empty(x.shape[0], m)
    _run(codes, book, scale, blocks, (m, 0, m), x, out)
    return out
