"""E8P: 65 536 points near the E8 lattice, 2 bits per weight, with an exact fast encoder.
[QuIP# §4.2]

A point is ``sign * s + shift``: ``s`` one of 256 patterns of {1/2, 3/2, 5/2}^8, signs such that the
coordinate sum of ``sign * s`` is even, ``shift`` = +1/4 or -1/4 in every coordinate.

Code layout (16 bits): 15..8 pattern index, 7..1 signs of coordinates 7..1 (1 = negative),
bit 0 shift (0: +1/4, 1: -1/4). The sign of coordinate 0 follows from the even sum.

Patterns 0..226 are all vectors with squared norm <= 10, ordered by norm, then lexicographically;
227..255 have squared norm 12 (five entries 3/2, three 1/2).
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q import native
from lplr_q.codebooks.base import Codebook, require_bits
from lplr_q.constants import on_cpu

# positions of the three entries 1/2 in the 29 patterns of squared norm 12  [QuIP#, published table]
_NORM_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)
_SHIFT = 0.25


@lru_cache(maxsize=1)
@on_cpu
def e8p_patterns() -> Float[Tensor, "256 8"]:
    """The 256 non-negative half-integer patterns."""
    inner = [p for p in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in p) <= 10]
    inner.sort(key=lambda p: (sum(v * v for v in p), p))
    outer = []
    for places in _NORM_12.split():
        pattern = [1.5] * 8
        for place in places:
            pattern[int(place)] = 0.5
        outer.append(tuple(pattern))
    return torch.tensor(inner + outer, dtype=torch.float32)


@lru_cache(maxsize=1)
@on_cpu
def _tables() -> dict[str, Tensor]:
    """Everything the encoder looks up, on the CPU."""
    patterns = e8p_patterns()
    powers = 3.0 ** torch.arange(8)
    lookup = torch.full((3**8,), -1, dtype=torch.long)
    lookup[((patterns - 0.5) @ powers).long()] = torch.arange(256)
    halves = torch.tensor([[int(c) for c in places] for places in _NORM_12.split()])
    mask = torch.zeros(29, 8)
    mask.scatter_(1, halves, 1.0)
    others = mask.eq(0).nonzero()[:, 1].reshape(29, 5)
    # seven permutation-invariant classes, sorted: k entries 3/2 (k = 0..4); 5/2; 5/2 and 3/2
    tops = [[], [1.5], [1.5] * 2, [1.5] * 3, [1.5] * 4, [2.5], [2.5, 1.5]]
    classes = torch.tensor([top + [0.5] * (8 - len(top)) for top in tops])
    sign_bits = 2.0 ** torch.arange(8)
    sign_bits[0] = 0  # implied by the parity
    return {
        "patterns": patterns,
        "powers": powers,
        "lookup": lookup,
        "halves": halves,
        "others": others,
        "mask": mask,
        "classes": classes,
        "gain": 2 * classes.T.contiguous(),
        "norms": classes.square().sum(1),
        "odd": classes.sum(1).long() & 1,
        "sign_bits": sign_bits,
        "axis": torch.arange(8)[:, None],
    }


@lru_cache(maxsize=1)
@on_cpu
def _native_tables() -> tuple[Tensor, Tensor]:
    tables = _tables()
    return tables["patterns"].contiguous(), tables["lookup"].to(torch.int16)


@lru_cache(maxsize=8)
def _tables_on(device: torch.device) -> dict[str, Tensor]:
    return {name: table.to(device) for name, table in _tables().items()}


@lru_cache(maxsize=8)
@on_cpu
def _decode_table(device: torch.device) -> Float[Tensor, "65536 8"]:
    codes = torch.arange(65536)
    magnitude = e8p_patterns()[codes >> 8]
    negative = torch.zeros(65536, 8, dtype=torch.long)
    for place in range(1, 8):
        negative[:, place] = (codes >> place) & 1
    # parity of sum(sign * s) = sum(s) + number of negatives (every 2 s_i is odd)
    negative[:, 0] = (magnitude.sum(1).long() + negative.sum(1)) % 2
    shift = _SHIFT * (1 - 2 * (codes & 1)).float()
    return (magnitude * (1 - 2 * negative) + shift[:, None]).to(device)


def _search_norm_12(
    a: Float[Tensor, "N 8"], wrong: Float[Tensor, " N"], tables: dict[str, Tensor]
) -> tuple[Float[Tensor, " N"], Int64[Tensor, " N"]]:
    """Best score and index among the 29 patterns of norm 12 (entries 3/2, three of them 1/2)."""
    score = 3 * a.sum(1, keepdim=True) - 2 * a @ tables["mask"].T - 12
    least_half, least_other = a[:, tables["halves"]].amin(-1), a[:, tables["others"]].amin(-1)
    score = score - torch.minimum(2 * least_half, 6 * least_other) * wrong[:, None]
    return score.max(1)


def _best_outside(
    y: Float[Tensor, "N 8"], tables: dict[str, Tensor]
) -> tuple[Float[Tensor, "N 8"], Int64[Tensor, " N"]]:
    """Nearest signed pattern, and its index, for points whose lattice neighbour is not in the
    table.

    Maximises 2 |y|.s - |s|^2 (- 4 min_i |y_i| s_i when the sign parity is wrong). Within a
    permutation-invariant class the sorted assignment wins and the smallest magnitude is the one to
    flip, so seven class scores replace 227 patterns; the 29 patterns of norm 12 are searched only
    where their best conceivable score exceeds that of the classes.
    """
    a = y.abs()
    ordered, order = a.sort(dim=1, descending=True)
    total = a.sum(1, keepdim=True)
    odd_signs = (y < 0).sum(1, keepdim=True) & 1
    scores = ordered @ tables["gain"] - tables["norms"]
    scores = scores - 2 * (tables["odd"] ^ odd_signs) * ordered[:, 7:]
    best, index = scores.max(1)
    magnitude = torch.empty_like(a).scatter_(1, order, tables["classes"][index])

    ceiling = 3 * total[:, 0] - 2 * ordered[:, 5:].sum(1) - 12
    rows = (ceiling > best).nonzero()[:, 0]
    if rows.numel():
        wrong = (1 - odd_signs[rows, 0]).to(a.dtype)  # the sum of these patterns is 9
        outer, outer_index = _search_norm_12(a[rows], wrong, tables)
        better = outer > best[rows]
        magnitude[rows[better]] = 1.5 - tables["mask"][outer_index[better]]

    parity = (magnitude.sum(1, keepdim=True).long() + odd_signs) & 1
    place = (a * magnitude).argmin(1, keepdim=True)
    signed = magnitude.copysign(y)
    signed.scatter_(1, place, signed.gather(1, place) * (1 - 2 * parity))
    return signed, tables["lookup"][((magnitude - 0.5) @ tables["powers"]).long()]


def encode_e8p(x: Float[Tensor, "N 8"]) -> Int64[Tensor, " N"]:
    """Code of the nearest E8P point, exactly (ties broken arbitrarily), in C where there is a
    compiler."""
    found = native.e8p_encode(x, *_native_tables()) if x.device.type == "cpu" else None
    return torch_encode_e8p(x) if found is None else found


def torch_encode_e8p(x: Float[Tensor, "N 8"]) -> Int64[Tensor, " N"]:
    """:func:`encode_e8p` in torch, on any device.

    Per shift: round to half-integers; with an odd coordinate sum move the coordinate with the
    largest residual to its second nearest half-integer. If the magnitudes of that lattice point are
    one of the patterns it is the nearest. The others are searched only where the lattice point, a
    lower bound of their distance, is nearer than what the other shift already offers.
    """
    tables = _tables_on(x.device)
    count = x.shape[0]
    columns = x.T
    y = torch.cat([columns - _SHIFT, columns + _SHIFT], dim=1)  # 8 x 2N: reductions run along N
    point = y.floor() + 0.5
    residual = y - point
    odd = torch.remainder(point.sum(0), 2)
    _, place = residual.abs().max(0)
    point += torch.where(tables["axis"] == place, odd.copysign(residual), 0.0)
    distance = (y - point).square().sum(0)

    magnitude = point.abs()
    inside = magnitude.amax(0) < 3
    key = (tables["powers"] @ (magnitude.clamp_max(2.5) - 0.5)).long()
    pattern = torch.where(inside, tables["lookup"][key], -1)
    missing = pattern < 0
    offered = torch.where(missing, torch.inf, distance)
    other = torch.cat([offered[count:], offered[:count]])
    rows = (missing & (distance < other)).nonzero()[:, 0]
    if rows.numel():
        wanted = y[:, rows]
        signed, pattern[rows] = _best_outside(wanted.T.contiguous(), tables)
        point[:, rows] = signed.T
        offered[rows] = (wanted - signed.T).square().sum(0)

    second = (offered[count:] < offered[:count]).long()
    chosen = torch.arange(count, device=x.device) + second * count
    negative = (point[:, chosen] < 0).to(x.dtype)
    return (pattern[chosen] << 8) + (tables["sign_bits"] @ negative).long() + second


def decode_e8p(codes: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch 8"]:
    """Points of 16-bit codes, float32."""
    return _decode_table(codes.device)[codes]


def reference_encode_e8p(x: Float[Tensor, "N 8"]) -> Int64[Tensor, " N"]:
    """Nearest E8P point by scoring all 256 patterns for both shifts: the plain form."""
    patterns = e8p_patterns().to(x.device)
    best = torch.full((x.shape[0],), float("inf"), device=x.device)
    result = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    for bit, shift in enumerate((_SHIFT, -_SHIFT)):
        y = x - shift
        a = y.abs()
        wrong = ((patterns.sum(1).long()[None] + (y < 0).sum(1, keepdim=True)) % 2).bool()
        cheapest = (a[:, None, :] * patterns).amin(-1)
        score = 2 * a @ patterns.T - patterns.square().sum(1) - 4 * cheapest * wrong
        value, index = score.max(1)
        place = (a * patterns[index]).argmin(1, keepdim=True)
        flip = torch.zeros_like(y, dtype=torch.bool).scatter_(
            1, place, wrong.gather(1, index[:, None])
        )
        negative = (y < 0) ^ flip
        weights = 2 ** torch.arange(8, device=x.device)
        weights[0] = 0
        code = (index << 8) + (negative.long() * weights).sum(1) + bit
        distance = a.square().sum(1) - value
        result = torch.where(distance < best, code, result)
        best = torch.minimum(distance, best)
    return result


class E8PCodebook:
    """E8P at 2 bits per weight; Gaussian MSE 0.0913 at scale 1.03."""

    name = "e8p"
    bits = 2.0
    dim = 8
    streams: tuple[int, ...] = (16,)
    opt_scale = 1.03

    def encode(self, x: Float[Tensor, "*batch 8"]) -> Int64[Tensor, "*batch 1"]:
        """Exact nearest point."""
        return encode_e8p(x.reshape(-1, 8).float()).reshape(*x.shape[:-1], 1)

    def decode(self, codes: Int64[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 8"]:
        """Table lookup."""
        return decode_e8p(codes[..., 0])


def e8p_codebook(bits: int) -> Codebook:
    """E8P at 2 bits, its residual extensions at 3 and 4."""
    from lplr_q.codebooks.rvq import ResidualE8PCodebook

    require_bits("e8p", bits, (2, 3, 4))
    return E8PCodebook() if bits == 2 else ResidualE8PCodebook(bits)
