"""One training loop for all fine-tuning scripts: exact resume, best on validation, any number of
processes.

Gradients of a step are sums over its rows divided by what the rows count in total, so they do not
depend on how rows are cut into micro-batches or spread over processes. Under torchrun and
accelerate launch rank 0 leads: it keeps the run and the validation, and announces every step; the
others add their gradients and, with ShardedAdamW, keep their part of the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q import distributed
from lplr_q.sharding import JoinedAdamW, ShardedAdamW
from lplr_q.trainable import Trained
from workbench.errors import ConfigError, unknown_name
from workbench.optim import constant_schedule, cosine_schedule, linear_schedule

if TYPE_CHECKING:
    from lplr_q.finetuning import Tuning
    from workbench.run import Run

PHASE = "tune"
END = 0
"""What rank 0 announces when there is nothing more to do."""


@dataclass
class Job:
    """What is trained on what."""

    module: nn.Module
    """Holds every trainable parameter."""
    groups: list[dict[str, Any]]
    """Parameter groups of AdamW: params, lr, weight_decay."""
    weight_of: Float[Tensor, " examples"]
    """What each training example counts, e.g. its tokens."""
    loss_sum: Callable[[list[int]], Tensor]
    """Differentiable sum of the loss over these training examples."""
    validate: Callable[[], dict[str, float]]
    """Figures on the validation set; the first is to become small."""


@dataclass
class Progress:
    """The validation curve; part of the state."""

    curve: list[dict[str, float]] = field(default_factory=list)
    best: float = float("inf")
    waited: int = 0

    def add(self, step: int, figures: dict[str, float]) -> bool:
        """Note the figures of a step; whether the first is the smallest so far."""
        if any(point["step"] == step for point in self.curve):
            return False
        self.curve.append({"step": step, **figures})
        value = next(iter(figures.values()))
        better = value < self.best
        self.best, self.waited = min(self.best, value), 0 if better else self.waited + 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a tree."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        vars(self).update(state)


def steps_of(e: Tuning, n_examples: int) -> tuple[int, int]:
    """(steps per epoch, steps in all)."""
    per_epoch = -(-n_examples // min(e.rows_per_step, n_examples))
    total = e.max_steps if e.max_steps is not None else max(1, round(e.epochs * per_epoch))
    return per_epoch, total


def build_schedule(optimizer: torch.optim.Optimizer, e: Tuning, total: int) -> Any:
    """Warm-up and the schedule that `--lr-scheduler-type` names."""
    warmup = e.warmup_steps if e.warmup_steps is not None else round(e.warmup_ratio * total)
    warmup = min(warmup, total)
    if e.lr_scheduler_type == "constant":
        return constant_schedule(optimizer, warmup_steps=warmup)
    build = {"linear": linear_schedule, "cosine": cosine_schedule}.get(e.lr_scheduler_type)
    if build is None:
        raise unknown_name("schedule", e.lr_scheduler_type, ("linear", "cosine", "constant"))
    return build(optimizer, total, warmup_steps=warmup)


def fit(run: Run, e: Tuning, job: Job) -> Progress:
    """Train; afterwards the module of every process holds the parameters that were best on
    validation.

    The state before the first step is a candidate too: tuning that only hurts changes nothing.
    """
    n = len(job.weight_of)
    per_epoch, _ = steps_of(e, n)
    if not any(group["params"] for group in job.groups):
        raise ConfigError("nothing to train: no signs, no components, no head")
    optimizer = (ShardedAdamW if distributed.sharded() else JoinedAdamW)(job.groups)
    if distributed.world() > 1:
        run.note(f"{distributed.world()} processes, {optimizer.kept}")
    progress = Progress()

    def gradients(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, loss, norm) of a step, all processes together."""
        optimizer.prepare()
        rows = _rows(run, e, n, per_epoch, step)
        loss = _gradients(run, e, job, rows)
        return rows, *optimizer.reduce(loss, e.max_grad_norm)

    if distributed.rank() == 0:
        _lead(run, e, job, optimizer, progress, gradients)
    else:
        while (said := distributed.announce(END, optimizer.device)) != END:
            gradients(said) if said > 0 else optimizer.help(said)
    job.module.eval()
    optimizer.share()
    return progress


def _lead(
    run: Run,
    e: Tuning,
    job: Job,
    optimizer: JoinedAdamW,
    progress: Progress,
    gradients: Callable[[int], tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Rank 0: the run's steps, announced to the others; validation; the best state at the end."""
    per_epoch, total = steps_of(e, len(job.weight_of))
    schedule, trained = build_schedule(optimizer.inner, e, total), Trained(job.module)
    state = {
        "trained": trained,
        "optimizer": optimizer,
        "schedule": schedule,
        "progress": progress,
    }

    def observe(step: int) -> None:
        job.module.eval()
        with torch.no_grad(), mixed(run):
            figures = job.validate()
        run.log(step, {f"validation/{name}": value for name, value in figures.items()})
        if progress.add(step, figures):
            run.keep_best(step, {"trained": trained}, progress.best, higher=False)

    listening = True  # the others, for what is announced next
    try:
        with closing(run.steps(total, state, save_every=e.save_steps, phase=PHASE)) as steps:
            for step in steps:
                if step == 1:
                    observe(0)
                distributed.announce(step, optimizer.device)
                listening = False
                rows, loss, norm = gradients(step)
                listening = True
                run.require_finite(step, {"rows": rows}, loss=loss, gradient_norm=norm)
                rate = schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                if step % 10 == 1 or step == total:
                    run.log(step, {"train/loss": loss, "train/gradient_norm": norm, "lr": rate})
                if run.every(step, e.eval_steps or per_epoch) or step == total:
                    observe(step)
                    if e.patience and progress.waited >= e.patience:
                        waited = f"no better in {progress.waited} validations"
                        run.note(f"step {step}: {waited}, stopping")
                        break
    finally:
        if listening:
            distributed.announce(END, optimizer.device)
    best = run.load_best({"trained": trained}, PHASE)
    run.note(f"best on validation after step {best} of {progress.curve[-1]['step']:g}")


def mixed(run: Run) -> torch.autocast:
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    half = run.device.device.type == "cuda" and run.device.dtype == torch.bfloat16
    return torch.autocast(run.device.device.type, torch.bfloat16, enabled=half)


def _rows(run: Run, e: Tuning, n: int, per_epoch: int, step: int) -> Tensor:
    """Training examples of a step, over all processes: each epoch in an order of its own."""
    epoch, at = divmod(step - 1, per_epoch)
    order = torch.from_numpy(run.streams("order", index=epoch).permutation(n))
    return order[at * e.rows_per_step : (at + 1) * e.rows_per_step]


def _gradients(run: Run, e: Tuning, job: Job, rows: Tensor) -> Tensor:
    """This process's share of the mean loss of the step; its gradient is in ``.grad``."""
    job.module.train()
    weight = float(job.weight_of[rows].sum()) or 1.0
    own = distributed.mine(rows.tolist())
    loss = torch.zeros((), device=run.device.device)
    for start in range(0, len(own), e.batch_size):
        with mixed(run):
            part = job.loss_sum(own[start : start + e.batch_size]) / weight
        part.backward()
        loss += part.detach()
    return loss
