"""Compare stacks of layers: learning curves and final accuracies on the same task settings.

    python -m mad.compare --config configs/mad/compare.tour.yaml
    python -m mad.compare --stacks "mh-attention swiglu" "mh-hyena swiglu" --tasks memorization
    python -m mad.compare --tasks "in-context-recall,vocab_size=8,seq_len=16,epochs=20"

Each stack on each task is one run of mad.train (found again when it is there already).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from mad import report
from mad.registry import stack_name, task_spec
from mad.train import Experiment as Training
from mad.train import main as train_one
from workbench.cli import RunField, RunOptions, apply_settings, cli
from workbench.errors import ConfigError, DivergedError
from workbench.run import Run
from workbench.sweep import FAILED, run_all


@dataclass(frozen=True)
class Experiment:
    """Which stacks on which tasks; the rest holds for every task that does not say otherwise."""

    tasks: tuple[str, ...] = ("in-context-recall", "memorization")
    """Tasks, with settings of mad.train behind commas: `memorization,vocab_size=512,lr=1e-3`."""
    stacks: tuple[str, ...] = (
        "mh-attention swiglu mh-attention swiglu",
        "mh-linear-attention swiglu mh-linear-attention swiglu",
        "mh-hyena swiglu mh-hyena swiglu",
        "mlp mlp mlp mlp",
    )
    """Stacks: layers separated by spaces, after a name if you like (`mine: mlp mlp`)."""
    dim: int = 128
    """Width of the models."""
    batch_size: int = 128
    """Rows per step."""
    epochs: int = 200
    """Passes over the training rows."""
    lr: float = 5e-4
    """Largest learning rate."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    evaluate_every: int | None = None
    """Steps between validations; none means one epoch."""
    protocol: Literal["lab", "mad-code", "mad-paper"] = "lab"
    """Betas, schedule, clipping and which weights are scored."""
    executor: Literal["serial", "process", "ray"] = "process"
    """How the runs are made; `process` gives each one thread."""
    workers: int = 2
    """Processes side by side."""
    seed: int = 12345
    """Seed of all named streams of every run: the stacks see the same rows in the same order."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        if not self.tasks or not self.stacks:
            raise ConfigError("nothing to compare: give at least one --tasks and one --stacks")
        members(self)


def split_stack(text: str) -> tuple[str, tuple[str, ...]]:
    """The name and the layers of a stack; its layers' shorthands are its name if it has none.

    >>> split_stack("perceptron: mlp mlp")
    ('perceptron', ('mlp', 'mlp'))
    >>> split_stack("mh-attention swiglu")
    ('mA-Sg', ('mh-attention', 'swiglu'))
    """
    name, colon, rest = text.partition(": ")
    if colon:
        return name.strip(), tuple(rest.split())
    layers = tuple(text.split())
    return stack_name(layers), layers


def members(experiment: Experiment) -> list[Training]:
    """The training runs of a comparison, task by task and stack by stack."""
    shared = ("dim", "batch_size", "epochs", "lr", "num_test_examples", "evaluate_every")
    base = Training(
        **{name: getattr(experiment, name) for name in shared},
        protocol=experiment.protocol,
        seed=experiment.seed,
        run=replace(experiment.run, name=None, wandb=False),
    )
    runs = []
    for text in experiment.tasks:
        name, *assignments = (part.strip() for part in text.split(","))
        settings: dict[str, Any] = {"task": name}
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise ConfigError(f"task {text!r}: {assignment!r} is not of the form setting=value")
            settings[key] = yaml.safe_load(value)
        task_spec(name)
        for stack in experiment.stacks:
            given = settings | {"layers": list(split_stack(stack)[1])}
            runs.append(apply_settings(base, given, f"task {text!r}"))
    return runs


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Train all stacks on all tasks, draw them side by side; returns the accuracies."""
    with Run.open("mad.compare", experiment) as run:
        if run.finished:
            return run.results
        runs = members(experiment)
        run.note(f"{len(runs)} training runs, {experiment.executor}")
        results = run_all(train_one, runs, executor=experiment.executor, workers=experiment.workers)
        names = [split_stack(stack)[0] for stack in experiment.stacks] * len(experiment.tasks)
        failed = [
            f"{name} on {one.task}: {result[FAILED]}"
            for name, one, result in zip(names, runs, results, strict=True)
            if FAILED in result
        ]
        if failed:
            raise DivergedError(
                f"{len(failed)} of {len(runs)} training runs failed, the others are kept; first: "
                f"{failed[0]}"
            )
        results = [
            result | {"stack": name, "layers": " ".join(one.layers)}
            for name, one, result in zip(names, runs, results, strict=True)
        ]
        report.draw_comparison(run, results)
        scores = {f"{one['task']}: {one['stack']}": one["test_accuracy"] for one in results}
        return run.finish(
            scores | {"runs": len(results)},
            title="Layer primitives on synthetic tasks",
            question="Which layers can recall from the context, and which can store facts?",
            summary=report.summarize(results),
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
