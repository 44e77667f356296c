"""Quantisers of a tensor by itself, block by block: one interface for grids, levels and codebooks.

Every quantiser turns a tensor into codes and scales and back; scales are bfloat16 and rounded
before the codes are chosen, so what is stored is what was decided with. ``block`` consecutive
entries (row by row, 64 by default) share a scale; the last block may be shorter. At 16 bits the
tensor itself is kept in bfloat16.

    quantizer = make_quantizer("uniform-mse", bits=3)
    stored = quantizer.quantize(weight)
    weight_hat, bits_per_weight = quantizer.dequantize(stored), stored.bits_per_weight

=================== ================================================================================
name                grid
=================== ================================================================================
uniform             k / (2^(b-1) - 1) times the block's largest magnitude: 2^b - 1 levels, at 2 bits
                    only three, as in the published package; at 1 bit +- the mean magnitude
uniform-asymmetric  all 2^b levels from the smallest to the largest entry (0 included), zero point
rtn                 the same under its usual name
uniform-mse         uniform-asymmetric, range shrunk by 1 .. 0.5 (20 steps) for the least error
uniform-clipped     uniform, clipped at |mean| + 2.5 standard deviations of the block
normal-float        quantiles of a Gaussian scaled to the largest magnitude  [QLoRA, App. E]
lloyd-max           the levels of least error for a Gaussian, scaled to the block's rms
lattice             a codebook of ``CODEBOOKS`` (e8p unless said otherwise), one scale per matrix
=================== ================================================================================
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.bits import coded_bits
from lplr_q.codebooks.base import make_codebook, require_bits
from lplr_q.codebooks.scalar import lloyd_max_levels
from lplr_q.constants import on_cpu
from lplr_q.linalg.ldl import require_finite
from lplr_q.linalg.ldlq import CodebookBlocks
from workbench.errors import ConfigError, unknown_name

SHRINKS = 20
"""Range factors tried by the search for the least error, 1 down to 0.5."""
DEVIATIONS = 2.5
"""Where ``uniform-clipped`` cuts, in standard deviations beyond |mean|."""


@dataclass(frozen=True)
class QuantizedTensor:
    """What a quantiser stores of a tensor."""

    codes: Int64[Tensor, "..."]
    """One code per entry; streams of all blocks side by side for codebooks of several
    dimensions."""
    scales: Tensor
    """bfloat16, one per block; empty at 16 bits."""
    zeros: Int64[Tensor, " blocks"] | None
    """Codes that mean 0, for asymmetric grids."""
    shape: tuple[int, ...]
    bits: int
    """Bits of all that is stored: codes, scales and zero points."""

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of entries."""
        return self.bits / max(1, math.prod(self.shape))


class Quantizer(ABC):
    """A tensor to codes and back; deterministic, the input is never changed."""

    name = ""
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)

    def __init__(self, bits: int = 4, *, block: int = 64) -> None:
        require_bits(self.name, bits, (*self.widths, 16))
        if block < 1:
            raise ConfigError(f"block={block}; use at least 1 entry per scale")
        self.bits, self.block = bits, block

    def quantize(self, x: Float[Tensor, "*shape"]) -> QuantizedTensor:
        """Codes and scales of a tensor.

        Raises:
            DataError: non-finite entries.
        """
        require_finite("tensor to quantise", x)
        if self.bits == 16 or not x.numel():
            codes = x.detach().to(torch.bfloat16).view(torch.int16).long()
            empty = torch.empty(0, dtype=torch.bfloat16, device=x.device)
            return QuantizedTensor(codes, empty, None, tuple(x.shape), 16 * x.numel())
        return self._quantize(x.detach().float())

    def dequantize(self, stored: QuantizedTensor) -> Float[Tensor, "*shape"]:
        """The tensor that codes and scales stand for, float32."""
        if self.bits == 16 or not stored.codes.numel():
            return stored.codes.to(torch.int16).view(torch.bfloat16).float()
        return self._dequantize(stored)

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest representable tensor: quantised and back."""
        return self.dequantize(self.quantize(x))

    @abstractmethod
    def _quantize(self, x: Tensor) -> QuantizedTensor: ...

    @abstractmethod
    def _dequantize(self, stored: QuantizedTensor) -> Tensor: ...


class BlockQuantizer(Quantizer):
    """One scale (and zero point) per block of consecutive entries."""

    has_zeros = False

    @abstractmethod
    def fit(
        self, x: Float[Tensor, "blocks b"], real: Float[Tensor, "blocks b"]
    ) -> tuple[Float[Tensor, " blocks"], Int64[Tensor, " blocks"] | None]:
        """Scale and zero point of each block; ``real`` is 0 on the padding of the last one."""

    @abstractmethod
    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Int64[Tensor, "blocks b"]:
        """Codes of the entries under given scales, one column of them."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Entries of the codes."""

    def _blocks(self, flat: Tensor) -> Tensor:
        """(blocks, block); the last one is filled up with its own last entry."""
        missing = -flat.numel() % self.block
        if missing:
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        return flat.reshape(-1, self.block)

    def _quantize(self, x: Tensor) -> QuantizedTensor:
        flat = x.reshape(-1)
        blocks = self._blocks(flat)
        real = torch.ones_like(blocks)
        real.view(-1)[flat.numel() :] = 0
        scale, zero = self.fit(blocks, real)
        rounded = _column(_bfloat16(scale))
        codes = self.encode(blocks, rounded, None if zero is None else _column(zero))
        per_block = 16 + (self.bits if self.has_zeros else 0)
        return QuantizedTensor(
            codes.reshape(-1)[: flat.numel()].reshape(x.shape),
            rounded[:, 0].to(torch.bfloat16),
            zero,
            tuple(x.shape),
            flat.numel() * self.bits + len(blocks) * per_block,
        )

    def _dequantize(self, stored: QuantizedTensor) -> Tensor:
        zero = None if stored.zeros is None else _column(stored.zeros)
        blocks = self._blocks(stored.codes.reshape(-1))
        points = self.decode(blocks, _column(stored.scales.float()), zero)
        return points.reshape(-1)[: stored.codes.numel()].reshape(stored.shape)


def _column(x: Tensor) -> Tensor:
    return x[:, None]


def _bfloat16(scale: Tensor) -> Tensor:
    """Rounded to bfloat16, as float32; blocks of zeros have the least positive scale."""
    return scale.clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).float()


class UniformQuantizer(BlockQuantizer):
    """Equidistant levels, symmetric about 0 or from the smallest to the largest entry."""

    name = "uniform"

    def __init__(
        self,
        bits: int = 4,
        *,
        block: int = 64,
        asymmetric: bool = False,
        clip: Literal["none", "mse", "deviations"] = "none",
    ) -> None:
        super().__init__(bits, block=block)
        if clip not in ("none", "mse", "deviations"):
            raise ConfigError(f"clip={clip!r}; choose none, mse or deviations")
        self.has_zeros, self.clip = asymmetric, clip

    @property
    def levels(self) -> int:
        """How many different values a block can have."""
        return 2**self.bits if self.has_zeros or self.bits == 1 else 2**self.bits - 1

    def _range(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the grid of each block."""
        if self.has_zeros:
            low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
        elif self.bits == 1:  # two levels +-s: the mean magnitude errs least
            high = (x.abs() * real).sum(1) / real.sum(1)
            low = -high
        else:
            high = x.abs().amax(1)
            low = -high
        if self.clip == "deviations":
            count = real.sum(1)
            mean = (x * real).sum(1) / count
            spread = ((x - _column(mean)).square() * real).sum(1).div(count).sqrt()
            bound = mean.abs() + DEVIATIONS * spread
            low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
        return low, high

    def _scales(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.has_zeros:
            return high, None
        top = 2**self.bits - 1
        scale = _bfloat16((high - low) / top)
        return scale, (-low / scale).round().clamp(0, top).long()

    def fit(
        self, x: Float[Tensor, "blocks b"], real: Float[Tensor, "blocks b"]
    ) -> tuple[Float[Tensor, " blocks"], Int64[Tensor, " blocks"] | None]:
        """Range of the entries, clipped as asked."""
        low, high = self._range(x, real)
        scale, zero = self._scales(low, high)
        if self.clip != "mse":
            return scale, zero
        least = torch.full_like(scale, torch.inf)
        for step in range(SHRINKS):
            shrink = 1 - 0.5 * step / (SHRINKS - 1)
            tried, tried_zero = self._scales(low * shrink, high * shrink)
            column = _column(_bfloat16(tried))
            offset = None if tried_zero is None else _column(tried_zero)
            points = self.decode(self.encode(x, column, offset), column, offset)
            error = ((points - x).square() * real).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, tried, scale)
            if zero is not None and tried_zero is not None:
                zero = torch.where(better, tried_zero, zero)
        return scale, zero

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Int64[Tensor, "blocks b"]:
        """Nearest level."""
        if zero is not None:
            return ((x / scale).round() + zero).clamp(0, 2**self.bits - 1).long()
        if self.bits == 1:
            return (x >= 0).long()
        top = 2 ** (self.bits - 1) - 1
        return (x / scale * top).round().clamp(-top, top).long() + top

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Level times scale."""
        if zero is not None:
            return (codes - zero) * scale
        if self.bits == 1:
            return (2 * codes - 1) * scale
        top = 2 ** (self.bits - 1) - 1
        return (codes - top) / top * scale


class RTNQuantizer(UniformQuantizer):
    """Round-to-nearest as tables mean it: asymmetric min-max groups with all 2^b levels."""

    name = "rtn"

    def __init__(self, bits: int = 4, *, block: int = 64) -> None:
        super().__init__(bits, block=block, asymmetric=True)


def uniform_asymmetric(bits: int = 4, *, block: int = 64) -> UniformQuantizer:
    """All 2^b levels between the ends of each block."""
    return UniformQuantizer(bits, block=block, asymmetric=True)


def uniform_mse(bits: int = 4, *, block: int = 64) -> UniformQuantizer:
    """All 2^b levels, ends drawn in where that lowers the error."""
    return UniformQuantizer(bits, block=block, asymmetric=True, clip="mse")


def uniform_clipped(bits: int = 4, *, block: int = 64) -> UniformQuantizer:
    """Symmetric levels up to |mean| + 2.5 standard deviations.

    The published formula takes the mean with its sign, so a negative one cuts the wrong side off.
    """
    return UniformQuantizer(bits, block=block, clip="deviations")


class LevelQuantizer(BlockQuantizer):
    """Fixed levels times a scale per block."""

    @abstractmethod
    def levels(self) -> Float[Tensor, " levels"]:
        """The levels in ascending order."""

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Int64[Tensor, "blocks b"]:
        """Index of the nearest level."""
        levels = self.levels().to(x.device)
        return torch.bucketize(x / scale, (levels[1:] + levels[:-1]) / 2)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Level times scale."""
        return self.levels().to(codes.device)[codes] * scale


@lru_cache(maxsize=8)
@on_cpu
def normal_float_levels(bits: int) -> Float[Tensor, " levels"]:
    """Quantiles of a Gaussian, 2^(b-1) of them up to 0 and 2^(b-1) + 1 from 0 on, scaled to [-1, 1]
    with exact 0; the outermost have probability (1/30 + 1/32) / 2.   [QLoRA, App. E]"""
    delta = (1 / 30 + 1 / 32) / 2
    half = 2 ** (bits - 1)
    below = torch.linspace(delta, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - delta, half + 1, dtype=torch.float64)
    levels = torch.special.ndtri(torch.cat([below[:-1], above]))
    levels[half - 1] = 0.0
    return (levels / levels[-1]).float()


class NormalFloatQuantizer(LevelQuantizer):
    """Levels at the quantiles of a Gaussian, scaled to each block's largest magnitude."""

    name = "normal-float"
    widths = (2, 3, 4, 5, 6, 7, 8)

    def levels(self) -> Float[Tensor, " levels"]:
        """2^b levels in [-1, 1], 0 among them."""
        return normal_float_levels(self.bits)

    def fit(
        self, x: Float[Tensor, "blocks b"], real: Float[Tensor, "blocks b"]
    ) -> tuple[Float[Tensor, " blocks"], None]:
        """Largest magnitude."""
        return x.abs().amax(1), None


class LloydMaxQuantizer(LevelQuantizer):
    """The levels of least error for Gaussian entries, scaled to each block's rms."""

    name = "lloyd-max"

    def levels(self) -> Float[Tensor, " levels"]:
        """2^b levels for unit variance."""
        return lloyd_max_levels(self.bits).float()

    def fit(
        self, x: Float[Tensor, "blocks b"], real: Float[Tensor, "blocks b"]
    ) -> tuple[Float[Tensor, " blocks"], None]:
        """Root mean square."""
        return ((x.square() * real).sum(1) / real.sum(1)).sqrt(), None


class LatticeQuantizer(Quantizer):
    """Any codebook over the rows of a matrix, with one scale: the rms of all entries.

    Tensors of other than two axes count as matrices of their last axis.
    """

    name = "lattice"

    def __init__(self, bits: int = 2, *, block: int = 64, codebook: str = "e8p") -> None:
        super().__init__(bits, block=block)
        self.codebook = None if bits == 16 else make_codebook(codebook, bits)

    def _quantize(self, x: Tensor) -> QuantizedTensor:
        assert self.codebook is not None
        matrix = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        scale = _bfloat16(matrix.square().mean().sqrt()[None])
        blocks = CodebookBlocks(self.codebook, matrix.shape[1])
        codes = [
            blocks.quantise(matrix[:, low:high] / scale, k)[0]
            for k, (low, high) in enumerate(blocks.bounds)
        ]
        bits = coded_bits(*matrix.shape, self.codebook) + 16
        return QuantizedTensor(
            torch.cat(codes, dim=1), scale.to(torch.bfloat16), None, tuple(x.shape), bits
        )

    def _dequantize(self, stored: QuantizedTensor) -> Tensor:
        assert self.codebook is not None
        width = stored.shape[-1] if stored.shape else 1
        blocks = CodebookBlocks(self.codebook, width)
        streams = len(self.codebook.streams)
        slots = (width // self.codebook.dim) * streams
        whole = stored.codes[:, :slots].unflatten(1, (-1, streams)) if slots else None
        tail = stored.codes[:, slots:] if blocks.tail else None
        points = blocks.decode_packed(whole, tail) * stored.scales.float()
        return points.reshape(stored.shape)


_HERE = "lplr_q.utils.quantization"
QUANTIZERS: dict[str, str] = {
    "uniform": f"{_HERE}:UniformQuantizer",
    "uniform-asymmetric": f"{_HERE}:uniform_asymmetric",
    "uniform-mse": f"{_HERE}:uniform_mse",
    "uniform-clipped": f"{_HERE}:uniform_clipped",
    "rtn": f"{_HERE}:RTNQuantizer",
    "normal-float": f"{_HERE}:NormalFloatQuantizer",
    "lloyd-max": f"{_HERE}:LloydMaxQuantizer",
    "lattice": f"{_HERE}:LatticeQuantizer",
}
"""name -> "module:factory"; a factory takes the bits and, by name, ``block`` and its own
options."""


def make_quantizer(name: str, bits: int, *, block: int = 64, **options: Any) -> Quantizer:
    """The quantiser by registry name or ``module:factory``.

    Raises:
        ConfigError: unknown name, bits it does not have, options it does not know.
    """
    target = QUANTIZERS.get(name, name)
    if ":" not in target:
        raise unknown_name("quantizer", name, QUANTIZERS)
    module, _, factory = target.partition(":")
    try:
        build: Callable[..., Quantizer] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"quantizer {target!r} cannot be imported: {error}") from None
    try:
        return build(bits, block=block, **options)
    except TypeError as error:
        raise ConfigError(f"quantizer {name} with {options}: {error}") from None


@dataclass(frozen=True)
class QuantizerFactory:
    """A method with its settings, to be asked for a quantiser of any width."""

    method: str = "uniform"
    """Name in ``QUANTIZERS`` or ``module:factory``."""
    block_size: int = 64
    """Entries per scale."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the method takes, e.g. ``{"codebook": "tcq"}`` for ``lattice``."""

    def get_quantizer(self, num_bits: int) -> Quantizer:
        """The quantiser of ``num_bits`` per entry; 16 keeps bfloat16."""
        return make_quantizer(self.method, num_bits, block=self.block_size, **self.options)
