"""Hyena: gates around a long convolution whose filter is a small network of time.

    y = h ∗ (x₂ ⊙ v) + b ⊙ x₂ ⊙ v,   out = W_o (x₁ ⊙ y)         [arXiv 2302.10866, order 2]
    multi-head: y_ab = h ∗ (v_a x₂_b) per group, out_b = Σ_a x₁_a y_ab     [arXiv 2403.17844]

The convolution has two exact forms. With T[t, s] = h[t − s] for t ≥ s, the multi-head layer is
((X₁ Vᵀ) ⊙ T) X₂: masked linear attention whose decay is a learned Toeplitz matrix.

Token by token, a filter of no special form must see all earlier inputs: the state is their history,
and it grows. `matrix_state_floats` keeps the figure of the published iso-state rule, the modes to
which such a filter could be distilled. A rational filter (`filter=rtf`) has a short exact state.

Glossary: W inner channels, P projected ones, g groups, n channels of a group, L time, N order.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.convolution import convolve_short, convolve_short_step, short_taps
from mad.layers.layer import Layer, State, head_width
from mad.layers.rtf import RTFFilter
from workbench.errors import ConfigError

TOEPLITZ_UP_TO = {"hyena": 32, "mh-hyena": 1024}
"""Longest sequence for which `kernel="auto"` takes the quadratic form."""


def toeplitz(h: Float[Tensor, "channels time"]) -> Float[Tensor, "channels time time"]:
    """T[c, t, s] = h[c, t − s] for t ≥ s and 0 above the diagonal."""
    length = h.shape[-1]
    # a circle of 2L: h₀, L zeros, h_{L−1} … h₁. Laid out again and again in rows of 2L − 1, it
    # starts each row one place later: row t, column s is circle[(s − t) mod 2L] = h[t − s]
    circle = torch.cat([h[:, :1], torch.zeros_like(h), h[:, 1:].flip(-1)], dim=-1)
    rows = circle[:, None].expand(-1, length, -1).flatten(1)[:, : length * (2 * length - 1)]
    return rows.unflatten(-1, (length, 2 * length - 1))[..., :length]


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


def convolve_recurrent(
    u: Float[Tensor, "batch channels time"], h: Float[Tensor, "channels time"]
) -> Float[Tensor, "batch channels time"]:
    """The same written out position by position: the reference."""
    return torch.stack(
        [(u[..., : t + 1] * h[:, : t + 1].flip(-1)).sum(dim=-1) for t in range(u.shape[-1])],
        dim=-1,
    )


def mix_heads_recurrent(
    x1: Float[Tensor, "batch groups time size"],
    x2: Float[Tensor, "batch groups time size"],
    v: Float[Tensor, "batch groups time size"],
    h: Float[Tensor, "groups time"],
) -> Float[Tensor, "batch groups time size"]:
    """out_b[t] = Σ_a x₁_a[t] Σ_{s ≤ t} h[t − s] v_a[s] x₂_b[s], position by position."""
    outputs = []
    for t in range(x1.shape[2]):
        weight = h[:, : t + 1].flip(-1)[..., None, None]  # (g, t + 1, 1, 1)
        products = v[:, :, : t + 1, :, None] * x2[:, :, : t + 1, None, :]
        y = (weight * products).sum(dim=2)  # (B, g, n, n)
        outputs.append((x1[:, :, t, :, None] * y).sum(dim=-2))
    return torch.stack(outputs, dim=2)


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
        if channels < 1 or order < 1:
            raise ConfigError(f"hyena: filter_order={order} must be at least 1")
        self.channels, self.order, self.max_length = channels, order, max_length
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


def build_filter(
    kind: str,
    channels: int,
    order: int,
    max_length: int,
    *,
    rtf_init: Literal["zero", "xavier", "montel"] = "zero",
    rtf_denominators: int | None = None,
) -> ImplicitFilter | RTFFilter:
    """The filter of that kind: called with a length, it gives that many taps."""
    if kind == "implicit":
        return ImplicitFilter(channels, order, max_length)
    if kind == "rtf":
        return RTFFilter(channels, order, max_length, init=rtf_init, denominators=rtf_denominators)
    raise ConfigError(f"hyena: filter={kind!r}; expected implicit or rtf")


class GatedProjection(nn.Module):
    """x → (x₁, x₂, v): a projection shared by `groups` tiles, then a short depthwise filter."""

    def __init__(self, width: int, inner: int, groups: int, taps: int) -> None:
        super().__init__()
        if groups < 1 or (3 * inner) % groups:
            raise ConfigError(f"hyena: proj_groups={groups} does not divide 3 x {inner} channels")
        if taps < 1:
            raise ConfigError(f"hyena: short_filter={taps} must be at least 1")
        self.groups = groups
        self.map = nn.Linear(width, 3 * inner // groups)
        self.taps = short_taps(taps, 3 * inner)
        bound = taps**-0.5
        self.bias = nn.Parameter(torch.empty(3 * inner).uniform_(-bound, bound))

    def forward(
        self, x: Float[Tensor, "batch time width"]
    ) -> tuple[Float[Tensor, "batch time inner"], ...]:
        """The three streams, each (batch, time, inner)."""
        p = self.map(x).repeat(1, 1, self.groups)  # channel j reads projection j mod 3W/groups
        return convolve_short(p, self.taps, self.bias).chunk(3, dim=-1)

    @property
    def carried(self) -> tuple[int, int]:
        """Shape of the projections that the short filter still needs: (taps − 1, P)."""
        return len(self.taps) - 1, self.map.out_features

    def step(
        self, x: Float[Tensor, "batch width"], past: Float[Tensor, "batch past projected"]
    ) -> tuple[tuple[Float[Tensor, "batch inner"], ...], Float[Tensor, "batch past projected"]]:
        """The three streams of one token, and the projections that the next one needs."""
        p = self.map(x)
        tiled, seen = p.repeat(1, self.groups), past.repeat(1, 1, self.groups)
        y, _ = convolve_short_step(tiled, seen, self.taps, self.bias)
        return y.chunk(3, dim=-1), torch.cat([past, p[:, None]], dim=1)[:, 1:]


class LongConvolution(Layer):
    """What the Hyena layers share: the projection, the filter and what is carried.

    Carried per sequence: the last projections; and the history of the filter's inputs, or, with a
    rational filter, its last N values for each of the `convolved` channels.
    """

    auto_toeplitz = TOEPLITZ_UP_TO["hyena"]

    def __init__(
        self,
        project: GatedProjection,
        filters: ImplicitFilter | RTFFilter,
        *,
        axes: tuple[int, ...] = (),
        history: int,
        kernel: str,
    ) -> None:
        super().__init__()
        if kernel not in ("auto", "toeplitz", "fft"):
            raise ConfigError(f"hyena: kernel={kernel!r}; expected auto, toeplitz or fft")
        self.project, self.filter, self.kernel = project, filters, kernel
        self.axes, self.history = axes, history
        self.convolved = filters.channels * math.prod(axes)

    def _toeplitz(self, length: int) -> bool:
        if self.kernel == "auto":
            return length <= self.auto_toeplitz
        return self.kernel == "toeplitz"

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """No history, or modes at rest."""
        like = {"device": device, "dtype": dtype or self.project.map.weight.dtype}
        state = {"projected": torch.zeros(batch, *self.project.carried, **like)}
        if isinstance(self.filter, RTFFilter):
            return state | self.filter.initial_state(batch, self.axes, like)
        return state | {"inputs": torch.zeros(batch, 0, self.history, **like)}

    def state_floats(self, length: int) -> int:
        """The last projections, and the history of inputs or the modes of a rational filter."""
        carried = math.prod(self.project.carried)
        if isinstance(self.filter, RTFFilter):
            return carried + self.matrix_state_floats(length)
        return carried + self.history * length

    def matrix_state_floats(self, length: int) -> int:
        """Convolved channels times filter order: the modal state of the published rule."""
        del length
        return self.convolved * self.filter.order

    def kv_bytes(self, length: int) -> int:
        """The history at two bytes per number; 0 with a rational filter."""
        return 0 if isinstance(self.filter, RTFFilter) else 2 * self.history * length


class ChannelConvolution(LongConvolution):
    """y = x₁ ⊙ (h ∗ (x₂ ⊙ v)) on `inner` channels, each with a filter of its own."""

    def __init__(
        self, project: GatedProjection, filters: ImplicitFilter | RTFFilter, kernel: str
    ) -> None:
        super().__init__(project, filters, history=filters.channels, kernel=kernel)

    def mix(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time inner"]:
        """Gate, convolve, gate."""
        x1, x2, v = self.project(x)  # (B, L, W)
        convolve = convolve_toeplitz if self._toeplitz(x.shape[1]) else convolve_fft
        return convolve((v * x2).transpose(1, 2), self.filter(x.shape[1])).transpose(1, 2) * x1

    def mix_step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch inner"], State]:
        """`mix` for one token."""
        (x1, x2, v), projected = self.project.step(x, state["projected"])
        u = v * x2  # (B, W)
        if isinstance(self.filter, RTFFilter):
            y, after = self.filter.step(u, state)
        else:
            inputs = torch.cat([state["inputs"], u[:, None]], dim=1)  # (B, t + 1, W)
            h = self.filter(inputs.shape[1]).flip(-1)
            y, after = torch.einsum("btc,ct->bc", inputs, h), {"inputs": inputs}
        return x1 * y, {"projected": projected} | after

    def mixing_flops_per_token(self, length: int) -> int:
        """Short filter, gates and the direct causal convolution."""
        return self.convolved * (3 * 2 * len(self.project.taps) + 2 + length + 1)


class Hyena(ChannelConvolution):
    """Hyena of order 2; par 123 964 + 3·Lmax at d = 128, matrix state W·N."""

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        inner_factor: int = 4,
        proj_groups: int = 4,
        short_filter: int = 3,
        filter: Literal["implicit", "rtf"] = "implicit",
        filter_order: int = 4,
        rtf_init: Literal["zero", "xavier", "montel"] = "zero",
        rtf_denominators: int | None = None,
        kernel: Literal["auto", "toeplitz", "fft"] = "auto",
    ) -> None:
        inner = inner_factor * width
        if inner < 1:
            raise ConfigError(f"hyena: inner_factor={inner_factor} must be at least 1")
        super().__init__(
            GatedProjection(width, inner, proj_groups, short_filter),
            build_filter(
                filter,
                inner,
                filter_order,
                max_length,
                rtf_init=rtf_init,
                rtf_denominators=rtf_denominators,
            ),
            kernel,
        )
        self.out = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Gate, convolve, gate, project."""
        return self.out(self.mix(x))

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token: the filter over all inputs so far, or a step of its recursion."""
        y, state = self.mix_step(x, state)
        return self.out(y), state


class MultiHeadHyena(LongConvolution):
    """Multi-head Hyena; par 30 478 + 3·Lmax at d = 128 and 16 heads in layout `code`.

    The history holds v and x₂, 2d floats per token, instead of their d·n products; a rational
    filter carries N values of every product: matrix state g·n²·N, the published figure.
    """

    auto_toeplitz = TOEPLITZ_UP_TO["mh-hyena"]

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        num_heads: int = 16,
        layout: Literal["code", "paper"] = "code",
        proj_groups: int = 4,
        short_filter: int = 3,
        filter: Literal["implicit", "rtf"] = "implicit",
        filter_order: int = 2,
        rtf_init: Literal["zero", "xavier", "montel"] = "zero",
        rtf_denominators: int | None = None,
        kernel: Literal["auto", "toeplitz", "fft"] = "auto",
    ) -> None:
        other = head_width(width, num_heads, "mh-hyena")
        if layout not in ("code", "paper"):
            raise ConfigError(f"mh-hyena: layout={layout!r}; expected code or paper")
        groups, size = (other, num_heads) if layout == "code" else (num_heads, other)
        super().__init__(
            GatedProjection(width, width, proj_groups, short_filter),
            build_filter(
                filter,
                groups,
                filter_order,
                max_length,
                rtf_init=rtf_init,
                rtf_denominators=rtf_denominators,
            ),
            axes=(size, size),
            history=2 * width,
            kernel=kernel,
        )
        self.groups, self.size = groups, size
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Outer products convolved per group, read out by the first gate."""
        length = x.shape[1]
        x1, x2, v = (
            stream.unflatten(-1, (self.groups, self.size)).transpose(1, 2)
            for stream in self.project(x)
        )  # each (B, g, L, n)
        mix = mix_heads_toeplitz if self._toeplitz(length) else mix_heads_fft
        return self.out(mix(x1, x2, v, self.filter(length)).transpose(1, 2).flatten(2))

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token: Σ_s h[t − s] (x₁·v_s) x₂_s over the history, or a step of the recursion."""
        (x1, x2, v), projected = self.project.step(x, state["projected"])
        shape = (self.groups, self.size)
        if isinstance(self.filter, RTFFilter):
            products = v.unflatten(-1, shape)[..., :, None] * x2.unflatten(-1, shape)[..., None, :]
            y, after = self.filter.step(products, state)  # (B, g, n, n)
            out = (x1.unflatten(-1, shape)[..., None] * y).sum(dim=-2)
        else:
            pair = torch.cat([v, x2], dim=-1)[:, None]  # (B, 1, 2d)
            inputs = torch.cat([state["inputs"], pair], dim=1)
            vs, x2s = inputs.unflatten(-1, (2, *shape)).unbind(2)  # (B, t + 1, g, n)
            h = self.filter(inputs.shape[1]).flip(-1)  # (g, t + 1)
            scores = torch.einsum("bgi,btgi,gt->btg", x1.unflatten(-1, shape), vs, h)
            out, after = torch.einsum("btg,btgj->bgj", scores, x2s), {"inputs": inputs}
        return self.out(out.flatten(1)), {"projected": projected} | after

    def mixing_flops_per_token(self, length: int) -> int:
        """Short filter and the masked products of the Toeplitz form."""
        short = self.out.in_features * 3 * 2 * len(self.project.taps)
        products = 2 * self.out.in_features * (length + 1)
        return short + products + self.groups * (length + 1) // 2
