"""E8P: 65 536 points near the E8 lattice, 2 bits per weight, with an exact fast encoder.   [QuIP# §4.2]

A point is ``sign * s + shift``: ``s`` one of 256 patterns of {1/2, 3/2, 5/2}^8, signs such that the
coordinate sum of ``sign * s`` is even, ``shift`` = +1/4 or -1/4 in every coordinate.

Code layout (16 bits): 15..8 pattern index, 7..1 signs of coordinates 7..1 (1 = negative),
bit 0 shift (0: +1/4, 1: -1/4). The sign of coordinate 0 follows from the even sum.

Patterns 0..226 are all vectors with squared norm <= 10, ordered by norm, then lexicographically; 227..255
have squared norm 12 (five entries 3/2, three 1/2).
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lplr_q.codebooks.base import Codebook, require_bits

# positions of the three entries 1/2 in the 29 patterns of squared norm 12  [QuIP#, published table]
_NORM_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)
_SHIFT = 0.25


@lru_cache(maxsize=1)
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
def _tables() -> dict[str, Tensor]:
    """Everything the encoder looks up, on the CPU."""
    patterns = e8p_patterns()
    digits = (patterns - 0.5).long()
    powers = 3 ** torch.arange(8)
    lookup = torch.full((3**8,), -1, dtype=torch.long)
    lookup[(digits * powers).sum(1)] = torch.arange(256)
    halves = torch.tensor([[int(c) for c in places] for places in _NORM_12.split()])
    mask = torch.zeros(29, 8)
    mask.scatter_(1, halves, 1.0)
    others = mask.eq(0).nonzero()[:, 1].reshape(29, 5)
    return {
        "patterns": patterns,
        "powers": powers,
        "lookup": lookup,
        "halves": halves,
        "others": others,
        "mask": mask,
        # seven permutation-invariant classes: k entries 3/2 (k = 0..4); one 5/2; one 5/2 and one 3/2
        "top": torch.tensor(
            [
                [0.5, 0.5, 0.5, 0.5],
                [1.5, 0.5, 0.5, 0.5],
                [1.5, 1.5, 0.5, 0.5],
                [1.5, 1.5, 1.5, 0.5],
                [1.5, 1.5, 1.5, 1.5],
                [2.5, 0.5, 0.5, 0.5],
                [2.5, 1.5, 0.5, 0.5],
            ]
        ),
        "norms": torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0, 8.0, 10.0]),
        "odd": torch.tensor([0, 1, 0, 1, 0, 0, 1]),  # parity of the coordinate sum of each class
    }


@lru_cache(maxsize=8)
def _tables_on(device: torch.device) -> dict[str, Tensor]:
    return {name: table.to(device) for name, table in _tables().items()}


@lru_cache(maxsize=8)
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


def _best_outside(
    a: Float[Tensor, "N 8"], odd_signs: Int64[Tensor, " N"], tables: dict[str, Tensor]
) -> tuple[Float[Tensor, "N 8"], Bool[Tensor, "N 8"]]:
    """Best pattern and forced sign flip for magnitudes whose lattice neighbour is not in the table.

    Maximises 2 a.s - |s|^2 (- 4 min_i a_i s_i when the sign parity is wrong). Within a
    permutation-invariant class the sorted assignment wins and the smallest magnitude is the one to flip,
    so seven class scores replace 227 patterns; the 29 patterns of norm 12 are searched.
    """
    ordered, order = a.topk(4, dim=1)
    smallest, where_smallest = a.min(dim=1)
    total = a.sum(1, keepdim=True)
    rest = total - ordered.sum(1, keepdim=True)
    scores = 2 * ordered @ tables["top"].T + rest - tables["norms"]
    wrong = (tables["odd"] + odd_signs[:, None]) % 2
    scores = scores - 2 * wrong * smallest[:, None]
    class_score, class_index = scores.max(1)

    outer = 3 * total - 2 * a @ tables["mask"].T - 12
    outer_wrong = odd_signs == 0  # the sum of a norm-12 pattern is 9
    least_half = a[:, tables["halves"]].amin(-1)
    least_other = a[:, tables["others"]].amin(-1)
    penalty = torch.minimum(2 * least_half, 6 * least_other)
    outer = outer - penalty * outer_wrong[:, None]
    outer_score, outer_index = outer.max(1)

    magnitude = torch.full_like(a, 0.5).scatter_(1, order, tables["top"][class_index])
    use_outer = outer_score > class_score
    magnitude = torch.where(use_outer[:, None], 1.5 - tables["mask"][outer_index], magnitude)
    is_wrong = torch.where(
        use_outer, outer_wrong.long(), wrong.gather(1, class_index[:, None])[:, 0]
    )
    place = torch.where(use_outer, (a * magnitude).argmin(1), where_smallest)
    flip = torch.zeros_like(a, dtype=torch.bool).scatter_(
        1, place[:, None], is_wrong[:, None].bool()
    )
    return magnitude, flip


def encode_e8p(x: Float[Tensor, "N 8"]) -> Int64[Tensor, " N"]:
    """Code of the nearest E8P point, exactly (ties broken arbitrarily).

    Per shift: round to half-integers; with an odd coordinate sum move the coordinate with the largest
    residual to its second nearest half-integer. If that lattice point is one of the patterns it is the nearest;
    the others go through a search over nine classes instead of 256 patterns.
    """
    tables = _tables_on(x.device)
    count = x.shape[0]
    shifted = torch.cat([x - _SHIFT, x + _SHIFT])
    a = shifted.abs()
    negative = shifted < 0
    odd_signs = negative.sum(1) % 2

    digit = a.floor()
    residual = a - digit - 0.5
    odd = (digit.sum(1).long() + odd_signs) % 2  # sum of digits = coordinate sum - 4
    gap, place = residual.abs().max(1, keepdim=True)
    moved = digit.gather(1, place) + torch.where(residual.gather(1, place) < 0, -1.0, 1.0)
    below = moved < 0  # second nearest is -1/2: same pattern, opposite sign
    apply = odd[:, None].bool()
    digit = digit.scatter(
        1, place, torch.where(apply, torch.where(below, 0.0, moved), digit.gather(1, place))
    )
    flip = torch.zeros_like(negative).scatter_(1, place, apply & below)

    inside = digit.amax(1) < 3
    key = (digit.clamp_max(2).long() * tables["powers"]).sum(1)
    pattern = torch.where(inside, tables["lookup"][key], -1)
    outside = (pattern < 0).nonzero()[:, 0]
    if outside.numel():
        magnitude, forced = _best_outside(a[outside], odd_signs[outside], tables)
        digit[outside] = magnitude - 0.5
        flip[outside] = forced
        key = ((magnitude - 0.5).long() * tables["powers"]).sum(1)
        pattern[outside] = tables["lookup"][key]

    negative = negative ^ flip
    signed = torch.where(negative, -(digit + 0.5), digit + 0.5)
    distance = (shifted - signed).square().sum(1)
    second = (distance[count:] < distance[:count]).long()
    chosen = torch.arange(count, device=x.device) + second * count
    weights = 2 ** torch.arange(8, device=x.device)
    weights[0] = 0  # implied by the parity
    return (pattern[chosen] << 8) + (negative[chosen].long() * weights).sum(1) + second


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
    streams = (16,)
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
