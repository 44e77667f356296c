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
    """AdamW or SGD; only protocol `lab` keeps some parameters free of weight decay.

    Those are norms, biases and what a layer marks with `parameter.no_weight_decay = True`.
    """
    import torch

    spec = protocol_named(protocol)
    groups = [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    if protocol == "lab":
        for parameter in model.parameters():  # the mark that state-space layers publish
            if getattr(parameter, "no_weight_decay", False):
                parameter._no_weight_decay = True
        groups = parameter_groups(model, weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=spec.betas, fused=True)


class Plateau:
    """A share of the largest rate that falls by a factor when the loss stops falling.

    As torch's ReduceLROnPlateau: after more than `patience` values in a row that are not lower
    than the lowest by a ten-thousandth of it, the share is multiplied by `factor` and the count
    begins anew. A `LambdaLR` saves its attributes with its own state.
    """

    def __init__(self, patience: int, factor: float, floor: float) -> None:
        self.patience, self.factor, self.floor = patience, factor, floor
        self.share, self.bad = 1.0, 0
        self.best: float | None = None

    def __call__(self, step: int) -> float:
        """The present share; steps do not matter."""
        del step
        return self.share

    def observe(self, loss: float) -> None:
        """Take one validation loss into account."""
        if self.best is None or loss < self.best * (1 - 1e-4):
            self.best, self.bad = loss, 0
            return
        self.bad += 1
        if self.bad > self.patience:
            self.share, self.bad = max(self.floor, self.share * self.factor), 0


def observe(schedule: LambdaLR, loss: float) -> None:
    """Tell a schedule a validation loss; only `plateau` listens."""
    for rule in schedule.lr_lambdas[:1]:  # one rule, shared by the parameter groups
        if isinstance(rule, Plateau):
            rule.observe(loss)


def build_schedule(
    optimizer: Optimizer,
    kind: Literal["cosine", "cosine-epochs", "plateau", "none"],
    *,
    epochs: int,
    steps_per_epoch: int,
    floor: float,
    plateau_patience: int = 5,
    plateau_factor: float = 0.9,
) -> LambdaLR:
    """The learning rate over optimiser steps; `floor` = smallest / largest rate.

    `cosine`: warm-up over one epoch (a tenth of the training if that is less), then a half cosine
    per step. `cosine-epochs`: in epoch e of E, floor + (1 − floor)(1 + cos(π e/E))/2, no warm-up.
    `plateau`: falls as the validation losses given to `observe` ask for.
    """
    from torch.optim.lr_scheduler import LambdaLR

    total = epochs * steps_per_epoch
    if kind == "none":
        return constant_schedule(optimizer)
    if kind == "plateau":
        return LambdaLR(optimizer, Plateau(plateau_patience, plateau_factor, floor))
    if kind == "cosine":
        warmup = min(steps_per_epoch, max(1, total // 10))
        return cosine_schedule(optimizer, total, warmup_steps=min(warmup, total), floor=floor)

    def of_epoch(step: int) -> float:
        epoch = step // steps_per_epoch
        return floor + (1 - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return LambdaLR(optimizer, of_epoch)
