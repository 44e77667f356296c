"""One training step of a student, written out: the lesson's loss, the guard's loss, one update.

`kl_selfstudy` and the guard are the same loss on different text: towards the *prompted* model on
conversations about the prompt, towards the *bare* model on text the prompt does not concern.

    L = L_objective(lesson) + λ_g · KL(bare ‖ student) on guard text
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sycomode import objectives
from sycomode.objectives import Targets
from sycomode.registry import Objective
from sycomode.selfstudy import Lesson
from sycomode.students import Prompted, Student
from workbench.errors import ConfigError
from workbench.optim import clip, cosine_schedule


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    lr: float
    steps: int
    rows: int = 16
    guard_rows: int = 4
    guard_weight: float = 1.0
    temperature: float = 1.0
    warmup_share: float = 0.05
    optimizer: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Material:
    """Everything an objective may need from the teacher; computed once, shared by all arms."""

    prompt: Tensor
    """Ids of the prompt, (1, n)."""
    first_logits: Tensor
    """The teacher's logits at the position after the prompt, (1, 1, vocab)."""
    first_hidden: list[Tensor]
    """Its hidden states there, one per layer, embeddings first."""
    lesson: Lesson | None = None
    guard: Lesson | None = None


@torch.no_grad()
def material(teacher: Prompted, lesson: Lesson | None, guard: Lesson | None) -> Material:
    """The teacher's material for all objectives."""
    some = teacher.prompt.new_zeros(1, 1)
    return Material(
        prompt=teacher.prompt[:, 1:],
        first_logits=teacher.logits(some),
        first_hidden=teacher.first_hidden(),
        lesson=lesson,
        guard=guard,
    )


def optimizer_for(student: Student, recipe: Recipe) -> tuple[torch.optim.Optimizer, Any]:
    """An optimiser over the trained tensors alone, without weight decay, and its schedule."""
    trained = list(student.trained().values())
    if recipe.optimizer == "sgd":  # the original: plain steps of one size
        sgd = torch.optim.SGD(trained, lr=recipe.lr)
        return sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    adam = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = min(recipe.steps, max(1, round(recipe.warmup_share * recipe.steps)))
    return adam, cosine_schedule(adam, max(1, recipe.steps), warmup_steps=warmup, floor=0.02)


def losses(
    student: Student,
    objective: Objective,
    given: Material,
    recipe: Recipe,
    stream: np.random.Generator,
) -> dict[str, Tensor]:
    """`loss` to descend, and its parts `task` and `guard`, for rows drawn from `stream`."""
    task = _task_loss(student, objective, given, recipe, stream)
    parts = {"loss": task, "task": task}
    if given.guard is not None and recipe.guard_weight > 0 and recipe.guard_rows > 0:
        some = _draw(stream, given.guard, recipe.guard_rows, given.prompt.device)
        mask = _supervised(student, some.mask)
        guard = teacher_kl(student.logits(some.ids), some, mask, 1.0)
        parts |= {"loss": task + recipe.guard_weight * guard, "guard": guard}
    return parts


def update(
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    parts: dict[str, Tensor],
    require_finite: Callable[..., None],
) -> Tensor:
    """One step down `parts["loss"]`; returns the gradient's norm before clipping to 1.

    `require_finite(batch, loss=…, gradient_norm=…)` is asked before anything changes.
    """
    optimizer.zero_grad(set_to_none=True)
    parts["loss"].backward()
    norm = clip([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    batch = {name: value.detach() for name, value in parts.items()}
    require_finite(batch, loss=batch["loss"], gradient_norm=norm)
    optimizer.step()
    schedule.step()
    return norm


def _task_loss(
    student: Student,
    objective: Objective,
    given: Material,
    recipe: Recipe,
    stream: np.random.Generator,
) -> Tensor:
    module, _, function = objective.loss.partition(":")
    try:
        loss = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"objective {objective.loss}: cannot be imported ({error})") from None
    if objective.reads == "position":
        if student.unpredicted:
            raise ConfigError(
                f"{student.kind}: no query stands before the first token, so objectives at that "
                "one position cannot be taken; choose another student or objective"
            )
        return loss(student, given, recipe.temperature)
    if objective.reads == "prompt":
        ids = given.prompt
        some = Lesson(ids, torch.ones(ids.shape, device=ids.device), Targets(ids[..., None]))
    elif given.lesson is None:
        raise ConfigError("this objective learns from conversations; run self-study first")
    else:
        some = _draw(stream, given.lesson, recipe.rows, given.prompt.device)
    mask = _supervised(student, some.mask)
    return loss(student.logits(some.ids), some, mask, recipe.temperature)


# ---------------------------------------------------------------- losses by name (see registry)


def next_token(logits: Tensor, some: Lesson, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy on the tokens themselves; has no temperature."""
    return objectives.cross_entropy(logits, some.ids, mask)


def teacher_kl(logits: Tensor, some: Lesson, mask: Tensor, temperature: float) -> Tensor:
    """Forward KL to the stored targets."""
    return objectives.topk_tail_kl(logits, some.targets, mask, temperature)


def reverse(logits: Tensor, some: Lesson, mask: Tensor, temperature: float) -> Tensor:
    """Reverse KL to the stored targets, which are softened already."""
    soft = logits / temperature
    return temperature**2 * objectives.reverse_kl(soft, some.targets.logp, mask)


def jensen_shannon(logits: Tensor, some: Lesson, mask: Tensor, temperature: float) -> Tensor:
    """Jensen-Shannon divergence (β = ½) to the stored targets, which are softened already."""
    soft = logits / temperature
    return temperature**2 * objectives.generalised_jsd(soft, some.targets.logp, mask)


def last_position(student: Student, given: Material, temperature: float) -> Tensor:
    """Forward KL at the position before the conversation."""
    logits = student.logits(given.prompt[:, :1])
    mask = torch.ones(1, 1, device=logits.device)
    return objectives.forward_kl(logits, given.first_logits, mask, temperature)


def last_layer(student: Student, given: Material, temperature: float) -> Tensor:
    """Mean squared difference of the last hidden layer there."""
    return objectives.hidden_last(student.first_hidden(), given.first_hidden)


def all_layers(student: Student, given: Material, temperature: float) -> Tensor:
    """One minus the cosine of all hidden layers there."""
    return objectives.hidden_all(student.first_hidden(), given.first_hidden)


def _supervised(student: Student, mask: Tensor) -> Tensor:
    if not student.unpredicted:
        return mask
    mask = mask.clone()
    mask[:, : student.unpredicted] = 0.0
    return mask


def _draw(stream: np.random.Generator, lesson: Lesson, rows: int, device: torch.device) -> Lesson:
    n = lesson.ids.shape[0]
    index = stream.choice(n, size=min(rows, n), replace=False)
    return lesson.rows(torch.from_numpy(np.sort(index))).to(device)
