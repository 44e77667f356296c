"""Softmax attention with rotary positions: full and in a sliding window.

    o_i = Σ_{j ≤ i} softmax_j(q_i·k_j / √e) v_j        [Vaswani et al. 2017, eq. 1]
    q, k rotated by position                            [RoFormer, arXiv 2104.09864, eq. 34]

Glossary: d width, H heads, e = d/H head width, L time.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mad.layers.layer import Layer, head_width
from workbench.errors import ConfigError


def rotate(
    x: Float[Tensor, "batch heads time head"], rotary_dim: int, base: float = 10000.0
) -> Float[Tensor, "batch heads time head"]:
    """`x` with its first `rotary_dim` dimensions turned by angles t · base^(−2i/rotary_dim).

    Pairs are (i, i + rotary_dim/2), the half-split layout.
    """
    if rotary_dim == 0:
        return x
    half = rotary_dim // 2
    index = torch.arange(half, device=x.device, dtype=torch.float32)
    time = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
    angle = time[:, None] * base ** (-index / half)  # (L, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def causal_window(
    length: int, window: int | None, device: torch.device
) -> Bool[Tensor, "time time"]:
    """True where position i (row) may attend to j: i − window ≤ j ≤ i."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed if window is None else allowed.triu(-window)


def attend_eager(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time head"],
    window: int | None = None,
) -> Float[Tensor, "batch heads time head"]:
    """Causal softmax attention written out: the reference."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, L, L)
    allowed = causal_window(q.shape[2], window, q.device)
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1) @ v


def attend_sdpa(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time head"],
    window: int | None = None,
) -> Float[Tensor, "batch heads time head"]:
    """The same through torch's fused kernel: no (L, L) matrix is kept for the backward pass."""
    if window is None or window >= q.shape[2] - 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    allowed = causal_window(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class Attention(Layer):
    """Multi-head softmax attention; par 4d² + 4d, state 2·d·min(L, window + 1)."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 1,
        rotary_dim: int | None = None,
        window: int | None = None,
        bias: bool = True,
        kernel: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        super().__init__()
        head = head_width(width, num_heads, "attention")
        if rotary_dim is None:
            rotary_dim = head - head % 2
        if rotary_dim % 2 or not 0 <= rotary_dim <= head:
            raise ConfigError(
                f"attention: rotary_dim={rotary_dim} must be even and at most the head width {head}"
            )
        if window is not None and window < 0:
            raise ConfigError(f"attention: window={window} is negative; none means no window")
        self.width, self.num_heads, self.window = width, num_heads, window
        self.rotary_dim, self.kernel = rotary_dim, kernel
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Attention over the past of each position."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, L, e)
        q, k = rotate(q, self.rotary_dim), rotate(k, self.rotary_dim)
        attend = attend_eager if self.kernel == "eager" else attend_sdpa
        mixed = attend(q, k, v, self.window)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.width))

    def state_floats(self, length: int) -> int:
        """Keys and values of the positions in reach."""
        reach = length if self.window is None else min(length, self.window + 1)
        return 2 * self.width * reach

    def mixing_flops_per_token(self, length: int) -> int:
        """Scores and weighted sum over the keys in reach, averaged over positions."""
        reach = length if self.window is None else min(length, self.window + 1)
        keys = reach - reach * (reach - 1) / (2 * length)  # mean of min(i + 1, reach)
        return round(4 * self.width * keys)
