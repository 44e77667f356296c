"""The three ways to train: this lab's, the published code's and the published paper's.

[arXiv 2403.17844, "mechanistic design" protocol; athms/mad-lab]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workbench.errors import unknown_name
from workbench.optim import constant_schedule, cosine_schedule, parameter_groups

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Protocol:
    """What a protocol fixes beside the flags."""

    betas: tuple[float, float]
    """AdamW's decay rates."""
    schedule: Literal["cosine", "cosine-epochs", "none"]
    """Cosine per step after a warm-up, cosine per epoch, or constant."""
    clip_norm: float
    """Largest gradient norm; 0 means no clipping."""
    selected: bool
    """Is the score that of the best weights on validation, or of the last ones?"""


PROTOCOLS: dict[str, Protocol] = {
    "lab": Protocol(betas=(0.9, 0.98), schedule="cosine", clip_norm=1.0, selected=True),
    # the published code hands its schedule over under a key that nobody reads: lr stays constant
    "mad-code": Protocol(betas=(0.9, 0.999), schedule="none", clip_norm=0.0, selected=False),
    "mad-paper": Protocol(
        betas=(0.9, 0.98), schedule="cosine-epochs", clip_norm=0.0, selected=False
    ),
}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def build_optimizer(
    model: nn.Module, kind: str, *, lr: float, weight_decay: float, protocol: str
) -> Optimizer:
    """AdamW or SGD; only protocol `lab` keeps norms and biases free of weight decay."""
    import torch

    spec = protocol_named(protocol)
    groups = [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    if protocol == "lab":
        groups = parameter_groups(model, weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=spec.betas, fused=True)


def build_schedule(
    optimizer: Optimizer,
    kind: Literal["cosine", "cosine-epochs", "none"],
    *,
    epochs: int,
    steps_per_epoch: int,
    floor: float,
) -> LambdaLR:
    """The learning rate over optimiser steps; `floor` = smallest / largest rate.

    `cosine`: warm-up over one epoch (a tenth of the training if that is less), then a half cosine
    per step. `cosine-epochs`: in epoch e of E, floor + (1 − floor)(1 + cos(π e/E))/2, no warm-up.
    """
    from torch.optim.lr_scheduler import LambdaLR

    total = epochs * steps_per_epoch
    if kind == "none":
        return constant_schedule(optimizer)
    if kind == "cosine":
        warmup = min(steps_per_epoch, max(1, total // 10))
        return cosine_schedule(optimizer, total, warmup_steps=min(warmup, total), floor=floor)

    def of_epoch(step: int) -> float:
        epoch = step // steps_per_epoch
        return floor + (1 - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return LambdaLR(optimizer, of_epoch)
