"""Draw finished benchmarks beside one another, and published scores beside perplexity.

    python -m mad.plot
    python -m mad.plot --benchmarks runs/mad/benchmark-1a2b3c4d --root runs

Without --benchmarks every finished one under --root is drawn, one heat map and one set of bars per
design (same settings and sweep); scores of different designs never share a figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mad.grid import BENCHMARK_TASKS
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run
from workbench.storage import read_json
from workbench.tables import read_published

PUBLISHED = Path(__file__).with_name("published.csv")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """Which benchmarks to draw."""

    benchmarks: tuple[Path, ...] = ()
    """Folders of finished benchmarks; none means all under --root."""
    published: bool = True
    """Also draw published scores against perplexity."""
    state: str = ""
    """Filled in: digest of what was drawn, so that new results make a new folder."""
    run: RunField = RunOptions()
    """Where and how."""


EXPERIMENT = Experiment()  # edit me


# ---------------------------------------------------------------- reading


def benchmark_folders(root: Path) -> list[Path]:
    """Folders of all finished benchmarks under a root, by name."""
    return sorted(path.parent for path in root.glob("mad/benchmark-*/results.json"))


def read_benchmarks(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of finished benchmarks, each with the folder it came from."""
    found = []
    for folder in folders:
        file = folder / "results.json"
        if not file.is_file():
            raise ConfigError(f"{folder}: no finished benchmark (no results.json); run it first")
        values = read_json(file)["values"]
        if "models" not in values or "design" not in values:
            raise ConfigError(f"{file}: not the results of mad.benchmark")
        found.append({**values, "folder": folder.as_posix()})
    return found


def score_rows(benchmarks: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Rows stack × task of all benchmarks by design; a model benchmarked twice counts once."""
    designs: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {}
    for one in benchmarks:
        name = f"{one['preset']}-{one['design']}"
        rows = designs.setdefault(name, {})
        for model in one["models"]:
            for row in model["scores"]:
                key = (row["stack"], " ".join(model["layers"]), row["task"])
                rows.setdefault(key, row)
    return {name: list(rows.values()) for name, rows in designs.items()}


def digest_of(folders: Sequence[Path]) -> str:
    """Eight digits of the names and contents of results."""
    seen = hashlib.sha256(PUBLISHED.read_bytes())
    for folder in folders:
        file = folder / "results.json"
        seen.update(folder.as_posix().encode() + (file.read_bytes() if file.is_file() else b""))
    return seen.hexdigest()[:8]


# ---------------------------------------------------------------- drawing


def in_order(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Stacks by falling mean, tasks as in published tables with the mean last."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    means = [name for name in tasks if name not in BENCHMARK_TASKS and is_mean(name)]
    first = [name for name in BENCHMARK_TASKS if name in tasks]
    others = [name for name in tasks if name not in (*first, *means)]
    overall = {row["stack"]: row["accuracy"] for row in rows if row["task"] in means}
    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    return sorted(stacks, key=lambda name: -overall.get(name, 0.0)), [*first, *others, *means]


def is_mean(name: str) -> bool:
    """Is this the name of a mean over tasks?"""
    return name == "MAD" or name.startswith("mean of ")


def heat_map_of(rows: Sequence[Row], title: str = "") -> Any:
    """Figure: one line per model, one column per task, every cell with number and interval."""
    from workbench.plots import heat_map, new_figure

    stacks, tasks = in_order(rows)
    cells = {(row["stack"], row["task"]): row for row in rows}
    ordered = [
        {**cells[stack, task], "column": short_name(task)}
        for stack in stacks
        for task in tasks
        if (stack, task) in cells
    ]
    figure, axes = new_figure(width=2.2 + 1.15 * len(tasks), height=1.1 + 0.55 * len(stacks))
    heat_map(axes, ordered, x="column", y="stack", value="accuracy", title=title, low=0.0, high=1.0)
    axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=0, ha="center")
    for text, row in zip(axes.texts, ordered, strict=True):
        text.set_text(f"{row['accuracy']:.3f}\n{row['low']:.3f} to {row['high']:.3f}")
        text.set_fontsize(7.5)
    if len(tasks) > 1 and is_mean(tasks[-1]):
        axes.axvline(len(tasks) - 1.5, color="#1f2430", linewidth=1.5)
    return figure


def short_name(task: str) -> str:
    """A task's name on two lines at most.

    >>> short_name("noisy-in-context-recall")
    'noisy in-\\ncontext recall'
    """
    words = {
        "fuzzy-in-context-recall": "fuzzy in-\ncontext recall",
        "noisy-in-context-recall": "noisy in-\ncontext recall",
        "in-context-recall": "in-context\nrecall",
        "selective-copying": "selective\ncopying",
    }
    return words.get(task, task.replace("mean of ", "mean of\n"))


def bars_of(rows: Sequence[Row]) -> Any:
    """Figure: a panel per task, a bar per model with its interval, chance and ceiling as lines."""
    import numpy as np

    from workbench.plots import PALETTE, bar_plot, new_figure

    stacks, tasks = in_order(rows)
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    height = (0.75 + 0.26 * len(stacks)) * lines
    figure, axes = new_figure(width=4.9 * columns, height=height, rows=lines, columns=columns)
    panels = list(np.atleast_1d(axes).flat)
    for panel, task in zip(panels, tasks, strict=False):
        here = [
            row for name in stacks for row in rows if (row["stack"], row["task"]) == (name, task)
        ]
        chance = here[0]["chance"]
        bar_plot(
            panel,
            here,
            label="stack",
            value="accuracy",
            low="low",
            high="high",
            xlabel=f"accuracy (chance {chance:.3f})",
            title=task,
        )
        panel.axvline(chance, color="#1f2430", linewidth=1.0, linestyle=":")
        panel.set_xlim(0, 1.18)
        for bar, row in zip(panel.patches, here, strict=True):  # a model keeps its colour
            bar.set_facecolor(PALETTE[stacks.index(row["stack"]) % len(PALETTE)])
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    return figure


def draw_scores(run: Run, rows: Sequence[Row], *, n_rows: int, suffix: str = "") -> None:
    """Heat map and bars of one design into a run."""
    numbers = "; ".join(f"{row['stack']} {row['task']} {row['accuracy']:.3f}" for row in rows)
    note = (
        f"mean over settings, 95 % bootstrap intervals over the test rows (n = {n_rows} per "
        "setting); the sweep point is selected on validation"
    )
    run.figure(
        f"heat_map{suffix}",
        heat_map_of(rows),
        rows,
        caption=f"Test accuracy by model and task: {note}.",
        alt=f"Accuracies. {numbers}.",
    )
    run.figure(
        f"bars{suffix}",
        bars_of(rows),
        rows,
        caption=f"Test accuracy by task: {note}. Dotted: chance.",
        alt=f"Accuracies. {numbers}.",
    )


def scaling_rows() -> list[dict[str, Any]]:
    """Published points: mean score on the tasks and compute-optimal perplexity of each model."""
    points: dict[str, dict[str, Any]] = {}
    for row in read_published(PUBLISHED):
        if row["table"] == "mad_against_perplexity":
            point = points.setdefault(str(row["row"]), {"model": row["row"]})
            point[str(row["column"])] = float(row["value"])
            point["source"] = row["source"]
    return list(points.values())


def draw_scaling(run: Run, rows: Sequence[Row]) -> dict[str, float]:
    """Published scores against perplexity; returns the rank correlation and the fitted slope."""
    import numpy as np
    from scipy.stats import spearmanr

    from workbench.plots import INK, MARKERS, PALETTE, TEXT_POINTS, new_figure

    x = np.array([row["mad_score"] for row in rows])
    y = np.array([row["perplexity"] for row in rows])
    slope, offset = np.polyfit(x, y, 1)
    rank = float(spearmanr(x, y).statistic)
    figure, axes = new_figure(width=5.8, height=3.8)
    ends = np.array([x.min() - 0.01, x.max() + 0.01])
    axes.plot(ends, slope * ends + offset, color=INK, linewidth=1.0, linestyle=":")
    for i, row in enumerate(rows):
        axes.errorbar(
            row["mad_score"],
            row["perplexity"],
            xerr=0.01,
            yerr=0.05,
            marker=MARKERS[i % len(MARKERS)],
            color=PALETTE[i % len(PALETTE)],
            linestyle="none",
            label=row["model"],
        )
    axes.set_xlabel("mean score on the synthetic tasks", fontsize=TEXT_POINTS, color=INK)
    axes.set_ylabel("compute-optimal perplexity, The Pile", fontsize=TEXT_POINTS, color=INK)
    axes.legend(fontsize=TEXT_POINTS - 0.5, labelcolor=INK, frameon=False)
    run.figure(
        "scaling",
        figure,
        rows,
        caption=f"Published, not measured here: {rows[0]['source']}. n = {len(rows)} models; "
        f"Spearman {rank:.2f}; dotted: least squares, slope {slope:.1f} per unit of score.",
        alt="; ".join(f"{r['model']}: {r['mad_score']} and {r['perplexity']}" for r in rows) + ".",
    )
    return {"spearman": rank, "slope": float(slope), "offset": float(offset)}


def main(experiment: Experiment) -> dict[str, Any]:
    """Read, draw, and write the tables behind the figures."""
    root = experiment.run.root
    folders = list(experiment.benchmarks) or benchmark_folders(root)
    experiment = replace(
        experiment, benchmarks=tuple(folders), state=experiment.state or digest_of(folders)
    )
    benchmarks = read_benchmarks(folders)
    with Run.open("mad.plot", experiment) as run:
        if run.finished:
            return run.results
        values: dict[str, Any] = {"benchmarks": len(benchmarks)}
        for name, rows in score_rows(benchmarks).items():
            n_rows = next(one["n_rows"] for one in benchmarks if name.endswith(one["design"]))
            draw_scores(run, rows, n_rows=n_rows, suffix=f"-{name}")
            values |= {
                f"{name}: {row['stack']}": row["accuracy"] for row in rows if is_mean(row["task"])
            }
        if experiment.published:
            values |= draw_scaling(run, scaling_rows())
        return run.finish(
            values,
            title="Benchmarks side by side",
            question="Which layers can do which task, and does that foretell perplexity?",
            summary=f"{len(benchmarks)} benchmarks found.",
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
