"""Hyena: gates around a long convolution whose filter is a small network of time.

    y = h ∗ (x₂ ⊙ v) + b ⊙ x₂ ⊙ v,   out = W_o (x₁ ⊙ y)         [arXiv 2302.10866, order 2]
    multi-head: y_ab = h ∗ (v_a x₂_b) per group, out_b = Σ_a x₁_a y_ab     [arXiv 2403.17844]

The convolution has two exact forms. With T[t, s] = h[t − s] for t ≥ s, the multi-head layer is
((X₁ Vᵀ) ⊙ T) X₂: masked linear attention whose decay is a learned Toeplitz matrix.

Glossary: W inner channels, g groups, n channels of a group, L time.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.layer import Layer, head_width
from workbench.errors import ConfigError

TOEPLITZ_UP_TO = {"hyena": 32, "mh-hyena": 1024}
"""Longest sequence for which `kernel="auto"` takes the quadratic form."""


def toeplitz(h: Float[Tensor, "channels time"]) -> Float[Tensor, "channels time time"]:
    """T[c, t, s] = h[c, t − s] for t ≥ s and 0 above the diagonal."""
    length = h.shape[-1]
    # padded[i] = h[i − (L − 1)], so window t holds h[t − L + 1 … t] and its mirror image is row t
    return F.pad(h, (length - 1, 0)).unfold(-1, length, 1).flip(-1)


def convolve_fft(
    u: Float[Tensor, "*axes channels time"], h: Float[Tensor, "channels time"]
) -> Float[Tensor, "*axes channels time"]:
    """Causal convolution y[t] = Σ_{s ≤ t} h[t − s] u[s] in O(L log L), always in float32 or 64."""
    length = u.shape[-1]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    spectrum = torch.fft.rfft(u.to(wide), n=2 * length) * torch.fft.rfft(h.to(wide), n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].to(u.dtype)


def convolve_toeplitz(
    u: Float[Tensor, "batch channels time"], h: Float[Tensor, "channels time"]
) -> Float[Tensor, "batch channels time"]:
    """The same as a matrix product per channel, O(L²) and exact in any precision."""
    return torch.einsum("cts,bcs->bct", toeplitz(h), u)


def mix_heads_fft(
    x1: Float[Tensor, "batch groups time size"],
    x2: Float[Tensor, "batch groups time size"],
    v: Float[Tensor, "batch groups time size"],
    h: Float[Tensor, "groups time"],
) -> Float[Tensor, "batch groups time size"]:
    """out_b[t] = Σ_a x₁_a[t] (h ∗ v_a x₂_b)[t], the outer products convolved one by one."""
    products = torch.einsum("bgsi,bgsj->bijgs", v, x2)  # (B, n, n, g, L)
    return torch.einsum("bgti,bijgt->bgtj", x1, convolve_fft(products, h))


def mix_heads_toeplitz(
    x1: Float[Tensor, "batch groups time size"],
    x2: Float[Tensor, "batch groups time size"],
    v: Float[Tensor, "batch groups time size"],
    h: Float[Tensor, "groups time"],
) -> Float[Tensor, "batch groups time size"]:
    """The same as ((X₁ Vᵀ) ⊙ T) X₂: no n × n products are formed."""
    return ((x1 @ v.transpose(-1, -2)) * toeplitz(h)) @ x2


class ImplicitFilter(nn.Module):
    """h[c, t]: a sine network of the position, under a decay of its own rate for each channel.

    h = W₄ sin(φ W₃ sin(φ W₂ sin(φ W₁ z_t))) · exp(−τ |δ_c|), τ = t/(Lmax − 1), with trainable
    positions z_t = [τ, cos(fw), −sin(fw)], w = 2πt/Lmax, f = 10⁻⁴, frequencies φ (one at first)
    and δ between ln(100)/1.5 and ln(100)/0.3. Lmax is part of the filter: a model configured for
    other lengths has other filters.
    """

    decay: Tensor

    def __init__(self, channels: int, order: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        tau = torch.linspace(0, 1, max_length)
        angle = 1e-4 * 2 * math.pi * torch.arange(max_length) / max_length
        self.positions = nn.Parameter(torch.stack([tau, angle.cos(), -angle.sin()], dim=-1))
        self.frequency = nn.Parameter(torch.ones(order))
        self.hidden = nn.ModuleList(nn.Linear(n, order) for n in (3, order, order))
        self.out = nn.Linear(order, channels, bias=False)
        self.bias = nn.Parameter(torch.randn(channels))
        rate = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, channels)
        self.register_buffer("decay", torch.exp(-tau * rate[:, None]), persistent=False)

    def forward(self, length: int) -> Float[Tensor, "channels time"]:
        """The first `length` taps; the skip weight b_c is part of tap 0."""
        if length > self.max_length:
            raise ConfigError(
                f"hyena: sequence length {length} exceeds max_length={self.max_length}, "
                "for which the filters were made; raise --max-length"
            )
        z = self.positions[:length]  # (L, 3)
        for layer in self.hidden:
            z = torch.sin(self.frequency * layer(z))
        h = self.out(z).T * self.decay[:, :length]  # (channels, L)
        return torch.cat([h[:, :1] + self.bias[:, None], h[:, 1:]], dim=1)


class GatedProjection(nn.Module):
    """x → (x₁, x₂, v): a projection shared by `groups` tiles, then a short depthwise filter."""

    def __init__(self, width: int, inner: int, groups: int, taps: int) -> None:
        super().__init__()
        if (3 * inner) % groups:
            raise ConfigError(f"hyena: proj_groups={groups} does not divide 3 x {inner} channels")
        self.groups = groups
        self.map = nn.Linear(width, 3 * inner // groups)
        bound = taps**-0.5  # a depthwise filter sees `taps` inputs
        self.taps = nn.Parameter(torch.empty(taps, 3 * inner).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(3 * inner).uniform_(-bound, bound))

    def forward(
        self, x: Float[Tensor, "batch time width"]
    ) -> tuple[Float[Tensor, "batch time inner"], ...]:
        """The three streams, each (batch, time, inner)."""
        length = x.shape[1]
        p = self.map(x).repeat(1, 1, self.groups)  # channel j reads projection j mod 3W/groups
        n = self.taps.shape[0]
        padded = F.pad(p, (0, 0, n - 1, 0))
        filtered = self.bias + sum(padded[:, i : i + length] * self.taps[i] for i in range(n))
        return filtered.chunk(3, dim=-1)


class Hyena(Layer):
    """Hyena of order 2; par 123 964 + 3·Lmax at d = 128."""

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        inner_factor: int = 4,
        proj_groups: int = 4,
        short_filter: int = 3,
        filter_order: int = 4,
        kernel: Literal["auto", "toeplitz", "fft"] = "auto",
    ) -> None:
        super().__init__()
        inner = inner_factor * width
        self.inner, self.taps, self.kernel = inner, short_filter, kernel
        self.filter_order = filter_order
        self.project = GatedProjection(width, inner, proj_groups, short_filter)
        self.filter = ImplicitFilter(inner, filter_order, max_length)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Gate, convolve, gate, project."""
        length = x.shape[1]
        x1, x2, v = self.project(x)  # (B, L, W)
        h = self.filter(length)
        short = length <= TOEPLITZ_UP_TO["hyena"]
        fast = self.kernel == "toeplitz" or (self.kernel == "auto" and short)
        convolve = convolve_toeplitz if fast else convolve_fft
        y = convolve((v * x2).transpose(1, 2), h).transpose(1, 2)
        return self.out(y * x1)

    def state_floats(self, length: int) -> int:
        """Channels times filter order: the modal state to which such a filter is distilled."""
        del length
        return self.inner * self.filter_order

    def mixing_flops_per_token(self, length: int) -> int:
        """Short filter, gates and the direct causal convolution."""
        return self.inner * (3 * 2 * self.taps + 2 + length + 1)


class MultiHeadHyena(Layer):
    """Multi-head Hyena; par 30 478 + 3·Lmax at d = 128 and 16 heads in layout `code`."""

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        num_heads: int = 16,
        layout: Literal["code", "paper"] = "code",
        proj_groups: int = 4,
        short_filter: int = 3,
        filter_order: int = 2,
        kernel: Literal["auto", "toeplitz", "fft"] = "auto",
    ) -> None:
        super().__init__()
        other = head_width(width, num_heads, "mh-hyena")
        self.groups, self.size = (other, num_heads) if layout == "code" else (num_heads, other)
        self.width, self.taps, self.kernel = width, short_filter, kernel
        self.filter_order = filter_order
        self.project = GatedProjection(width, width, proj_groups, short_filter)
        self.filter = ImplicitFilter(self.groups, filter_order, max_length)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Outer products convolved per group, read out by the first gate."""
        batch, length, width = x.shape
        x1, x2, v = (
            stream.view(batch, length, self.groups, self.size).transpose(1, 2)
            for stream in self.project(x)
        )  # each (B, g, L, n)
        h = self.filter(length)
        short = length <= TOEPLITZ_UP_TO["mh-hyena"]
        fast = self.kernel == "toeplitz" or (self.kernel == "auto" and short)
        mix = mix_heads_toeplitz if fast else mix_heads_fft
        return self.out(mix(x1, x2, v, h).transpose(1, 2).reshape(batch, length, width))

    def state_floats(self, length: int) -> int:
        """Outer products of all groups times filter order."""
        del length
        return self.groups * self.size**2 * self.filter_order

    def mixing_flops_per_token(self, length: int) -> int:
        """Short filter and the masked products of the Toeplitz form."""
        return self.width * (3 * 2 * self.taps + 2 * (length + 1)) + self.groups * (length + 1) // 2
