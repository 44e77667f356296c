"""Rank the models of all finished benchmarks, published scores beside the full ones.

    python -m mad.leaderboard
    python -m mad.leaderboard --root runs --no-published

One table per design: scores of the full grid, of the mini one and of any other settings never stand
together. A published row is called so; it has no rank, since it was selected on test rows, counted
as macro average per batch, and has no interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mad.grid import BENCHMARK_TASKS
from mad.plot import PUBLISHED, Row, benchmark_folders, digest_of, is_mean, read_benchmarks
from workbench.cli import RunField, RunOptions, cli
from workbench.run import Run
from workbench.tables import read_published


@dataclass(frozen=True)
class Experiment:
    """Which benchmarks to rank."""

    benchmarks: tuple[Path, ...] = ()
    """Folders of finished benchmarks; none means all under --root."""
    published: bool = True
    """Also list published scores, beside those of the full grid."""
    state: str = ""
    """Filled in: digest of what was ranked, so that new results make a new folder."""
    run: RunField = RunOptions()
    """Where and how."""


EXPERIMENT = Experiment()  # edit me


def published_lines() -> list[dict[str, Any]]:
    """A line per published model: accuracy by task as a fraction."""
    lines: dict[str, dict[str, Any]] = {}
    for row in read_published(PUBLISHED):
        if row["table"] == "mad_scores":
            name = "MAD" if row["column"] == "average" else str(row["column"])
            source = f"published, {str(row['source']).partition(' (')[0]}"
            line = lines.setdefault(str(row["row"]), {"model": row["row"], "source": source})
            line[name] = float(row["value"]) / 100
    return list(lines.values())


def model_line(model: Row, source: str) -> dict[str, Any]:
    """A line of a model that was benchmarked here."""
    line: dict[str, Any] = {"model": model["scores"][0]["stack"], "source": source}
    for row in model["scores"]:
        if is_mean(row["task"]):
            line["MAD" if row["task"] == "MAD" else "mean"] = row["accuracy"]
            line |= {name: row[name] for name in ("low", "high", "test_max", "diverged")}
        else:
            line[row["task"]] = row["accuracy"]
    return line


def mean_of(line: Row) -> float:
    """The score that ranks a line."""
    return line.get("MAD", line.get("mean", 0.0))


def ranked(lines: Iterable[Row]) -> list[dict[str, Any]]:
    """Lines by falling score with equal columns; those that were measured here are numbered."""
    ordered = sorted(lines, key=lambda line: -mean_of(line))
    names = dict.fromkeys(name for line in ordered for name in line)
    last = [name for name in ("low", "high", "test_max", "diverged", "source") if name in names]
    means = [name for name in ("MAD", "mean") if name in names]
    first = [name for name in BENCHMARK_TASKS if name in names]
    others = [name for name in names if name not in (*last, *means, *first, "model")]
    rank, table = 0, []
    for line in ordered:
        here = "published" not in str(line["source"])
        rank += here
        columns = {name: line.get(name) for name in (*means, *first, *others, *last)}
        table.append({"rank": rank if here else None, "model": line["model"]} | columns)
    return table


def leaderboards(benchmarks: Sequence[Row], published: bool) -> dict[str, list[dict[str, Any]]]:
    """The tables by design, named `<preset>-<design>`; a model benchmarked twice counts once."""
    designs: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for one in benchmarks:
        lines = designs.setdefault(f"{one['preset']}-{one['design']}", {})
        for model in one["models"]:
            if model["scores"]:
                line = model_line(model, f"here, {Path(one['folder']).name}")
                lines.setdefault((line["model"], " ".join(model["layers"])), line)
    tables = {name: list(lines.values()) for name, lines in designs.items() if lines}
    if published:
        full = [name for name in tables if name.startswith("full-")] or ["published"]
        for name in full:
            tables[name] = [*tables.get(name, []), *published_lines()]
    return {name: ranked(lines) for name, lines in tables.items()}


def main(experiment: Experiment) -> dict[str, Any]:
    """Read, rank, and write one table per design; returns the scores."""
    folders = list(experiment.benchmarks) or benchmark_folders(experiment.run.root)
    experiment = replace(
        experiment, benchmarks=tuple(folders), state=experiment.state or digest_of(folders)
    )
    benchmarks = read_benchmarks(folders)
    with Run.open("mad.leaderboard", experiment) as run:
        if run.finished:
            return run.results
        values: dict[str, Any] = {"benchmarks": len(benchmarks)}
        best = []
        for name, lines in leaderboards(benchmarks, experiment.published).items():
            run.table(f"leaderboard-{name}", lines, caption=f"{caption_of(name)} {NOTE}")
            values |= {f"{name}: {line['model']} ({line['source']})": mean_of(tidy(line))
                       for line in lines}  # fmt: skip
            best.append(f"{name}: {lines[0]['model']} {mean_of(tidy(lines[0])):.3f}")
        return run.finish(
            values,
            title="Leaderboard",
            question="Which model has the highest mean score, design by design?",
            summary=f"{len(benchmarks)} benchmarks; highest " + "; ".join(best or ["none"]) + ".",
        )


def tidy(line: Row) -> dict[str, Any]:
    """A line without its empty cells."""
    return {name: value for name, value in line.items() if value is not None}


NOTE = (
    "Accuracy of the sweep point that validation selects; low and high: 95 % bootstrap interval "
    "of the mean over test rows; test_max: the published way of selecting. Rows without a rank are "
    "published figures: selected on test rows, macro average per batch, no interval."
)


def caption_of(name: str) -> str:
    """What a table ranks, in words."""
    preset, _, design = name.partition("-")
    kinds = {
        "full": f"The full grid of 66 settings (design {design}).",
        "mini": f"The mini benchmark (design {design}), not comparable with the full grid.",
        "published": "Published scores; no full benchmark is finished here.",
    }
    return kinds.get(preset, f"Settings of one's own (design {design}), comparable among them.")


if __name__ == "__main__":
    cli(main, EXPERIMENT)
