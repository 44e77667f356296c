"""Train one stack of layers on one synthetic task and score it.   [arXiv 2403.17844, MAD]

    python -m mad.train --task in-context-recall --layers mh-attention swiglu mh-attention swiglu
    python -m mad.train --config configs/mad/train.tiny.yaml
    python -m mad.train --task memorization --layers mh-hyena mlp mh-hyena mlp --epochs 20

Task options that are not given take the task's published baseline; given ones win. What a task has
beside the flags below is set with `--options name=value`.

Flags of the published script and what they are here: `--accelerator`, `--precision` and
`--log-to-wandb` set `--device`, `--dtype` and `--wandb`; `--log-base-path` is `--root`. Metrics are
always written to `metrics.jsonl` (`--log-to-csv`), and rows are drawn in the process itself in less
than a second, so there are no `--num-data-workers`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mad import report
from mad.protocols import PROTOCOLS, build_optimizer, build_schedule, observe, protocol_named
from mad.registry import (
    assignments,
    backbone_of,
    build_task,
    parse_layer,
    stack_name,
)
from mad.tasks.task import Rows, Split, Task, generate
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from torch import Tensor, nn


DTYPE_OF = {
    "auto": "auto",
    "bf16": "bfloat16",
    "16": "float16",
    "32": "float32",
    "64": "float64",
}
"""Published names of number formats, less what follows a dash."""

Precision = Literal["auto", "bf16", "bf16-mixed", "16", "16-mixed", "32", "32-true", "64"]


@dataclass(frozen=True)
class Experiment:
    """Which layers on which task, trained how."""

    task: str = "in-context-recall"
    """Task name, or module:Class of your own."""
    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """Layers in order, with options if any (`mh-attention,num_heads=4`), or module:Class."""

    vocab_size: int | None = None
    """Number of tokens, special ones included."""
    seq_len: int | None = None
    """Sequence length."""
    multi_query: bool = True
    """Recall: score every repeated key, not only the last."""
    noise_vocab_size: int | None = None
    """Number of noise tokens."""
    frac_noise: float | None = None
    """Probability of a noise pair in a slot."""
    num_tokens_to_copy: int | None = None
    """Copying: tokens to remember."""
    k_motif_size: int | None = None
    """Fuzzy recall: largest number of tokens in a key."""
    v_motif_size: int | None = None
    """Fuzzy recall: largest number of tokens in a value."""
    target_ignore_index: int = -100
    """Target of positions that are not scored; published and fixed."""
    options: tuple[str, ...] = ()
    """Further options of the task, as name=value (`map_seed=7`)."""
    num_train_examples: int | None = None
    """Training rows."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    zenodo: Path | None = None
    """Folder of the published data sets: train and test rows from there, validation drawn here."""

    dim: int = 128
    """Width of the model."""
    backbone: Literal["language-model", "autoencoder"] | None = None
    """Language model or auto-encoder; none means the one the task is made for."""
    global_pool: Literal["last", "cls", "avg"] = "last"
    """Auto-encoder: the last position, an extra one or the mean is the code."""
    max_length: int | None = None
    """Length that Hyena's filters are made for; none means the task's."""

    protocol: Literal["lab", "mad-code", "mad-paper"] = "lab"
    """Betas, schedule, clipping and which weights are scored."""
    train_targets: Literal["dense", "answers"] = "dense"
    """Recall tasks: learn to predict every next token (as published) or the answers only."""
    batch_size: int = 128
    """Rows per step."""
    epochs: int = 200
    """Passes over the training rows."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser."""
    scheduler: Literal["cosine", "cosine-epochs", "plateau", "none"] | None = None
    """Learning-rate schedule; none given means the protocol's."""
    plateau_patience: int = 5
    """Scheduler plateau: validations without a lower loss before the rate falls."""
    plateau_factor: float = 0.9
    """Scheduler plateau: the rate is multiplied by this when it falls."""
    lr: float = 5e-4
    """Largest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of a cosine schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    stop_accuracy: float = 0.999
    """Stop once validation accuracy reaches this; above 1 never."""
    early_stop: bool = False
    """Also stop after `stop_patience` validations without a better accuracy."""
    stop_patience: int = 20
    """Validations that `early_stop` waits for a better accuracy."""
    test_curve: bool = True
    """Score the test split at every validation too, for the optimistic best of them."""
    evaluate_every: int | None = None
    """Steps between validations; none means one epoch."""
    save_every: int | None = None
    """Steps between checkpoints; none means the validation period, at least 100."""
    save_checkpoints: bool = True
    """Save on the way, to continue from, and keep the best and the last weights."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] | None = None
    """Published name of --device."""
    precision: Precision | None = None
    """Published name of --dtype: bf16 is bfloat16, 16 float16, 32 float32, 64 float64."""
    log_to_wandb: bool = False
    """Published name of --wandb."""
    seed: int = 12345
    """Seed of all named streams: data, initialisation, order."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        self.take_published_names()
        for name in ("num_test_examples", "dim", "batch_size", "epochs", "stop_patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("num_train_examples", "evaluate_every", "save_every", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; expected at least 1")
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise ConfigError(
                f"min_lr={self.min_lr} and lr={self.lr}: expected 0 ≤ min_lr ≤ lr > 0"
            )
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay={self.weight_decay} is negative")
        if not 0 < self.plateau_factor < 1 or self.plateau_patience < 0:
            raise ConfigError(
                f"plateau_factor={self.plateau_factor} and plateau_patience="
                f"{self.plateau_patience}: expected a factor between 0 and 1 and a patience from 0"
            )
        if self.zenodo is not None and self.train_targets != "dense":
            raise ConfigError(
                "the published data sets hold dense training targets only: leave --train-targets "
                "as it is, or draw the rows (no --zenodo)"
            )
        if self.target_ignore_index != -100:
            raise ConfigError(
                f"target_ignore_index={self.target_ignore_index}: the rows drawn here mark what is "
                "not scored with -100, as the published ones do; leave it at -100"
            )
        self.check_model()
        build_task(self.task, task_options(self))

    def take_published_names(self) -> None:
        """Move `accelerator`, `precision` and `log_to_wandb` into the run block they stand for."""
        changes: dict[str, Any] = {}
        if self.accelerator is not None:
            changes["device"] = {"gpu": "cuda"}.get(self.accelerator, self.accelerator)
        if self.precision is not None:
            changes["dtype"] = DTYPE_OF[self.precision.partition("-")[0]]
        if self.log_to_wandb:
            changes["wandb"] = True
        if changes:
            object.__setattr__(self, "run", replace(self.run, **changes))
        for name, value in (("accelerator", None), ("precision", None), ("log_to_wandb", False)):
            object.__setattr__(self, name, value)

    def check_model(self) -> None:
        """Refuse layers that do not exist before anything is made."""
        if not self.layers:
            raise ConfigError(
                "no layers given; name at least one, e.g. --layers mh-attention swiglu"
            )
        for layer in self.layers:
            parse_layer(layer)

    @property
    def stack(self) -> str:
        """The model's name in results and reports."""
        return stack_name(self.layers)


TASK_FLAGS = (
    "vocab_size",
    "seq_len",
    "noise_vocab_size",
    "frac_noise",
    "num_tokens_to_copy",
    "k_motif_size",
    "v_motif_size",
    "num_train_examples",
)
"""Fields of `Experiment` that a task or its number of training rows takes when they are given."""


def task_options(experiment: Experiment) -> dict[str, Any]:
    """The options the user gave to the task; what is left out takes the task's baseline."""
    flags = {name: getattr(experiment, name) for name in TASK_FLAGS}
    given = {name: value for name, value in flags.items() if value is not None}
    if not experiment.multi_query:
        given["multi_query"] = False
    return given | assignments(experiment.options, f"options of task {experiment.task}")


EXPERIMENT = Experiment()  # edit me


class Progress:
    """Validation history and the best weights so far: the part of the state that is no module."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self.accuracy = -1.0
        self.step = 0
        self.waited = 0
        self.weights: dict[str, Tensor] = {}

    def record(
        self, step: int, accuracy: float, model: nn.Module, test_accuracy: float | None = None
    ) -> None:
        """Note a validation accuracy; copy the weights if none was higher before."""
        point = {"step": step, "accuracy": accuracy}
        self.curve.append(point if test_accuracy is None else point | {"test": test_accuracy})
        self.waited += 1
        if accuracy > self.accuracy:
            self.accuracy, self.step, self.waited = accuracy, step, 0
            self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a tree."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        vars(self).update(state)


def main(experiment: Experiment) -> dict[str, Any]:
    """Train, select on validation, score on test; returns the results of the run."""
    with Run.open("mad.train", experiment) as run:
        if run.finished:
            return run.results
        from mad.model import build_model

        task, _ = build_task(experiment.task, task_options(experiment))
        backbone = experiment.backbone or backbone_of(task)
        if experiment.backbone is None and backbone != "language-model":
            run.note(f"{experiment.task} is made for the backbone {backbone}: using it")
        pooled = {"global_pool": experiment.global_pool} if backbone == "autoencoder" else {}
        model = build_model(
            experiment.layers,
            vocab_size=task.vocab_size,
            width=experiment.dim,
            max_length=experiment.max_length or task.length,
            seed=run.streams.integer("init"),
            backbone=backbone,
            **pooled,
        )
        return fit(run, experiment, model)


def draw_splits(run: Run, experiment: Experiment, task: Task, n_train: int) -> dict[Split, Rows]:
    """The rows of every split: drawn from the run's seed, or the published ones.

    The published data sets have no validation split; it is drawn, from a stream of its own.

    Raises:
        DataError: a published array is missing, damaged or of another shape or vocabulary.
    """
    seed, some = run.streams.integer("data"), experiment.num_test_examples
    if experiment.zenodo is None:
        sizes: dict[Split, int] = {"train": n_train, "val": some, "test": some}
        return {split: generate(task, n, split, seed) for split, n in sizes.items()}
    import numpy as np

    from mad.store import PUBLISHED_SEED, DataSet, load_published, verify_published

    published = DataSet(experiment.task, task, n_train, some, PUBLISHED_SEED)
    digests = verify_published(experiment.zenodo, published)
    text = " ".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    run.require_same("data", hashlib.sha256(text.encode()).hexdigest())
    run.note(f"train and test rows of {experiment.zenodo / published.published_name}")
    splits: tuple[Split, ...] = ("train", "test")
    rows = {
        split: Rows(
            *(np.array(part) for part in load_published(experiment.zenodo, published, split))
        )
        for split in splits
    }
    return {"train": rows["train"], "val": generate(task, some, "val", seed), "test": rows["test"]}


def fit(run: Run, experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    """Train `model` inside an open run, score it, write the report; returns the results."""
    import torch
    import torch.nn.functional as F

    from mad.evaluate import evaluate
    from mad.tasks.task import IGNORE
    from workbench.optim import clip

    device, dtype = run.device.device, run.device.dtype
    mixed = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    protocol = protocol_named(experiment.protocol)
    task, n_train = build_task(experiment.task, task_options(experiment))
    run.note(f"{task}, {n_train} training rows; {experiment.stack}")

    data: dict[Split, tuple[Tensor, ...]] = {
        split: tuple(
            torch.from_numpy(part).to(device, torch.int32)  # the whole split stays resident
            for part in rows
        )
        for split, rows in draw_splits(run, experiment, task, n_train).items()
    }
    inputs, answers, dense = data["train"]
    targets = dense if experiment.train_targets == "dense" else answers

    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = build_optimizer(
        model,
        experiment.optimizer,
        lr=experiment.lr,
        weight_decay=experiment.weight_decay,
        protocol=experiment.protocol,
    )
    batch_size = min(experiment.batch_size, n_train)
    steps_per_epoch = -(-n_train // batch_size)
    steps = experiment.epochs * steps_per_epoch
    schedule = build_schedule(
        optimizer,
        experiment.scheduler or protocol.schedule,
        epochs=experiment.epochs,
        steps_per_epoch=steps_per_epoch,
        floor=experiment.min_lr / experiment.lr,
        plateau_patience=experiment.plateau_patience,
        plateau_factor=experiment.plateau_factor,
    )
    progress = Progress()
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "progress": progress}
    validate_every = experiment.evaluate_every or steps_per_epoch
    save_every = experiment.save_every or max(100, validate_every)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        permutation = run.streams("order", index=epoch).permutation(n_train)
        return torch.from_numpy(permutation).to(device)

    def validate(step: int) -> str:
        """Score the present weights; why training should stop, or nothing."""
        with mixed:
            score = evaluate(model, *data["val"][:2], batch_size=experiment.batch_size)
            logged, test = score.named("val"), None
            if experiment.test_curve:
                seen = evaluate(model, *data["test"][:2], batch_size=experiment.batch_size)
                logged, test = logged | {"test/accuracy": seen.accuracy}, seen.accuracy
        progress.record(step, score.accuracy, model, test)
        observe(schedule, score.nll_nats)
        run.log(step, logged)
        if score.accuracy >= experiment.stop_accuracy:
            return f"validation accuracy {score.accuracy:.4f}"
        if experiment.early_stop and progress.waited >= experiment.stop_patience:
            return f"no better validation accuracy in {progress.waited} validations"
        return ""

    for step in run.steps(
        steps, state, save_every=save_every if experiment.save_checkpoints else steps
    ):
        epoch, at = divmod(step - 1, steps_per_epoch)
        rows = order(epoch)[at * batch_size : (at + 1) * batch_size]
        with mixed:
            logits = model(inputs[rows])  # (B, L, V)
        loss = F.cross_entropy(
            (logits if dtype == torch.float64 else logits.float()).flatten(0, 1),
            targets[rows].long().flatten(),
            ignore_index=IGNORE,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip(model.parameters(), protocol.clip_norm)
        batch = {"inputs": inputs[rows], "targets": targets[rows]}
        run.require_finite(step, batch, loss=loss, gradient_norm=norm)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        if run.every(step, 10):
            run.log(step, {"train/loss_nats": loss, "train/gradient_norm": norm, "lr": lr})
        if run.every(step, validate_every) or step == steps:
            reason = validate(step)
            if reason:
                run.note(f"step {step}: {reason}, stopping")
                break

    about = {"layers": " ".join(experiment.layers), "task": experiment.task}
    if experiment.save_checkpoints:
        last = {name: value.detach().clone() for name, value in model.state_dict().items()}
        run.save_tensors("model_last.safetensors", last, about)
    with mixed:
        results, rows = score_run(experiment, task, model, progress, data)
    if experiment.save_checkpoints:
        run.save_tensors("model.safetensors", progress.weights, about)
    run.save_tensors("test_rows.safetensors", rows)
    report.draw_run(run, results)
    return run.finish(
        results,
        title=f"{results['stack']} on {experiment.task}",
        question="Does this stack of layers learn the task?",
        summary=report.describe(results),
    )


def score_run(
    experiment: Experiment,
    task: Task,
    model: nn.Module,
    progress: Progress,
    data: dict[Split, tuple[Tensor, ...]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Test scores of the last and of the selected weights, and what they have to be read beside.

    The second part holds the right answers and scored positions of each test row, for resampling.
    Leaves the selected weights in the model.
    """
    from mad.evaluate import evaluate
    from mad.model import account

    size, some = experiment.batch_size, experiment.num_test_examples
    last = evaluate(model, *data["test"][:2], batch_size=size)
    model.load_state_dict(progress.weights)
    selected = evaluate(model, *data["test"][:2], batch_size=size)
    inputs, answers, dense = (part[:some] for part in data["train"])
    masked = evaluate(model, inputs, answers, batch_size=size)
    full = evaluate(model, inputs, dense, batch_size=size)
    score = selected if PROTOCOLS[experiment.protocol].selected else last
    n_train = len(data["train"][0])
    costs = account(model, task.length) if hasattr(model, "layers") else []
    results = {
        "task": experiment.task,
        "stack": experiment.stack,
        "test_accuracy": score.accuracy,
        "test_accuracy_low": score.low,
        "test_accuracy_high": score.high,
        "test_accuracy_macro_batch": score.accuracy_macro_batch,
        "test_accuracy_sequence": score.accuracy_sequence,
        "test_nll_nats": score.nll_nats,
        "test_accuracy_last": last.accuracy,
        "test_accuracy_selected": selected.accuracy,
        "validation_accuracy": progress.accuracy,
        "train_accuracy": masked.accuracy,
        "train_nll_nats": masked.nll_nats,
        "train_accuracy_dense": full.accuracy,
        "train_nll_dense_nats": full.nll_nats,
        "chance": task.chance(),
        "ceiling": task.ceiling(n_train),
        "n_scored": score.n_scored,
        "n_rows": score.n_rows,
        "steps": progress.curve[-1]["step"],
        "steps_selected": progress.step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": sum(cost.params for cost in costs),
        "state_floats": sum(cost.state_floats for cost in costs),
        "flops_per_token": sum(cost.flops_per_token for cost in costs),
        "vocab_size": task.vocab_size,
        "seq_len": task.seq_len,
        "num_train_examples": n_train,
        "protocol": experiment.protocol,
        "curve": progress.curve,
    }
    if experiment.test_curve:  # chosen by looking at the test split: larger than it ought to be
        seen = [point["test"] for point in progress.curve]
        results["test_accuracy_max_optimistic"] = max([*seen, last.accuracy])
    return results, {"correct": score.correct, "scored": score.scored}


if __name__ == "__main__":
    cli(main, EXPERIMENT)
