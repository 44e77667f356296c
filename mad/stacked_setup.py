"""What a stack of trainings is made of: one model each, their rows, and what they must share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mad.model import build_model
from mad.protocols import build_optimizer, build_schedule, protocol_named
from mad.registry import backbone_of, build_task
from mad.tasks.task import Split, Task, generate
from mad.train import Experiment, task_options
from workbench.errors import ConfigError
from workbench.seeding import Streams

SHARED = (
    "layers",
    "dim",
    "backbone",
    "global_pool",
    "max_length",
    "protocol",
    "optimizer",
    "batch_size",
    "epochs",
    "num_test_examples",
    "evaluate_every",
    "save_every",
    "save_checkpoints",
    "test_curve",
)
"""Settings that every replica must have in common: they decide what is computed, and when."""


def make_model(experiment: Experiment, task: Task, seed: int) -> nn.Module:
    """The model that `mad.train` makes for this experiment."""
    backbone = experiment.backbone or backbone_of(task)
    pooled = {"global_pool": experiment.global_pool} if backbone == "autoencoder" else {}
    return build_model(
        experiment.layers,
        vocab_size=task.vocab_size,
        width=experiment.dim,
        max_length=experiment.max_length or task.length,
        seed=seed,
        backbone=backbone,
        **pooled,
    )


def check(experiments: Sequence[Experiment]) -> None:
    """Raise ConfigError unless the experiments are one program on different numbers."""
    if not experiments:
        raise ConfigError("no experiments to stack; give at least one")
    first = experiments[0]
    shape: tuple[Any, ...] = ()
    for index, one in enumerate(experiments):
        for name in SHARED:
            if getattr(one, name) != getattr(first, name):
                raise ConfigError(
                    f"experiment {index} has {name}={getattr(one, name)!r}, the first one "
                    f"{getattr(first, name)!r}; a stack shares {', '.join(SHARED)}: make two stacks"
                )
        if one.zenodo is not None:
            raise ConfigError(
                f"experiment {index} reads published rows (zenodo={one.zenodo}); a stack draws its "
                "own: make such runs one by one"
            )
        task, n_train = build_task(one.task, task_options(one))
        own = type(task).__name__, task.vocab_size, task.length, n_train
        shape = shape or own
        if own != shape:
            raise ConfigError(
                f"experiment {index} is {own} (task, vocabulary, length, training rows), the first "
                f"one {shape}; rows of one shape can be stacked: make two stacks"
            )


def make_decay(experiment: Experiment, model: nn.Module) -> Tensor:
    """The weight decay of every parameter, in one row."""
    optimizer = build_optimizer(
        model,
        experiment.optimizer,
        lr=experiment.lr,
        weight_decay=experiment.weight_decay,
        protocol=experiment.protocol,
    )
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    return torch.cat(
        [
            torch.full((p.numel(),), decays[id(p)], device=p.device, dtype=p.dtype)
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def make_schedule(experiment: Experiment, steps_per_epoch: int) -> Any:
    """The learning-rate schedule of one replica."""
    return build_schedule(
        torch.optim.SGD([torch.zeros(1)], lr=experiment.lr),  # only its rate is asked for
        experiment.scheduler or protocol_named(experiment.protocol).schedule,
        epochs=experiment.epochs,
        steps_per_epoch=steps_per_epoch,
        floor=experiment.min_lr / experiment.lr,
        plateau_patience=experiment.plateau_patience,
        plateau_factor=experiment.plateau_factor,
    )


class StackedRows:
    """The rows of every replica on the device; those with the same task and seed share them."""

    def __init__(
        self, experiments: Sequence[Experiment], tasks: Sequence[Task], n_train: int, device: Any
    ) -> None:
        self.experiments, self.n_train, self.device = experiments, n_train, device
        self.streams = [Streams(one.seed) for one in experiments]
        self.batch_size = min(experiments[0].batch_size, n_train)
        self.steps_per_epoch = -(-n_train // self.batch_size)
        n_test = experiments[0].num_test_examples
        sizes: dict[Split, int] = {"train": n_train, "val": n_test, "test": n_test}
        drawn: dict[Any, int] = {}
        self.splits: list[dict[Split, tuple[Tensor, ...]]] = []
        self.source: list[int] = []
        for task, streams in zip(tasks, self.streams, strict=True):
            seed = streams.integer("data")
            if (task, seed) not in drawn:
                drawn[task, seed] = len(self.splits)
                self.splits.append(
                    {
                        split: tuple(
                            torch.from_numpy(part).to(device, torch.int32)
                            for part in generate(task, n, split, seed)
                        )
                        for split, n in sizes.items()
                    }
                )
            self.source.append(drawn[task, seed])
        self.stacked = {
            split: tuple(
                torch.stack(part) for part in zip(*(one[split] for one in self.splits), strict=True)
            )
            for split in sizes
        }  # each (distinct data, rows, L)
        self._orders: tuple[tuple[int, ...], Tensor] | None = None

    def sources(self, active: Sequence[int]) -> Int[Tensor, " replicas"]:
        """Where in the stacked data the rows of these replicas stand."""
        return torch.tensor([self.source[r] for r in active], device=self.device)

    def order(self, epoch: int, active: Sequence[int]) -> Int[Tensor, "replicas rows"]:
        """Each replica's own order of the training rows."""
        if self._orders is not None and self._orders[0] == (epoch, *active):
            return self._orders[1]
        own: dict[int, Tensor] = {}
        for r in active:
            seed = self.experiments[r].seed
            if seed not in own:
                rng = self.streams[r]("order", index=epoch)
                own[seed] = torch.from_numpy(rng.permutation(self.n_train))
        rows = torch.stack([own[self.experiments[r].seed] for r in active]).to(self.device)
        self._orders = (epoch, *active), rows
        return rows

    def batch(
        self, step: int, active: Sequence[int]
    ) -> tuple[Int[Tensor, "replicas batch time"], Int[Tensor, "replicas batch time"]]:
        """Inputs and targets of one step."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        rows = self.order(epoch, active)[:, at * self.batch_size : (at + 1) * self.batch_size]
        source = self.sources(active)[:, None]
        inputs, answers, dense = self.stacked["train"]
        wanted = [self.experiments[r].train_targets == "dense" for r in active]
        if all(wanted) or not any(wanted):
            return inputs[source, rows], (dense if wanted[0] else answers)[source, rows]
        mask = torch.tensor(wanted, device=self.device)[:, None, None]
        return inputs[source, rows], torch.where(mask, dense[source, rows], answers[source, rows])
