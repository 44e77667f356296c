"""A seeded 512 x 512 problem with a heavy spectrum and outlier channels, on which every method has
a known error.

W = U diag((1 + i)^-0.6) V^T scaled to rms 0.02, plus 0.01 Gaussian noise; inputs with standard
deviations (1 + i)^-1/2 along random directions, 1 % of the channels eight times larger, 2 048
tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def reference_problem(
    *, n: int = 512, seed: int = 0
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """(W, H) in float32, H already divided by its mean diagonal and regularised by 0.01 I."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u = torch.linalg.qr(gaussian(n, n)).Q
    v = torch.linalg.qr(gaussian(n, n)).Q
    steps = 1 + torch.arange(n, dtype=torch.float64)
    weight = (u * steps**-0.6) @ v.T
    weight = weight * (0.02 / weight.square().mean().sqrt()) + 0.01 * gaussian(n, n)
    basis = torch.linalg.qr(gaussian(n, n)).Q
    channels = torch.ones(n, dtype=torch.float64)
    channels[torch.randperm(n, generator=generator)[: max(1, n // 100)]] = 8
    tokens = 4 * n
    inputs = (gaussian(tokens, n) * steps**-0.5) @ basis.T * channels
    hessian = inputs.T @ inputs / tokens
    hessian = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(n, dtype=torch.float64)
    return weight.float(), hessian.float()
