"""Muon in single precision and in batches: torch.optim.Muon for machines without bfloat16.

torch's own class (from 2.9) orthogonalises in bfloat16, one matrix after another; on a CPU without
bfloat16 units it takes twelve times as long as this one (`benchmarks/backbones/bench_muon.py`),
longer than the model itself. Same update otherwise; a test compares the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024, slope at 0 maximal


def orthogonalise(matrices: Float[Tensor, "n rows cols"], steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices U Vᵀ, roughly (singular values in about 0.7 … 1.2).

    X ← a X + (b A + c A²) X with A = X Xᵀ, from X / ‖X‖_F      [Muon, Jordan et al. 2024]
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each matrix moves by lr · √max(1, rows / cols) · U Vᵀ.

    m ← μ m + (1 − μ) g;  update = orthogonalise((1 − μ) g + μ m);  decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.008,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all matrices, those of equal shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, cols), parameters in by_shape.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                buffers = []
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(gradient)
                    buffers.append(state["momentum_buffer"])
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                looked_ahead = torch.stack(gradients).lerp_(torch.stack(buffers), group["momentum"])
                updates = orthogonalise(looked_ahead)
                rate = group["lr"] * max(1.0, rows / cols) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate)
