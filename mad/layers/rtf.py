"""A long filter as a rational transfer function: few numbers, any length, an exact short state.

    K(ω) = h₀ + B(ω)/A(ω),  A = 1 + Σ a_i z⁻ⁱ,  B = Σ b_i z⁻ⁱ,  i = 1 … N,  z = e^{iω}
    on the n-point roots of unity, k = irfft(K)                          [arXiv 2405.06147, RTF]

As a recursion:  w_t = u_t − Σ a_i w_{t−i},   y_t = C·(w_{t−1} … w_{t−N}) + h₀′ u_t. Sampling K at n
points folds the infinite response of B/A onto n taps, k[t] = Σ_m g[t + mn]; with the companion
matrix M of A this is C = b (I − Mⁿ)⁻¹ and h₀′ = h₀ + C Mⁿ⁻¹ e₁, so both forms are one filter.

Glossary: N order, n = Lmax taps, g response of B/A.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.layer import State
from workbench.errors import ConfigError


class RTFFilter(nn.Module):
    """h[c, t] from numerators of its own for each channel, denominators shared by equal groups.

    par C·N + D·N + C, D = `denominators` (C unless given). At first `zero`: a = b = 0, the filter
    is h₀ δ; `xavier`: both U(±√(6/(N + 1))/N); `montel`: both U(±1/N), which keeps Σ|a_i| ≤ 1 and
    so every pole in the unit disc. The step form needs the poles there: outside it grows without
    bound where the folded filter does not.
    """

    def __init__(
        self,
        channels: int,
        order: int,
        max_length: int,
        *,
        init: Literal["zero", "xavier", "montel"] = "zero",
        denominators: int | None = None,
    ) -> None:
        super().__init__()
        groups = channels if denominators is None else denominators
        if groups < 1 or channels % groups:
            raise ConfigError(
                f"rtf filter: {channels} channels are not divisible by rtf_denominators={groups}"
            )
        if not 1 <= order < max_length:
            raise ConfigError(
                f"rtf filter: filter_order={order} must be at least 1 and less than "
                f"max_length={max_length}, the number of taps"
            )
        bounds = {"zero": 0.0, "xavier": (6 / (order + 1)) ** 0.5 / order, "montel": 1 / order}
        if init not in bounds:
            raise ConfigError(f"rtf filter: rtf_init={init!r}; expected zero, xavier or montel")
        self.channels, self.order, self.max_length = channels, order, max_length
        self.poles, self.zeros = (
            nn.Parameter(torch.empty(n, order).uniform_(-bounds[init], bounds[init]))
            for n in (groups, channels)
        )
        self.bias = nn.Parameter(torch.randn(channels))

    def _shared(self, part: Tensor) -> Tensor:
        return part.repeat_interleave(self.channels // part.shape[0], dim=0)

    def forward(self, length: int) -> Float[Tensor, "channels time"]:
        """The first `length` of the Lmax taps, computed in float32 at least."""
        if length > self.max_length:
            raise ConfigError(
                f"hyena: sequence length {length} exceeds max_length={self.max_length}, "
                "for which the filters were made; raise --max-length"
            )
        n = self.max_length
        wide = torch.promote_types(self.zeros.dtype, torch.float32)
        a, b, skip = (part.to(wide) for part in (self.poles, self.zeros, self.bias))
        one = torch.ones_like(a[:, :1])
        denominator = torch.fft.rfft(torch.cat([one, a], dim=1), n=n)  # (D, n/2 + 1)
        numerator = torch.fft.rfft(torch.cat([torch.zeros_like(b[:, :1]), b], dim=1), n=n)
        spectrum = numerator / self._shared(denominator) + skip[:, None]
        return torch.fft.irfft(spectrum, n=n)[:, :length].to(self.zeros.dtype)

    def companion(
        self,
    ) -> tuple[Float[Tensor, "channels order"], Float[Tensor, "channels order"], Tensor]:
        """a, C and h₀′ of the recursion; they depend on the weights alone."""
        n, order = self.max_length, self.order
        wide = torch.promote_types(self.zeros.dtype, torch.float32)
        a, b, skip = (part.to(wide) for part in (self.poles, self.zeros, self.bias))
        eye = torch.eye(order, device=a.device, dtype=wide)
        matrix = torch.cat([-a[:, None], eye[:-1].expand(len(a), -1, -1)], dim=1)  # M: (D, N, N)
        with torch.autocast(a.device.type, enabled=False):
            before = torch.linalg.matrix_power(matrix, n - 1)
            folded = self._shared(eye - matrix @ before)  # (channels, N, N)
            c = torch.linalg.solve(folded.transpose(-1, -2), b[..., None]).squeeze(-1)
        direct = skip + (c * self._shared(before[:, :, 0])).sum(dim=-1)
        return self._shared(a), c, direct

    def initial_state(self, batch: int, axes: tuple[int, ...], like: dict) -> State:
        """The last N values of w, zero before the first token; `axes` follow the channels."""
        like = like | {"dtype": torch.promote_types(like["dtype"], torch.float32)}
        return {"modes": torch.zeros(batch, self.channels, *axes, self.order, **like)}

    def step(
        self, u: Float[Tensor, "batch channels *axes"], state: State
    ) -> tuple[Float[Tensor, "batch channels *axes"], State]:
        """One token of the recursion, in O(N) per channel once C and h₀′ are known."""
        a, c, direct = self.companion()
        extra = (1,) * (u.ndim - 2)
        a, c = (part.view(self.channels, *extra, self.order) for part in (a, c))
        w = state["modes"]
        y = (c * w).sum(dim=-1) + direct.view(self.channels, *extra) * u
        new = u - (a * w).sum(dim=-1)
        return y.to(u.dtype), {"modes": torch.cat([new[..., None], w[..., :-1]], dim=-1)}


def rtf_recurrent(
    u: Float[Tensor, "channels time"],
    a: Float[Tensor, "channels order"],
    b: Float[Tensor, "channels order"],
    direct: Float[Tensor, " channels"],
) -> Float[Tensor, "channels time"]:
    """y_t = Σ b_i w_{t−i} + h u_t, w_t = u_t − Σ a_i w_{t−i}: the equation, step by step."""
    channels, order = a.shape
    w = [torch.zeros(channels, dtype=u.dtype, device=u.device)] * order  # w_{t−N} … w_{t−1}
    outputs = []
    for t in range(u.shape[1]):
        past = torch.stack(w[: -order - 1 : -1], dim=1)  # w_{t−1} … w_{t−N}
        outputs.append((b * past).sum(dim=1) + direct * u[:, t])
        w.append(u[:, t] - (a * past).sum(dim=1))
    return torch.stack(outputs, dim=1)
