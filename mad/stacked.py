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
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mad.model import build_model
from mad.protocols import build_optimizer, build_schedule, observe, protocol_named
from mad.registry import backbone_of, build_task
from mad.tasks.task import IGNORE, Split, Task, generate
from mad.train import Experiment, Progress, score_run, task_options
from workbench.errors import ConfigError
from workbench.run import Run
from workbench.seeding import Streams
from workbench.sweep import FAILED

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

LOOK_EVERY = 10
"""Steps between looks at which replicas diverged: a look waits for the device."""


class StackedModel:
    """R models of one structure: all weights in one (R, P) tensor, one forward pass for all.

    Attention takes torch's plain form (its fused kernels have no rule for a stacked axis on a CPU).
    Buffers are stacked too, but what a layer writes into them in `forward` is not kept.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.blank = copy.deepcopy(models[0]).to("meta")
        kept = [dict(model.named_parameters()) for model in models]
        self.shapes = {name: p.shape for name, p in kept[0].items() if p.requires_grad}
        for model, parameters in zip(models, kept, strict=True):
            found = {name: p.shape for name, p in parameters.items() if p.requires_grad}
            if found != self.shapes:
                raise ConfigError(
                    f"replicas differ in their parameters: {type(model).__name__} has "
                    f"{sorted(set(found.items()) ^ set(self.shapes.items()))[:4]}; a stack holds "
                    "models of one structure"
                )
        self.weights = torch.stack(
            [torch.cat([own[name].detach().flatten() for name in self.shapes]) for own in kept]
        )
        constants = [
            {name: p.detach() for name, p in own.items() if name not in self.shapes}
            | dict(model.named_buffers())
            for own, model in zip(kept, models, strict=True)
        ]
        self.constants = {
            name: torch.stack([one[name] for one in constants]) for name in constants[0]
        }

    def named(self, weights: Float[Tensor, "*replicas params"]) -> dict[str, Tensor]:
        """The parameters by name, as views."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for (name, shape), part in zip(
                self.shapes.items(), weights.split(sizes, dim=-1), strict=True
            )
        }

    def __call__(
        self,
        weights: Float[Tensor, "replicas params"],
        ids: Int[Tensor, "replicas batch time"],
    ) -> Float[Tensor, "replicas batch time vocab"]:
        """Logits of every replica on its own rows."""

        def one(parameters: dict[str, Tensor], constants: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.blank, parameters | constants, (x,))

        with sdpa_kernel(SDPBackend.MATH):
            return vmap(one, randomness="different")(self.named(weights), self.constants, ids)

    def state(self, row: int) -> dict[str, Tensor]:
        """What `state_dict` of that replica's own module would give, as copies."""
        own = self.named(self.weights[row]) | {k: v[row] for k, v in self.constants.items()}
        return {name: own[name].detach().clone() for name in self.blank.state_dict()}

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Take all other replicas out."""
        self.weights = self.weights[rows]
        self.constants = {name: value[rows] for name, value in self.constants.items()}


class _Row:
    """One replica, in the role of a module of which a copy of the weights is wanted."""

    def __init__(self, model: StackedModel, row: int) -> None:
        self.model, self.row = model, row

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state(self.row)


class StackedOptimizer:
    """AdamW or SGD with a learning rate, a weight decay and a gradient norm per replica.

    AdamW as torch has it: w ← (1 − ηλ) w − η m̂ / (√v̂ + 10⁻⁸)   [arXiv 1711.05101, alg. 2]. Rows of
    a replica that is not `alive` stay as they are.
    """

    def __init__(
        self,
        kind: str,
        weights: Float[Tensor, "replicas params"],
        decay: Float[Tensor, "replicas params"],
        betas: tuple[float, float],
        clip_norm: float,
    ) -> None:
        self.kind, self.decay, self.betas, self.clip_norm = kind, decay, betas, clip_norm
        self.count = 0
        self.mean = torch.zeros_like(weights)
        self.square = torch.zeros_like(weights)

    def norm(self, gradient: Float[Tensor, "replicas params"]) -> Float[Tensor, " replicas"]:
        """2-norm of every replica's gradient."""
        return torch.linalg.vector_norm(gradient, dim=-1)

    def update(
        self,
        weights: Float[Tensor, "replicas params"],
        gradient: Float[Tensor, "replicas params"],
        norm: Float[Tensor, " replicas"],
        lr: Float[Tensor, " replicas"],
        alive: Bool[Tensor, " replicas"],
    ) -> None:
        """Clip and step, in place."""
        self.count += 1
        alive, rate = alive[:, None], lr[:, None]
        if self.clip_norm > 0:
            share = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradient = gradient * share[:, None]
        if self.kind == "sgd":
            new = weights - rate * (gradient + self.decay * weights)
        else:
            first, second = self.betas
            mean = torch.lerp(self.mean, gradient, 1 - first)
            square = self.square * second + (1 - second) * gradient * gradient
            self.mean = torch.where(alive, mean, self.mean)
            self.square = torch.where(alive, square, self.square)
            scale = (square / (1 - second**self.count)).sqrt() + 1e-8
            step = mean / (1 - first**self.count) / scale
            new = weights * (1 - rate * self.decay) - rate * step
        weights.copy_(torch.where(alive, new, weights))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Take all other replicas out."""
        self.decay, self.mean, self.square = (
            part[rows] for part in (self.decay, self.mean, self.square)
        )


class Replicas:
    """The state of a stacked training: what `mad.train` holds for one run, for each replica."""

    def __init__(
        self, experiments: Sequence[Experiment], device: torch.device, dtype: torch.dtype
    ) -> None:
        check(experiments)
        self.experiments = list(experiments)
        self.streams = [Streams(one.seed) for one in experiments]
        self.device, self.dtype = device, dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        first = experiments[0]
        protocol = protocol_named(first.protocol)
        self.tasks: list[Task] = []
        models, decay, self.schedules = [], [], []
        for one, streams in zip(experiments, self.streams, strict=True):
            task, self.n_train = build_task(one.task, task_options(one))
            self.tasks.append(task)
            model = make_model(one, task, streams.integer("init")).to(device, wide)
            models.append(model)
            optimizer = build_optimizer(
                model,
                one.optimizer,
                lr=one.lr,
                weight_decay=one.weight_decay,
                protocol=one.protocol,
            )
            decays = {
                id(p): group["weight_decay"] for group in optimizer.param_groups
                for p in group["params"]
            }  # fmt: skip
            decay.append(
                torch.cat(
                    [
                        torch.full((p.numel(),), decays[id(p)], device=device, dtype=wide)
                        for p in model.parameters()
                        if p.requires_grad
                    ]
                )
            )
            self.schedules.append(
                build_schedule(
                    torch.optim.SGD([torch.zeros(1)], lr=one.lr),  # only its rate is asked for
                    one.scheduler or protocol.schedule,
                    epochs=one.epochs,
                    steps_per_epoch=self.steps_per_epoch,
                    floor=one.min_lr / one.lr,
                    plateau_patience=one.plateau_patience,
                    plateau_factor=one.plateau_factor,
                )
            )
        self.model = StackedModel(models)
        self.template = models[0]
        self.optimizer = StackedOptimizer(
            first.optimizer,
            self.model.weights,
            torch.stack(decay),
            protocol.betas,
            protocol.clip_norm,
        )
        self.progress = [Progress() for _ in experiments]
        self.active = list(range(len(experiments)))
        self.ended: dict[int, dict[str, Tensor]] = {}
        self.died: dict[int, int] = {}
        self.alive = torch.ones(len(experiments), dtype=torch.bool, device=device)
        self.death = torch.zeros(len(experiments), dtype=torch.long, device=device)
        self.load_data()

    @property
    def batch_size(self) -> int:
        """Rows per step of each replica."""
        return min(self.experiments[0].batch_size, self.n_train)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training row is seen once."""
        return -(-self.n_train // self.batch_size)

    # ------------------------------------------------------------ data

    def load_data(self) -> None:
        """Draw the rows of every replica; those with the same task and seed share them."""
        n_test = self.experiments[0].num_test_examples
        sizes: dict[Split, int] = {"train": self.n_train, "val": n_test, "test": n_test}
        drawn: dict[Any, int] = {}
        splits: list[dict[Split, tuple[Tensor, ...]]] = []
        self.source: list[int] = []
        for task, streams in zip(self.tasks, self.streams, strict=True):
            seed = streams.integer("data")
            if (task, seed) not in drawn:
                drawn[task, seed] = len(splits)
                splits.append(
                    {
                        split: tuple(
                            torch.from_numpy(part).to(self.device, torch.int32)
                            for part in generate(task, n, split, seed)
                        )
                        for split, n in sizes.items()
                    }
                )
            self.source.append(drawn[task, seed])
        self.splits = splits
        self.stacked = {
            split: tuple(
                torch.stack(part) for part in zip(*(one[split] for one in splits), strict=True)
            )
            for split in sizes
        }  # each (distinct data, rows, L)
        self._orders: tuple[int, Tensor] | None = None

    def sources(self) -> Int[Tensor, " replicas"]:
        """Where in the stacked data the rows of each active replica stand."""
        return torch.tensor([self.source[r] for r in self.active], device=self.device)

    def order(self, epoch: int) -> Int[Tensor, "replicas rows"]:
        """Each active replica's own order of the training rows."""
        if self._orders is not None and self._orders[0] == epoch:
            return self._orders[1]
        own: dict[int, Tensor] = {}
        for r in self.active:
            seed = self.experiments[r].seed
            if seed not in own:
                rng = self.streams[r]("order", index=epoch)
                own[seed] = torch.from_numpy(rng.permutation(self.n_train))
        rows = torch.stack([own[self.experiments[r].seed] for r in self.active]).to(self.device)
        self._orders = epoch, rows
        return rows

    def batch(
        self, step: int
    ) -> tuple[Int[Tensor, "replicas batch time"], Int[Tensor, "replicas batch time"]]:
        """Inputs and targets of one step."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        rows = self.order(epoch)[:, at * self.batch_size : (at + 1) * self.batch_size]
        source = self.sources()[:, None]
        inputs, answers, dense = self.stacked["train"]
        wanted = [self.experiments[r].train_targets == "dense" for r in self.active]
        if all(wanted) or not any(wanted):
            return inputs[source, rows], (dense if wanted[0] else answers)[source, rows]
        mask = torch.tensor(wanted, device=self.device)[:, None, None]
        return inputs[source, rows], torch.where(mask, dense[source, rows], answers[source, rows])

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
        self._orders = None

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[list[float], list[float]]:
        """Micro accuracy and mean nats of every active replica on a split."""
        source, size = self.sources(), self.experiments[0].batch_size
        inputs, answers, _ = self.stacked[split]
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
            data = self.splits[self.source[r]]
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
