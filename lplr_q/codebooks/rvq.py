"""Residual vector quantisation on top of E8P: 3 and 4 bits per weight.   [QuIP# §4.3]

    x^ = E8P(x) + C2((x - E8P(x)) * rho) / rho

3 bits: C2 = 256 short vectors of E8 (1 bit per weight), rho = 2.04, input scale 0.98, Gaussian MSE
0.0295. 4 bits: C2 = E8P itself, rho = 3.45, input scale 1.03, Gaussian MSE 0.0096.
The same rho is used by encoder and decoder.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.codebooks.base import require_bits
from lplr_q.codebooks.e8p import decode_e8p, encode_e8p
from lplr_q.constants import on_cpu


@lru_cache(maxsize=1)
@on_cpu
def e8_short_vectors() -> Float[Tensor, "256 8"]:
    """0, the 240 roots of E8, and the 15 vectors +-2 e_i except -2 e_7."""
    points = [[0.0] * 8]
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((1.0, -1.0), repeat=2):
            vector = [0.0] * 8
            vector[i], vector[j] = a, b
            points.append(vector)
    for signs in itertools.product((0.5, -0.5), repeat=8):
        if sum(s < 0 for s in signs) % 2 == 0:
            points.append(list(signs))
    for i in range(8):
        for value in (2.0, -2.0):
            if (i, value) != (7, -2.0):
                vector = [0.0] * 8
                vector[i] = value
                points.append(vector)
    return torch.tensor(points)


@lru_cache(maxsize=8)
def _short_on(device: torch.device) -> tuple[Tensor, Tensor]:
    points = e8_short_vectors().to(device)
    return points, points.square().sum(1) / 2


class ResidualE8PCodebook:
    """E8P and a second stage on the scaled residual."""

    name = "e8p"
    dim = 8

    def __init__(self, bits: int) -> None:
        require_bits(self.name, bits, (3, 4))
        self.bits = float(bits)
        self.streams: tuple[int, ...] = (16, 8) if bits == 3 else (16, 16)
        self.rho = 2.04 if bits == 3 else 3.45
        self.opt_scale = 0.98 if bits == 3 else 1.03

    def _encode_second(self, residual: Tensor) -> Tensor:
        if self.bits == 4:
            return encode_e8p(residual)
        points, half_norms = _short_on(residual.device)
        return (residual @ points.T - half_norms).argmax(1)

    def _decode_second(self, codes: Tensor) -> Tensor:
        return decode_e8p(codes) if self.bits == 4 else _short_on(codes.device)[0][codes]

    def encode(self, x: Float[Tensor, "*batch 8"]) -> Int64[Tensor, "*batch 2"]:
        """Nearest E8P point, then nearest second-stage point of the residual."""
        flat = x.reshape(-1, 8).float()
        first = encode_e8p(flat)
        second = self._encode_second((flat - decode_e8p(first)) * self.rho)
        return torch.stack([first, second], dim=-1).reshape(*x.shape[:-1], 2)

    def decode(self, codes: Int64[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 8"]:
        """Sum of both stages."""
        return decode_e8p(codes[..., 0]) + self._decode_second(codes[..., 1]) / self.rho
