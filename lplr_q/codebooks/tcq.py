"""Trellis-coded quantisation: tiles of a matrix as closed walks through a bitshift trellis.
[QTIP §3]

Symbol b_t, t = c i + j, of a tile of r x c entries is the k-bit code of its entry (i, j). The
circle of symbols alone says every state (:mod:`lplr_q.codebooks.trellis`), so a matrix of m x n
weights costs k m n bits exactly. Rows left over make a tile of their own, a shorter circle.

QTIP's tiles are 16 x 16. Ours are 64 x 4: as long a circle, but LDLQ feeds the error back every
four columns instead of every sixteen, which the error shows (``tests/lplr_q/test_ldlq.py``). The C
search makes no difference between them; in torch alone, which walks all tiles of a block of columns
in step, LDLQ with ``tcq-16x16`` takes a quarter of the time.

The points table[s] are one of

- ``trained``: values trained on Gaussian samples (:mod:`lplr_q.codebooks.training`) for L = 8 and
  10; with L = 10 they err no more than 1mad with L = 12, whose search takes four times as long,
- ``1mad``: (sum of the four bytes of (34038481 s + 76625530) mod 2^32 - 510) / 147.8,
- ``3inst``: the sum of two half-precision numbers whose sign, mantissa and lowest exponent bits are
  bits of (89226354 s + 64248484) mod 2^32, xor those of 0.922,
- ``random``: 2^L standard normal numbers of a fixed seed.

Names: ``tcq[-L][-table][-ROWSxCOLUMNS]``; ``tcq`` is L = 10, trained, 64 x 4; where there is no
trained table the default is 1mad.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q import native
from lplr_q.codebooks.base import Codebook, require_bits, row_groups
from lplr_q.codebooks.training import TABLES, table_key
from lplr_q.codebooks.trellis import circles, windows
from lplr_q.constants import on_cpu
from workbench.errors import ConfigError
from workbench.storage import read_safetensors

# input scale: of computed tables over their standard deviation, near the least Gaussian error; of
# trained ones between the least Gaussian error (at 1) and the least error of LDLQ (0.9 to 0.95)
_SCALES = ({1: 1.1, 2: 0.95, 3: 0.9, 4: 0.85}, {1: 0.95, 2: 0.97, 3: 0.96, 4: 0.95})
KINDS = ("trained", "1mad", "3inst", "random")
TRAINED = (8, 10)
"""L of the trained tables."""
_NAME = re.compile(r"tcq(?:-(\d+))?(?:-(trained|1mad|3inst|random))?(?:-(\d+)x(\d+))?")


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


@lru_cache(maxsize=1)
@on_cpu
def _trained() -> dict[str, Tensor]:
    return {name: table.float() for name, table in read_safetensors(TABLES).items()}


@lru_cache(maxsize=32)
@on_cpu
def trellis_table(window: int, kind: str, bits: int = 2) -> Float[Tensor, " states"]:
    """The value of every state, float32; only trained ones depend on the bits per weight."""
    if kind == "trained":
        return _trained()[table_key(window, bits)]
    build = {"1mad": _one_mad, "3inst": _three_instructions, "random": _random}[kind]
    return build(window)


@lru_cache(maxsize=16)
def _table_on(window: int, kind: str, bits: int, device: torch.device) -> Tensor:
    return trellis_table(window, kind, bits).to(device)


class TrellisCodebook:
    """Trellis (L, k) with tail-biting over tiles of ``rows`` x ``dim`` entries.

    The first axis of what is encoded and decoded counts the rows of the matrix; axes between it and
    the last are separate blocks.
    """

    def __init__(
        self, name: str, bits: int, *, window: int, kind: str, tile: tuple[int, int] = (64, 4)
    ) -> None:
        require_bits(name, bits, (1, 2, 3, 4))
        if not 2 * bits <= window <= 16:
            raise ConfigError(
                f"codebook {name}: states of {window} bits at {bits} bits per weight; "
                f"choose {2 * bits} to 16"
            )
        if kind == "trained" and window not in TRAINED:
            raise ConfigError(
                f"codebook {name}: no trained table for states of {window} bits; "
                f"choose {' or '.join(map(str, TRAINED))}, or 1mad"
            )
        if tile[0] < 1 or 64 % tile[0] or tile[0] * tile[1] * bits < window:
            raise ConfigError(
                f"codebook {name}: tiles of {tile[0]} x {tile[1]}; use a divisor of 64 rows, and "
                f"at least {window} bits per tile"
            )
        self.name = name
        self.bits = float(bits)
        self.window = window
        self.kind = kind
        self.rows, self.dim = tile
        self.streams: tuple[int, ...] = (bits,) * self.dim
        spread = 1.0 if kind == "trained" else float(trellis_table(window, kind).double().std())
        self.opt_scale = _SCALES[kind == "trained"][bits] * spread

    def _tiles(self, x: Tensor) -> list[Tensor]:
        """(tiles, positions) of the tiles of each height."""
        parts, low = [], 0
        for count, height in row_groups(x.shape[0], self.rows):
            piece = x[low : low + count * height]
            split = piece.reshape(count, height, -1, self.dim).transpose(1, 2)
            parts.append(split.reshape(-1, height * self.dim))
            low += count * height
        return parts

    def _untile(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Inverse of :meth:`_tiles`."""
        joined = []
        for part, (count, height) in zip(parts, row_groups(like.shape[0], self.rows), strict=True):
            split = part.reshape(count, -1, height, self.dim).transpose(1, 2)
            joined.append(split.reshape(count * height, *like.shape[1:]))
        return torch.cat(joined)

    def encode(self, x: Float[Tensor, "m *blocks c"]) -> Int64[Tensor, "m *blocks c"]:
        """Symbols of a closed path near each tile."""
        if x.ndim == 1:
            return self.encode(x[None])[0]
        if not x.numel():
            return torch.empty(x.shape, dtype=torch.long, device=x.device)
        table = _table_on(self.window, self.kind, int(self.bits), x.device)
        return self._untile([circles(tile, table, int(self.bits)) for tile in self._tiles(x)], x)

    def decode(self, codes: Int64[Tensor, "m *blocks c"]) -> Float[Tensor, "m *blocks c"]:
        """Table lookup by the circular window of the last L bits."""
        if codes.ndim == 1:
            return self.decode(codes[None])[0]
        if not codes.numel():
            return torch.empty(codes.shape, device=codes.device)
        bits = int(self.bits)
        table = _table_on(self.window, self.kind, bits, codes.device)
        split = codes.reshape(codes.shape[0], -1, self.dim)
        points = native.trellis_points(split, table, bits, self.rows)
        if points is not None:
            return points.reshape(codes.shape)
        return self.torch_decode(codes)

    def torch_decode(self, codes: Int64[Tensor, "m *blocks c"]) -> Float[Tensor, "m *blocks c"]:
        """:meth:`decode` in torch, on any device."""
        table = _table_on(self.window, self.kind, int(self.bits), codes.device)
        states = [windows(tile, int(self.bits), self.window) for tile in self._tiles(codes)]
        return self._untile([table[state] for state in states], codes)


def parse_name(name: str) -> tuple[int, str, tuple[int, int]]:
    """(L, kind of table, tile) of ``tcq[-L][-kind][-RxC]``.

    >>> parse_name("tcq"), parse_name("tcq-8-random-16x16")
    ((10, 'trained', (64, 4)), (8, 'random', (16, 16)))
    """
    match = _NAME.fullmatch(name)
    if match is None:
        form = f"tcq[-L][-{'|'.join(KINDS)}][-ROWSxCOLUMNS]"
        raise ConfigError(f"codebook {name!r} is not of the form {form}")
    tile = (int(match[3]), int(match[4])) if match[3] else (64, 4)
    window = int(match[1] or 10)
    return window, match[2] or ("trained" if window in TRAINED else "1mad"), tile


def trellis_codebook(name: str, bits: int) -> Codebook:
    """The trellis codebook of this name."""
    window, kind, tile = parse_name(name)
    return TrellisCodebook(name, bits, window=window, kind=kind, tile=tile)
