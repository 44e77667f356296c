"""Parameter groups, learning-rate schedules and clipping: thin names over torch's own.

Schedules count *optimiser* steps, are `torch.optim.lr_scheduler.LambdaLR` objects, and hence save
and restore with `state_dict`. All start with a linear warm-up from lr/warmup_steps to lr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LambdaLR

NO_DECAY_NAMES = ("A_log", "D", "dt_bias")
"""State-space parameters that weight decay would pull away from stable dynamics."""


def parameter_groups(
    model: torch.nn.Module, weight_decay: float = 0.1, *, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Two groups for an optimiser: matrices with weight decay; norms, biases and the like without.

    A parameter is decayed if it has at least two axes, carries no `_no_weight_decay` mark and is
    no state-space constant. Frozen parameters are left out, shared ones appear once.
    """
    import torch

    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = (
            parameter.ndim < 2
            or getattr(parameter, "_no_weight_decay", False)
            or name.rpartition(".")[2] in NO_DECAY_NAMES
            or (not decay_embeddings and id(parameter) in embeddings)
        )
        (plain if exempt else decayed).append(parameter)
    if not decayed and not plain:
        raise ConfigError("nothing to train: every parameter of the model is frozen")
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    floor: float = 0.1,
) -> LambdaLR:
    """Warm-up, then half a cosine from lr to floor·lr at `total_steps`; floor·lr after it.

    floor + (1 − floor)·½·(1 + cos(π·t)),  t = share of the steps after warm-up   [SGDR, eq. 5]
    """
    return _schedule(
        optimizer,
        total_steps,
        warmup_steps,
        floor,
        lambda t: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)),
    )


def linear_schedule(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    floor: float = 0.0,
) -> LambdaLR:
    """Warm-up, then a straight line from lr to floor·lr at `total_steps`."""
    return _schedule(optimizer, total_steps, warmup_steps, floor, lambda t: 1 - (1 - floor) * t)


def wsd_schedule(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    decay_fraction: float = 0.5,
    floor: float = 0.05,
) -> LambdaLR:
    """Warm-up, stable, decay: lr, then a line to floor·lr over the last `decay_fraction`."""
    if not 0 < decay_fraction <= 1:
        raise ConfigError(f"decay_fraction={decay_fraction}: expected more than 0 and at most 1")
    start = 1 - decay_fraction
    return _schedule(
        optimizer,
        total_steps,
        warmup_steps,
        floor,
        lambda t: 1 - (1 - floor) * max(0.0, t - start) / decay_fraction,
    )


def constant_schedule(optimizer: torch.optim.Optimizer, *, warmup_steps: int = 0) -> LambdaLR:
    """Warm-up, then lr for ever."""
    return _schedule(optimizer, max(1, warmup_steps), warmup_steps, 1.0, lambda t: 1.0)


def _schedule(
    optimizer: Any,
    total_steps: int,
    warmup_steps: int,
    floor: float,
    shape: Callable[[float], float],
) -> LambdaLR:
    from torch.optim.lr_scheduler import LambdaLR

    if total_steps < 1:
        raise ConfigError(f"total_steps={total_steps}: expected at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(f"warmup_steps={warmup_steps}: expected 0 to total_steps={total_steps}")
    if not 0 <= floor <= 1:
        raise ConfigError(f"floor={floor}: expected a share of the learning rate, 0 to 1")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        after = total_steps - warmup_steps
        return shape(min(1.0, (step - warmup_steps) / after)) if after else 1.0

    return LambdaLR(optimizer, factor)


def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float = 1.0) -> torch.Tensor:
    """Scales gradients to a joint 2-norm of at most `max_norm`; returns the norm before.

    `max_norm=0` only measures.
    """
    import torch

    listed = [p for p in parameters if p.grad is not None]
    if not listed:
        return torch.zeros(())
    if max_norm <= 0:
        return torch.nn.utils.get_total_norm([p.grad for p in listed])
    return torch.nn.utils.clip_grad_norm_(listed, max_norm)
