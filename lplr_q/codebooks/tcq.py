"""Trellis-coded quantisation: 16 x 16 tiles of a matrix as closed walks through a bitshift trellis.
[QTIP §3]

Symbol b_t, t = 16 (i mod 16) + j, of a tile is the k-bit code of its entry (i mod 16, j). The
circle of 256 symbols alone says every state (:mod:`lplr_q.codebooks.trellis`), so a matrix of m x n
weights costs k m n bits exactly. Rows that do not fill a tile make a shorter circle.

The points table[s] are one of

- ``1mad``: (sum of the four bytes of (34038481 s + 76625530) mod 2^32 - 510) / 147.8,
- ``3inst``: the sum of two half-precision numbers whose sign, mantissa and lowest exponent bits are
  bits of (89226354 s + 64248484) mod 2^32, the others those of 0.922,
- ``random``: 2^L standard normal numbers of a fixed seed.

Names: ``tcq`` (L = 10, 1mad), ``tcq-8``, ``tcq-12``, ``tcq-8-random``, ``tcq-10-3inst`` ...
Gaussian MSE at 2 bits with 1mad: see ``tests/lplr_q/test_tcq.py``; the bound is 4^-bits.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.codebooks.base import Codebook, require_bits
from lplr_q.codebooks.trellis import circles, windows
from lplr_q.constants import on_cpu
from workbench.errors import ConfigError

KINDS = ("1mad", "3inst", "random")
_NAME = re.compile(r"tcq(?:-(\d+))?(?:-(1mad|3inst|random))?")


def _hash(window: int, factor: int, shift: int) -> Int64[Tensor, " states"]:
    return (torch.arange(1 << window) * factor + shift) % (1 << 32)


def _one_mad(window: int) -> Float[Tensor, " states"]:
    bits = _hash(window, 34038481, 76625530)
    total = sum((bits >> (8 * byte)) & 255 for byte in range(4))
    return (total - 510).float() / 147.8


def _three_instructions(window: int) -> Float[Tensor, " states"]:
    bits = _hash(window, 89226354, 64248484)
    magic = int(torch.tensor(0.922, dtype=torch.float16).view(torch.int16))
    halves = [(((bits >> shift) & 0x8FFF) ^ magic) for shift in (0, 16)]
    stored = torch.stack([torch.where(h >= 1 << 15, h - (1 << 16), h) for h in halves])
    return stored.to(torch.int16).view(torch.float16).float().sum(0)


def _random(window: int) -> Float[Tensor, " states"]:
    generator = torch.Generator().manual_seed(0x7C9)
    return torch.randn(1 << window, generator=generator)


@lru_cache(maxsize=16)
@on_cpu
def trellis_table(window: int, kind: str) -> Float[Tensor, " states"]:
    """The value of every state, float32."""
    build = {"1mad": _one_mad, "3inst": _three_instructions, "random": _random}[kind]
    return build(window)


@lru_cache(maxsize=16)
def _table_on(window: int, kind: str, device: torch.device) -> Tensor:
    return trellis_table(window, kind).to(device)


class TrellisCodebook:
    """Trellis (L, k) with tail-biting over tiles of ``rows`` x ``dim`` entries.

    The first axis of what is encoded and decoded counts the rows of the matrix; axes between it and
    the last are separate blocks.
    """

    dim = 16
    rows = 16

    def __init__(self, name: str, bits: int, *, window: int, kind: str) -> None:
        require_bits(name, bits, (1, 2, 3, 4))
        if not 2 * bits <= window <= 16:
            raise ConfigError(
                f"codebook {name}: states of {window} bits at {bits} bits per weight; "
                f"choose {2 * bits} to 16"
            )
        self.name = name
        self.bits = float(bits)
        self.window = window
        self.kind = kind
        self.streams: tuple[int, ...] = (bits,) * self.dim
        spread = float(trellis_table(window, kind).double().std(correction=0))
        self.opt_scale = 0.95 * spread

    def _check(self, rows: int) -> None:
        need = -(-self.window // int(self.bits))
        if min(rows, self.rows) * self.dim < need:
            raise ConfigError(
                f"codebook {self.name}: a tile of {rows} x {self.dim} entries is shorter than "
                f"the {need} symbols of a state"
            )

    def _tiles(self, x: Tensor) -> list[Tensor]:
        """(tiles, positions) of the whole tiles, then of the ragged one."""
        m = x.shape[0]
        whole = m - m % self.rows
        parts = []
        for piece, height in ((x[:whole], self.rows), (x[whole:], m - whole)):
            if piece.numel():
                split = piece.reshape(-1, height, *x.shape[1:])
                parts.append(split.movedim(1, -2).reshape(-1, height * self.dim))
        return parts

    def _untile(self, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Inverse of :meth:`_tiles`."""
        joined = []
        for part in parts:
            height = part.shape[1] // self.dim
            split = part.reshape(-1, *shape[1:-1], height, self.dim)
            joined.append(split.movedim(-2, 1).reshape(-1, *shape[1:]))
        return torch.cat(joined) if joined else torch.empty(shape)

    def encode(self, x: Float[Tensor, "m *blocks 16"]) -> Int64[Tensor, "m *blocks 16"]:
        """Symbols of a closed path near each tile."""
        if x.ndim == 1:
            return self.encode(x[None])[0]
        self._check(x.shape[0] % self.rows or self.rows)
        table = _table_on(self.window, self.kind, x.device)
        parts = [circles(tile, table, int(self.bits)) for tile in self._tiles(x)]
        return self._untile(parts, tuple(x.shape))

    def decode(self, codes: Int64[Tensor, "m *blocks 16"]) -> Float[Tensor, "m *blocks 16"]:
        """Table lookup by the circular window of the last L bits."""
        if codes.ndim == 1:
            return self.decode(codes[None])[0]
        table = _table_on(self.window, self.kind, codes.device)
        states = [windows(tile, int(self.bits), self.window) for tile in self._tiles(codes)]
        return self._untile([table[state] for state in states], tuple(codes.shape))


@lru_cache(maxsize=64)
def parse_name(name: str) -> tuple[int, str]:
    """(L, kind of table) of ``tcq[-L][-kind]``.

    >>> parse_name("tcq"), parse_name("tcq-8-random")
    ((10, '1mad'), (8, 'random'))
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"codebook {name!r} is not of the form tcq[-L][-{'|'.join(KINDS)}]")
    return int(match[1] or 10), match[2] or "1mad"


def trellis_codebook(name: str, bits: int) -> Codebook:
    """The trellis codebook of this name."""
    window, kind = parse_name(name)
    return TrellisCodebook(name, bits, window=window, kind=kind)
