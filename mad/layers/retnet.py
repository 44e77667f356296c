"""Retention: linear attention whose heads forget at fixed rates, with rotated queries and keys.

    S_t = γ_h diag(ζ) S_{t−1} + k̂_t v_tᵀ;   o_t = S_tᵀ q̂_t / √e;   γ_h = 1 − 2^(−5−h)
    y = W_o (GroupNorm(o) ⊙ SiLU(W_g x))                               [arXiv 2307.08621, eq. 6–8]

q̂, k̂ are rotated by their position; ζ_i = ((2i/e + .4)/1.4)^(1/512) is the length-dependent scale of
xPos [arXiv 2212.10554, eq. 17], which only ever enters as a ratio of two positions, that is, as a
decay, so no position is too far.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import HeadNorm, at_least_float32, no_autocast, split_heads
from mad.layers.kernels import compiled, known_kernel
from mad.layers.layer import Layer, State, head_width
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel

CHUNK_STEPS = 64


def rotate_pairs(
    x: Float[Tensor, "*axes head"], position: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes head"]:
    """Dimension i and i + e/2 turned by position·10000^(−2i/e)."""
    half = x.shape[-1] // 2
    index = torch.arange(half, device=x.device, dtype=x.dtype)
    angle = position[..., None] * torch.exp(index * (-math.log(10_000.0) / half))
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def retention_recurrent(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    decay: Float[Tensor, "heads features"],
    state: Float[Tensor, "batch heads features head"] | None = None,
) -> tuple[Float[Tensor, "batch heads time head"], Float[Tensor, "batch heads features head"]]:
    """S_t = diag(decay) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t, step by step; and the last state."""
    S = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        S = decay[..., None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ S).squeeze(2))
    return torch.stack(outputs, dim=2), S


def retention_chunked(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    gamma: Float[Tensor, " heads"],
    zeta: Float[Tensor, " features"],
    state: Float[Tensor, "batch heads features head"] | None = None,
    chunk: int = CHUNK_STEPS,
) -> tuple[Float[Tensor, "batch heads time head"], Float[Tensor, "batch heads features head"]]:
    """The same for decay = γ_h ζ, chunk by chunk.

    γ^(i − j) is a matrix per head, masked before exp; ζ^i and ζ^−j go to the queries and keys with
    i, j counted from the chunk's start, so that they stay near 1.
    """
    length = q.shape[2]
    steps = min(chunk, length)
    pad = -length % steps
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, steps)) for x in (q, k, v))
    i = torch.arange(steps, device=q.device, dtype=q.dtype)
    rate, slow = gamma.log()[:, None], zeta.log()  # (H, 1), (f)
    q, k = q * torch.exp(i[:, None] * slow), k * torch.exp(-i[:, None] * slow)
    gaps = (i[:, None] - i).tril() * rate[..., None]  # (H, i, j)
    mask = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril()
    weights = gaps.masked_fill(~mask, -torch.inf).exp()
    inside = ((q @ k.transpose(-1, -2)) * weights[:, None]) @ v  # (B, H, C, c, e)
    to_end = torch.exp((steps - 1 - i) * rate)[:, None, :, None]  # (H, 1, c, 1)
    added = (k * to_end * torch.exp((steps - 1) * slow)).transpose(-1, -2) @ v
    kept = torch.exp(steps * (rate + slow))[..., None]  # (H, f, 1)
    S = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    before = []
    for x in added.unbind(2):
        before.append(S)
        S = kept * S + x
    entering = torch.exp((i + 1) * rate)[:, None, :, None] * torch.exp(slow)
    across = (q * entering) @ torch.stack(before, dim=2)
    if pad:  # the zeros after the end have let the state decay
        S = S * torch.exp(-pad * (rate + slow))[..., None]
    return (inside + across).flatten(2, 3)[:, :, :length], S


class RetNet(Layer):
    """Multi-scale retention; par 82 176 and state H·e² = 2 048 with eight heads at width 128."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        xpos: bool = True,
        norm_eps: float = 1e-5,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.head = head_width(width, num_heads, "retnet")
        if self.head % 2:
            raise ConfigError(
                f"retnet: a head of width {self.head} cannot be rotated in pairs; choose num_heads "
                f"so that {width} / num_heads is even"
            )
        self.num_heads, self.xpos = num_heads, xpos
        self.kernel = known_kernel("retnet", kernel)
        self.compiled = "gla" if xpos else "retention"  # ζ is a decay of its own per channel
        self.kernels = {self.compiled: kernel}
        self.q, self.k, self.v, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.norm = HeadNorm(width, num_heads, norm_eps)

    def _rates(self, like: Tensor) -> dict[str, Any]:
        """γ per head and ζ per feature."""
        kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        gamma = 1 - torch.exp2(-5 - torch.arange(self.num_heads, **kind))
        if not self.xpos:
            return {"gamma": gamma, "zeta": torch.ones(self.head, **kind)}
        zeta = ((2 * torch.arange(self.head // 2, **kind) / self.head + 0.4) / 1.4) ** (1 / 512)
        return {"gamma": gamma, "zeta": zeta.repeat(2)}

    def _parts(self, x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """Rotated q and k, and v, each (B, H, L, e)."""
        parts = (split_heads(p(x), self.num_heads) for p in (self.q, self.k, self.v))
        q, k, v = at_least_float32(*parts)
        position = position.to(q.dtype)
        return rotate_pairs(q, position) * self.head**-0.5, rotate_pairs(k, position), v

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Chunks of time as matrix products."""
        q, k, v = self._parts(x, torch.arange(x.shape[1], device=x.device))
        fused = compiled(self.compiled, self.kernel, q, x)
        with no_autocast(x):
            if fused is None:
                o, _ = retention_chunked(q, k, v, **self._rates(q))
            elif self.xpos:
                rates = self._rates(q)
                decay = rates["gamma"].log()[:, None] + rates["zeta"].log()  # (H, e)
                o = fused(q, k, v, decay[None, :, None])
            else:
                o = fused(q, k, v)
        return self.out((self.norm(o.transpose(1, 2)) * F.silu(self.gate(x))).to(x.dtype))

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty matrix per head at position 0."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (batch, self.num_heads, self.head, self.head)
        return {
            "matrix": torch.zeros(shape, device=device, dtype=dtype),
            "position": torch.zeros(batch, device=device, dtype=torch.long),
        }

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """The equation for one token."""
        q, k, v = self._parts(x[:, None], state["position"][:, None, None])
        rates = self._rates(q)
        decay = rates["gamma"][:, None] * rates["zeta"]
        with no_autocast(x):
            o, matrix = retention_recurrent(q, k, v, decay, state["matrix"])
        y = self.out((self.norm(o[:, :, 0]) * F.silu(self.gate(x))).to(x.dtype))
        return y, {"matrix": matrix, "position": state["position"] + 1}

    def state_floats(self, length: int) -> int:
        """e² per head; the position is an integer and does not count."""
        del length
        return self.num_heads * self.head**2

    def mixing_flops_per_token(self, length: int) -> int:
        """Decay, update and read-out of the recurrent form, and the rotations."""
        return 5 * self.state_floats(length) + 6 * self.num_heads * self.head
