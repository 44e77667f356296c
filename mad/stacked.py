"""Many trainings of one architecture as one model with a leading axis of replicas.

    results = train_stacked(grid(Experiment(...), lr=[1e-4, 5e-4], weight_decay=[0.0, 0.1]))

A sweep over learning rates, weight decays and seeds runs the same program on other numbers, so R
small steps become one step on stacked weights (`torch.func`). Nothing is shared between replicas:
each has its own rows and their order, learning rate and schedule, decay, gradient norm, validation
and reason to stop, and ends with the numbers of its own `mad.train` run up to rounding. A replica
that stops is taken out of the stack; one that diverges keeps its last finite weights, is taken out
too, and touches no other.

This pays on a GPU, where a small step waits for kernels to be launched. On a CPU separate processes
of one thread each are as fast (`benchmarks/mad/stacked.py` measures it).

Glossary: R replicas, P parameters of one replica, B rows, L time, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mad.protocols import observe, protocol_named
from mad.registry import build_task
from mad.stacked_model import StackedModel, StackedOptimizer
from mad.stacked_setup import StackedRows, check, make_decay, make_model, make_schedule
from mad.tasks.task import IGNORE, Split
from mad.train import Experiment, Progress, score_run, task_options
from workbench.run import Run
from workbench.sweep import FAILED

LOOK_EVERY = 10
"""Steps between looks at which replicas diverged: a look waits for the device."""


class _Row:
    """One replica, in the role of a module of which a copy of the weights is wanted."""

    def __init__(self, model: StackedModel, row: int) -> None:
        self.model, self.row = model, row

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state(self.row)


class Replicas:
    """The state of a stacked training: what `mad.train` holds for one run, for each replica."""

    def __init__(
        self, experiments: Sequence[Experiment], device: torch.device, dtype: torch.dtype
    ) -> None:
        check(experiments)
        self.experiments = list(experiments)
        self.device, self.dtype = device, dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        first = experiments[0]
        protocol = protocol_named(first.protocol)
        self.tasks = [build_task(one.task, task_options(one))[0] for one in experiments]
        _, n_train = build_task(first.task, task_options(first))
        self.rows = StackedRows(self.experiments, self.tasks, n_train, device)
        models = [
            make_model(one, task, streams.integer("init")).to(device, wide)
            for one, task, streams in zip(experiments, self.tasks, self.rows.streams, strict=True)
        ]
        self.schedules = [make_schedule(one, self.steps_per_epoch) for one in experiments]
        self.model = StackedModel(models)
        self.template = models[0]
        self.optimizer = StackedOptimizer(
            first.optimizer,
            self.model.weights,
            torch.stack(
                [make_decay(one, model) for one, model in zip(experiments, models, strict=True)]
            ),
            protocol.betas,
            protocol.clip_norm,
        )
        self.progress = [Progress() for _ in experiments]
        self.active = list(range(len(experiments)))
        self.ended: dict[int, dict[str, Tensor]] = {}
        self.died: dict[int, int] = {}
        self.alive = torch.ones(len(experiments), dtype=torch.bool, device=device)
        self.death = torch.zeros(len(experiments), dtype=torch.long, device=device)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training row is seen once."""
        return self.rows.steps_per_epoch

    def batch(
        self, step: int
    ) -> tuple[Int[Tensor, "replicas batch time"], Int[Tensor, "replicas batch time"]]:
        """Inputs and targets of one step of the active replicas."""
        return self.rows.batch(step, self.active)

    # ------------------------------------------------------------ training

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision where a half format is asked for."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    def losses(
        self,
        weights: Float[Tensor, "replicas params"],
        ids: Int[Tensor, "replicas batch time"],
        targets: Int[Tensor, "replicas batch time"],
    ) -> Float[Tensor, " replicas"]:
        """Mean cross-entropy of each replica over its scored positions."""
        with self.autocast():
            logits = self.model(weights, ids)
        logits = logits if self.dtype == torch.float64 else logits.float()
        nats = F.cross_entropy(
            logits.flatten(0, 2), targets.long().flatten(), ignore_index=IGNORE, reduction="none"
        ).view(len(ids), -1)
        return nats.sum(dim=1) / (targets != IGNORE).flatten(1).sum(dim=1)

    def train_step(self, step: int) -> Float[Tensor, " replicas"]:
        """One step of all active replicas; their losses before it."""
        ids, targets = self.batch(step)
        weights = self.model.weights.detach().requires_grad_()
        losses = self.losses(weights, ids, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), weights)  # no replica sees another's loss
        norm = self.optimizer.norm(gradient)
        good = losses.isfinite() & norm.isfinite()
        self.death = torch.where(self.alive & ~good, step, self.death)
        self.alive = self.alive & good
        rates = [self.schedules[r].get_last_lr()[0] for r in self.active]
        lr = torch.tensor(rates, dtype=torch.float64)
        self.optimizer.update(
            self.model.weights, gradient, norm, lr.to(self.model.weights), self.alive
        )
        for r in self.active:
            self.schedules[r].optimizer.step()
            self.schedules[r].step()
        return losses.detach()

    def look(self) -> None:
        """Take out the replicas that diverged since the last look."""
        gone = (~self.alive).nonzero().flatten().tolist()
        for row in gone:
            self.died[self.active[row]] = int(self.death[row])
        if gone:
            self.take_out(gone)

    def take_out(self, rows: Sequence[int]) -> None:
        """End the replicas in these rows of the stack; their weights are kept as they are."""
        for row in rows:
            self.ended[self.active[row]] = self.model.state(row)
        left = [row for row in range(len(self.active)) if row not in rows]
        kept = torch.tensor(left, dtype=torch.long, device=self.device)
        self.model.keep(kept)
        self.optimizer.keep(kept)
        self.alive, self.death = self.alive[kept], self.death[kept]
        self.active = [self.active[row] for row in left]

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[list[float], list[float]]:
        """Micro accuracy and mean nats of every active replica on a split."""
        source, size = self.rows.sources(self.active), self.experiments[0].batch_size
        inputs, answers, _ = self.rows.stacked[split]
        right = nats = count = torch.zeros((), device=self.device)
        for at in range(0, inputs.shape[1], size):
            ids, target = inputs[source, at : at + size], answers[source, at : at + size].long()
            with self.autocast():
                logits = self.model(self.model.weights, ids).float()
            scored = target != IGNORE
            right = right + ((logits.argmax(dim=-1) == target) & scored).sum(dim=(1, 2))
            count = count + scored.sum(dim=(1, 2))
            lost = F.cross_entropy(
                logits.flatten(0, 2), target.flatten(), ignore_index=IGNORE, reduction="none"
            )
            nats = nats + lost.view(len(ids), -1).double().sum(dim=1)
        return (right.double() / count).tolist(), (nats / count).tolist()

    def validate(self, step: int) -> dict[str, float]:
        """Score all active replicas, end those that have a reason to stop; numbers for the log."""
        accuracies, nats = self.evaluate("val")
        tests = self.evaluate("test")[0] if self.experiments[0].test_curve else []
        finished, logged = [], {}
        for row, r in enumerate(self.active):
            one, progress = self.experiments[r], self.progress[r]
            module: Any = _Row(self.model, row)
            progress.record(step, accuracies[row], module, tests[row] if tests else None)
            observe(self.schedules[r], nats[row])
            logged |= {f"val/{r}/accuracy": accuracies[row], f"val/{r}/nll_nats": nats[row]}
            tired = one.early_stop and progress.waited >= one.stop_patience
            if accuracies[row] >= one.stop_accuracy or tired:
                finished.append(row)
        if finished:
            self.take_out(finished)
        return logged

    # ------------------------------------------------------------ results

    def last(self, r: int) -> dict[str, Tensor]:
        """The last weights of a replica; before the step at which it diverged, if it did."""
        return self.ended[r] if r in self.ended else self.model.state(self.active.index(r))

    def results(self, run: Run | None = None) -> list[dict[str, Any]]:
        """What `mad.train` returns, for every replica; {"failed": why} for one that diverged.

        A run also gets the files that each training has of its own, numbered.
        """
        found = []
        for r, one in enumerate(self.experiments):
            if r in self.died:
                found.append({FAILED: self.why(r)})
                continue
            self.template.load_state_dict(self.last(r))
            data = self.rows.splits[self.rows.source[r]]
            with self.autocast():
                results, rows = score_run(one, self.tasks[r], self.template, self.progress[r], data)
            found.append(results)
            if run is not None:
                run.save_tensors(f"test_rows_{r}.safetensors", rows)
            if run is not None and one.save_checkpoints:
                run.save_tensors(f"model_last_{r}.safetensors", self.last(r))
                run.save_tensors(f"model_{r}.safetensors", self.progress[r].weights)
        return found

    def why(self, r: int) -> str:
        """One sentence about a replica that diverged."""
        one = self.experiments[r]
        return (
            f"DivergedError: loss or gradient not finite at step {self.died[r]} (lr {one.lr}, "
            f"weight_decay {one.weight_decay}, seed {one.seed}); lower the learning rate"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as a tree."""
        return {
            "active": list(self.active),
            "weights": self.model.weights,
            "count": self.optimizer.count,
            "mean": self.optimizer.mean,
            "square": self.optimizer.square,
            "alive": self.alive,
            "death": self.death,
            "ended": {str(r): weights for r, weights in self.ended.items()},
            "died": {str(r): step for r, step in self.died.items()},
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "progress": [progress.state_dict() for progress in self.progress],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, into replicas made from the same experiments."""
        left = set(state["active"])
        out = [row for row, r in enumerate(self.active) if r not in left]
        if out:
            self.take_out(out)
        self.model.weights = state["weights"].to(self.model.weights)
        self.optimizer.count = state["count"]
        self.optimizer.mean = state["mean"].to(self.model.weights)
        self.optimizer.square = state["square"].to(self.model.weights)
        self.alive, self.death = (state[name].to(self.device) for name in ("alive", "death"))
        self.ended = {int(r): weights for r, weights in state["ended"].items()}
        self.died = {int(r): step for r, step in state["died"].items()}
        for schedule, one in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(one)
        for progress, one in zip(self.progress, state["progress"], strict=True):
            progress.load_state_dict(one)


def train_stacked(
    experiments: Sequence[Experiment], run: Run | None = None
) -> list[dict[str, Any]]:
    """Train all experiments as one stack; the results of each as `mad.train.main` returns them.

    They may differ in learning rates and schedules, weight decay, seed, stopping rules, training
    targets, and in task options that leave vocabulary, length and number of rows as they are.
    With an open `run` there are checkpoints to continue from and metrics; without, no file is
    touched and the first experiment's `run` block says which device and number format to use.

    Raises:
        ConfigError: the experiments are not one program.
    """
    if run is None:
        from workbench.device import choose

        options = experiments[0].run if experiments else Experiment().run
        chosen = choose(options.device, options.dtype, options.threads)
    else:
        chosen = run.device
    replicas = Replicas(experiments, chosen.device, chosen.dtype)
    fit(replicas, run)
    return replicas.results(run)


def fit(replicas: Replicas, run: Run | None = None) -> None:
    """Train until every replica has stopped or no step is left."""
    first = replicas.experiments[0]
    total = first.epochs * replicas.steps_per_epoch
    validate_every = first.evaluate_every or replicas.steps_per_epoch
    save_every = first.save_every or max(100, validate_every)
    steps: Iterator[int] = iter(range(1, total + 1))
    if run is not None:
        saves = save_every if first.save_checkpoints else total
        steps = run.steps(total, {"replicas": replicas}, save_every=saves)
    for step in steps:
        if not replicas.active:
            break
        losses = replicas.train_step(step)
        at_validation = step % validate_every == 0 or step == total
        if step % LOOK_EVERY == 0 or at_validation:
            if run is not None:
                values = zip(replicas.active, losses.tolist(), strict=True)
                run.log(step, {f"train/{r}/loss_nats": value for r, value in values})
            replicas.look()
        if at_validation and replicas.active:
            logged = replicas.validate(step)
            if run is not None:
                run.log(step, logged)
