"""Short causal depthwise convolutions, over a sequence and one token at a time.

    y_t[c] = b[c] + Σ_{i < n} w[i, c] x_{t − n + 1 + i}[c],   x_s = 0 for s < 0

The last tap weighs the present. What is carried from token to token are the n − 1 inputs before it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.kernels import compiled, filter_kernel
from workbench.integrations.kernels import Kernel

COMPILED_TAPS = (2, 3, 4)
"""Lengths that causal-conv1d has."""


def convolve_compiled(
    x: Float[Tensor, "batch time channels"],
    taps: Float[Tensor, "taps channels"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = False,
    kernel: Kernel = "auto",
) -> Float[Tensor, "batch time channels"] | None:
    """The convolution by causal-conv1d, SiLU included if wanted, or none where it is not used.

    It saves the n shifted copies. A layer's `kernel=fused` asks for its recurrence, not for this.
    """
    if len(taps) not in COMPILED_TAPS:
        return None
    fused = compiled("causal_conv1d", filter_kernel(kernel), x, x)
    return None if fused is None else fused(x, taps, bias, silu)


def convolve_short(
    x: Float[Tensor, "batch time channels"],
    taps: Float[Tensor, "taps channels"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch time channels"]:
    """The convolution as a sum of n shifted copies."""
    n, length = taps.shape[0], x.shape[1]
    padded = F.pad(x, (0, 0, n - 1, 0))
    y = padded[:, :length] * taps[0]
    for i in range(1, n):
        y = y + padded[:, i : i + length] * taps[i]
    return y if bias is None else y + bias


def convolve_short_step(
    x: Float[Tensor, "batch channels"],
    past: Float[Tensor, "batch past channels"],
    taps: Float[Tensor, "taps channels"],
    bias: Float[Tensor, " channels"] | None = None,
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch past channels"]]:
    """One token: the output, and the n − 1 inputs that the next token needs."""
    window = torch.cat([past, x[:, None]], dim=1)  # (B, n, C)
    y = (window * taps).sum(dim=1)
    return (y if bias is None else y + bias), window[:, 1:]


def short_taps(taps: int, channels: int) -> nn.Parameter:
    """Fresh weights U(±1/√taps), as of a depthwise filter that sees `taps` inputs."""
    bound = taps**-0.5
    return nn.Parameter(torch.empty(taps, channels).uniform_(-bound, bound))
