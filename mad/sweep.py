"""Train one stack over learning rates, weight decays and seeds, on a GPU as one stacked model.

    python -m mad.sweep --lrs 1e-4 5e-4 1e-3 --weight-decays 0 0.1 --seeds 0 1 2 3
    python -m mad.sweep --config configs/mad/sweep.tiny.yaml
    python -m mad.sweep --task memorization,vocab_size=512,epochs=50 --layers mh-hyena swiglu

The point is chosen by validation accuracy, as mean over the seeds; its test accuracy is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import fsum
from typing import Any, Literal

from mad.registry import assignments, stack_name
from mad.train import Experiment as Training
from mad.train import main as train_one
from workbench.cli import RunField, RunOptions, apply_settings, cli
from workbench.errors import ConfigError, DivergedError
from workbench.run import Run
from workbench.sweep import FAILED, grid, run_all


@dataclass(frozen=True)
class Experiment:
    """What is trained, and over which learning rates, weight decays and seeds."""

    task: str = "in-context-recall"
    """Task, with settings of mad.train behind commas: `memorization,vocab_size=512,epochs=50`."""
    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """Layers in order, with options if any (`mh-attention,num_heads=4`), or module:Class."""
    lrs: tuple[float, ...] = (1e-4, 5e-4, 1e-3)
    """Largest learning rates."""
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    """Decoupled weight decays."""
    seeds: tuple[int, ...] = (12345,)
    """Seeds of all named streams: data, initialisation, order."""
    dim: int = 128
    """Width of the model."""
    batch_size: int = 128
    """Rows per step."""
    epochs: int = 200
    """Passes over the training rows."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    evaluate_every: int | None = None
    """Steps between validations; none means one epoch."""
    protocol: Literal["lab", "mad-code", "mad-paper"] = "lab"
    """Betas, schedule, clipping and which weights are scored."""
    stacked: Literal["auto", "yes", "no"] = "auto"
    """All runs as one model with an axis of replicas; auto means on a GPU, where it pays."""
    executor: Literal["serial", "process", "ray"] = "process"
    """How the runs are made when they are not stacked."""
    workers: int = 2
    """Processes side by side when they are not stacked."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        if not (self.lrs and self.weight_decays and self.seeds):
            raise ConfigError(
                "nothing to sweep: give at least one of --lrs, --weight-decays, --seeds"
            )
        members(self)


def members(experiment: Experiment) -> list[Training]:
    """The training runs of a sweep: learning rate by weight decay by seed."""
    name, _, settings = experiment.task.partition(",")
    shared = ("layers", "dim", "batch_size", "epochs", "num_test_examples", "evaluate_every")
    base = Training(
        **{field: getattr(experiment, field) for field in shared},
        protocol=experiment.protocol,
        run=replace(experiment.run, name=None, wandb=False),
    )
    texts = [text.strip() for text in settings.split(",") if text.strip()]
    given = {"task": name.strip()} | assignments(texts, f"task {experiment.task!r}")
    return grid(
        apply_settings(base, given, f"task {experiment.task!r}"),
        lr=experiment.lrs,
        weight_decay=experiment.weight_decays,
        seed=experiment.seeds,
    )


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return fsum(values) / len(values)


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Train every point with every seed, choose on validation; returns all points and the best."""
    with Run.open("mad.sweep", experiment) as run:
        if run.finished:
            return run.results
        runs = members(experiment)
        on_gpu = run.device.device.type == "cuda"
        if experiment.stacked == "yes" or (experiment.stacked == "auto" and on_gpu):
            from mad.stacked import train_stacked

            run.note(f"{len(runs)} replicas in one stack")
            results = train_stacked(runs, run)
        else:
            run.note(f"{len(runs)} training runs, {experiment.executor}")
            results = run_all(
                train_one, runs, executor=experiment.executor, workers=experiment.workers
            )
        rows = [
            {"lr": one.lr, "weight_decay": one.weight_decay, "seed": one.seed}
            | {
                name: result.get(name)
                for name in ("validation_accuracy", "test_accuracy", "steps", FAILED)
            }
            for one, result in zip(runs, results, strict=True)
        ]
        points = []
        for lr in experiment.lrs:
            for decay in experiment.weight_decays:
                own = [row for row in rows if (row["lr"], row["weight_decay"]) == (lr, decay)]
                if any(row[FAILED] for row in own):
                    continue  # a point at which a seed diverged is no candidate
                points.append(
                    {
                        "lr": lr,
                        "weight_decay": decay,
                        "validation_accuracy": mean([row["validation_accuracy"] for row in own]),
                        "test_accuracy": mean([row["test_accuracy"] for row in own]),
                        "seeds": len(own),
                    }
                )
        run.table("runs", rows, caption="Every run of the sweep.")
        if not points:
            first = next(row[FAILED] for row in rows if row[FAILED])
            raise DivergedError(f"a run failed at every point of the sweep; the first: {first}")
        best = max(points, key=lambda point: point["validation_accuracy"])
        run.table("points", points, caption="Means over seeds.")
        failed = sum(1 for row in rows if row[FAILED])
        name = stack_name(experiment.layers)
        return run.finish(
            best | {"runs": len(rows), "runs_failed": failed, "points": points},
            title=f"{name} on {experiment.task}: a sweep",
            question="Which learning rate and weight decay suit this stack?",
            summary=f"{name}: lr {best['lr']:g} with weight decay {best['weight_decay']:g} is best "
            f"on validation ({best['validation_accuracy']:.3f}); test accuracy there "
            f"{best['test_accuracy']:.3f}, mean of {best['seeds']} seeds; {failed} of {len(rows)} "
            "runs failed.",
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
