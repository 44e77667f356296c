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
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mad import report
from mad.experiment import DTYPE_OF, TASK_FLAGS, Experiment, Precision, task_options
from mad.protocols import PROTOCOLS, build_optimizer, build_schedule, observe, protocol_named
from mad.registry import backbone_of, build_task
from mad.tasks.task import Rows, Split, Task, generate
from workbench.cli import cli
from workbench.run import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Splits = dict[Split, tuple[Tensor, ...]]

__all__ = [
    "DTYPE_OF",
    "EXPERIMENT",
    "TASK_FLAGS",
    "Experiment",
    "Precision",
    "Progress",
    "draw_splits",
    "fit",
    "main",
    "score_run",
    "task_options",
]

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

    from mad.dataset import PUBLISHED_SEED, DataSet
    from mad.published import load_published, verify_published

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


def resident_rows(run: Run, experiment: Experiment, task: Task, n_train: int) -> Splits:
    """All rows on the device, where they stay."""
    import torch

    return {
        split: tuple(torch.from_numpy(part).to(run.device.device, torch.int32) for part in rows)
        for split, rows in draw_splits(run, experiment, task, n_train).items()
    }


def autocast(run: Run) -> torch.autocast:
    """Mixed precision where a half format is asked for."""
    import torch

    half = run.device.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(run.device.device.type, run.device.dtype, enabled=half)


def steps_per_epoch(experiment: Experiment, n_train: int) -> int:
    """Steps in which every training row is seen once."""
    return -(-n_train // min(experiment.batch_size, n_train))


def make_state(experiment: Experiment, model: nn.Module, n_train: int) -> dict[str, Any]:
    """Everything that training changes: model, optimiser, schedule, progress."""
    protocol = protocol_named(experiment.protocol)
    optimizer = build_optimizer(
        model,
        experiment.optimizer,
        lr=experiment.lr,
        weight_decay=experiment.weight_decay,
        protocol=experiment.protocol,
    )
    schedule = build_schedule(
        optimizer,
        experiment.scheduler or protocol.schedule,
        epochs=experiment.epochs,
        steps_per_epoch=steps_per_epoch(experiment, n_train),
        floor=experiment.min_lr / experiment.lr,
        plateau_patience=experiment.plateau_patience,
        plateau_factor=experiment.plateau_factor,
    )
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "progress": Progress(),
    }


def batches(
    run: Run, experiment: Experiment, data: Splits
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The function that gives inputs and targets of a step: the rows in each epoch's own order."""
    import torch

    inputs, answers, dense = data["train"]
    targets = dense if experiment.train_targets == "dense" else answers
    size, per_epoch = experiment.batch_size, steps_per_epoch(experiment, len(inputs))

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        permutation = run.streams("order", index=epoch).permutation(len(inputs))
        return torch.from_numpy(permutation).to(inputs.device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        epoch, at = divmod(step - 1, per_epoch)
        rows = order(epoch)[at * size : (at + 1) * size]
        return inputs[rows], targets[rows]

    return batch


def validate(
    run: Run, experiment: Experiment, step: int, state: dict[str, Any], data: Splits
) -> str:
    """Score the present weights; why training should stop, or nothing."""
    from mad.evaluate import evaluate

    model, progress, size = state["model"], state["progress"], experiment.batch_size
    with autocast(run):
        score = evaluate(model, *data["val"][:2], batch_size=size)
        logged, test = score.named("val"), None
        if experiment.test_curve:
            test = evaluate(model, *data["test"][:2], batch_size=size).accuracy
            logged = logged | {"test/accuracy": test}
    progress.record(step, score.accuracy, model, test)
    observe(state["schedule"], score.nll_nats)
    run.log(step, logged)
    if score.accuracy >= experiment.stop_accuracy:
        return f"validation accuracy {score.accuracy:.4f}"
    if experiment.early_stop and progress.waited >= experiment.stop_patience:
        return f"no better validation accuracy in {progress.waited} validations"
    return ""


def fit(run: Run, experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    """Train `model` inside an open run, score it, write the report; returns the results."""
    import torch
    import torch.nn.functional as F

    from mad.layers.kernels import kernel_notes
    from mad.tasks.task import IGNORE
    from workbench.optim import clip

    wide = torch.float64 if run.device.dtype == torch.float64 else torch.float32
    task, n_train = build_task(experiment.task, task_options(experiment))
    run.note(f"{task}, {n_train} training rows; {experiment.stack}")
    data = resident_rows(run, experiment, task, n_train)
    batch = batches(run, experiment, data)
    model.to(run.device.device, wide)
    working = wide if wide == torch.float64 else run.device.dtype
    for line in kernel_notes(model, run.device.device.type, working):
        run.note(line, console=False)
    state = make_state(experiment, model, n_train)
    optimizer, schedule = state["optimizer"], state["schedule"]
    clip_norm = protocol_named(experiment.protocol).clip_norm
    per_epoch = steps_per_epoch(experiment, n_train)
    steps, validate_every = experiment.epochs * per_epoch, experiment.evaluate_every or per_epoch
    save_every = experiment.save_every or max(100, validate_every)
    if not experiment.save_checkpoints:
        save_every = steps

    for step in run.steps(steps, state, save_every=save_every):
        inputs, targets = batch(step)
        with autocast(run):
            logits = model(inputs)  # (B, L, V)
        loss = F.cross_entropy(
            (logits if wide == torch.float64 else logits.float()).flatten(0, 1),
            targets.long().flatten(),
            ignore_index=IGNORE,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip(model.parameters(), clip_norm)
        rows = {"inputs": inputs, "targets": targets}
        run.require_finite(step, rows, loss=loss, gradient_norm=norm)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        if run.every(step, 10):
            run.log(step, {"train/loss_nats": loss, "train/gradient_norm": norm, "lr": lr})
        if run.every(step, validate_every) or step == steps:
            reason = validate(run, experiment, step, state, data)
            if reason:
                run.note(f"step {step}: {reason}, stopping")
                break
    return conclude(run, experiment, task, state, data)


def conclude(
    run: Run, experiment: Experiment, task: Task, state: dict[str, Any], data: Splits
) -> dict[str, Any]:
    """Score the last and the selected weights, keep both, write the report; the results."""
    model, progress = state["model"], state["progress"]
    about = {"layers": " ".join(experiment.layers), "task": experiment.task}
    if experiment.save_checkpoints:
        last = {name: value.detach().clone() for name, value in model.state_dict().items()}
        run.save_tensors("model_last.safetensors", last, about)
    with autocast(run):
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
    data: Splits,
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
