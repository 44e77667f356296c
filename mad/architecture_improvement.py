"""Improve an architecture step by step and benchmark each step.   [arXiv 2403.17844, MAD]

    python -m mad.architecture_improvement --dry-run
    python -m mad.architecture_improvement --config configs/mad/architecture_improvement.mini.yaml
    python -m mad.architecture_improvement --stacks "one: mlp mlp" "two: mh-hyena mlp"

Without --stacks the published steps: Hyena, more heads, attention in every second mixer, experts.
The runs are those of mad.benchmark (found again when they are there already, shared by --shard).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mad.benchmark import Experiment as Benchmark
from mad.benchmark import JobsFailed, resolved
from mad.benchmark import main as run_benchmark
from mad.plot import Row, in_order, is_mean
from workbench.cli import cli
from workbench.run import Run
from workbench.storage import atomic_write

TABLE = "mad_scores_hyena_improvement"
"""Name of the table and of the figure, as published."""

STEPS = (
    "Hyena: hyena swiglu hyena swiglu",
    "Multi-Head Hyena: mh-hyena swiglu mh-hyena swiglu",
    "Striped Hyena: mh-hyena swiglu mh-attention swiglu",
    "Striped Hyena + MoE: mh-hyena moe-mlp mh-attention moe-mlp",
)
"""The published steps: each changes one thing in the one before."""


@dataclass(frozen=True)
class Experiment(Benchmark):
    """Which variants on which settings: the flags of mad.benchmark, and where copies go."""

    stacks: tuple[str, ...] = STEPS
    """The variants in the order of improvement: layers separated by spaces, after a name."""
    results_path: Path | None = None
    """Folder for a copy of the table of scores."""
    figures_path: Path | None = None
    """Folder for copies of the figure."""


EXPERIMENT = Experiment()  # edit me


def benchmark_of(experiment: Experiment) -> Benchmark:
    """The benchmark of the variants."""
    given = {one.name: getattr(experiment, one.name) for one in fields(Benchmark)}
    return Benchmark(**given | {"run": replace(experiment.run, name=None)})


def wide_rows(models: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per model in ascending order of its mean, one column per task."""
    rows = [row for model in models for row in model["scores"]]
    stacks, tasks = in_order(rows)
    cells = {(row["stack"], row["task"]): row for row in rows}
    layers = {row["stack"]: model["layers"] for model in models for row in model["scores"]}
    lines = []
    for stack in reversed(stacks):
        line: dict[str, Any] = {"model": stack, "layers": " ".join(layers[stack])}
        for task in tasks:
            row = cells.get((stack, task))
            line[task] = row["accuracy"] if row else None
            if row and is_mean(task):
                line |= {"low": row["low"], "high": row["high"], "test_max": row["test_max"]}
        lines.append(line)
    return lines


def figure_of(models: Sequence[Row]) -> Any:
    """Figure of two panels: the mean of each model, and all its tasks; lowest mean first."""
    from workbench.plots import INK, PALETTE, bar_plot, new_figure

    rows = [row for model in models for row in model["scores"]]
    stacks, tasks = in_order(rows)
    ascending = stacks[::-1]
    ordered = [row for name in ascending for row in rows if row["stack"] == name]
    means = [row for row in ordered if is_mean(row["task"])]
    single = [task for task in tasks if not is_mean(task)]
    bars = [row for row in ordered if not is_mean(row["task"])]
    height = 1.3 + 0.2 * len(single) * len(stacks)
    figure, (left, right) = new_figure(width=10.5, height=max(3.2, height), columns=2)
    shared = {"value": "accuracy", "low": "low", "high": "high"}
    bar_plot(left, means, label="stack", xlabel=f"mean accuracy ({means[0]['task']})", **shared)
    bar_plot(right, bars, label="task", series="stack", xlabel="accuracy by task", **shared)
    for bar, row in zip(left.patches, means, strict=True):  # a model keeps its colour
        bar.set_facecolor(PALETTE[ascending.index(row["stack"]) % len(PALETTE)])
    for panel in (left, right):
        panel.set_xlim(0, 1.15)
    handles, names = right.get_legend_handles_labels()
    if right.get_legend() is not None:
        right.get_legend().remove()
    figure.legend(
        handles, names, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK
    )
    return figure


def main(experiment: Experiment) -> dict[str, Any]:
    """Benchmark the variants, then the table and the figure; returns the scores."""
    results = run_benchmark(benchmark_of(experiment))
    if experiment.dry_run or experiment.shard:
        return results
    key = replace(resolved(experiment), results_path=None, figures_path=None)
    with Run.open("mad.architecture_improvement", key) as run:
        run.require_same("scores", digest_of(results["models"]))
        values = run.results if run.finished else record(run, results)
        copy(run, experiment)
        return values


def record(run: Run, results: Row) -> dict[str, Any]:
    """Write the table, the figure and the report."""
    lines = wide_rows(results["models"])
    (mean,) = {row["task"] for one in results["models"] for row in one["scores"][-1:]}
    note = (
        f"lowest mean first; 95 % bootstrap intervals over the test rows (n = {results['n_rows']} "
        f"per setting), sweep point selected on validation, benchmark {results['preset']}-"
        f"{results['design']}"
    )
    run.table(TABLE, lines, caption=f"Accuracy of every variant by task: {note}.")
    rows = [row for one in results["models"] for row in one["scores"]]
    run.figure(
        TABLE,
        figure_of(results["models"]),
        rows,
        caption=f"Left: mean accuracy. Right: accuracy by task; {note}.",
        alt="; ".join(f"{r['stack']} {r['task']} {r['accuracy']:.3f}" for r in rows) + ".",
    )
    text = ", ".join(f"{line['model']} {line[mean]:.3f}" for line in lines)
    return run.finish(
        {line["model"]: line[mean] for line in lines}
        | {"mean": mean, "preset": results["preset"], "design": results["design"]},
        title="Improving an architecture step by step",
        question="Which change of an architecture raises its score on the synthetic tasks?",
        summary=f"{mean}: {text}.",
    )


def copy(run: Run, experiment: Experiment) -> None:
    """Copy table and figure to the folders that were asked for."""
    if experiment.results_path is not None:
        place(run.directory / f"tables/{TABLE}.csv", experiment.results_path)
    if experiment.figures_path is not None:
        for ending in ("svg", "png"):
            place(run.directory / f"figures/{TABLE}.{ending}", experiment.figures_path)


def place(file: Path, folder: Path) -> None:
    """Copy a file into a folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    content = file.read_bytes()
    atomic_write(folder / file.name, lambda path: path.write_bytes(content))


def digest_of(models: Sequence[Row]) -> str:
    """SHA-256 of all scores."""
    rows = [[r["stack"], r["task"], r["accuracy"]] for one in models for r in one["scores"]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def command(experiment: Experiment) -> dict[str, Any]:
    """`main` of the command line: failed runs are listed and end it with status 1."""
    try:
        return main(experiment)
    except JobsFailed as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    cli(command, EXPERIMENT)
