"""From finished runs to scores: which sweep point counts, what each task is worth, how certain.

Score(task) = mean over its settings of the accuracy of the selected sweep point. Selected is the
point with the highest validation accuracy (`val-selected`; the first of equals): its test accuracy
counts. `test-max` is the published habit, the highest test accuracy of the sweep: optimistic, since
the best of several noisy numbers is above its own mean. [arXiv 2403.17844; athms/mad-lab]
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mad.grid import BENCHMARK_TASKS, Job, Setting
from mad.protocols import PROTOCOLS
from mad.registry import build_task
from mad.stats import (
    DRAWS,
    Score,
    TestRows,
    area_under_curve,
    mean_score,
    paired_difference,
    resample_accuracy,
    rows_to_reach,
    sweep_sensitivity,
)
from mad.train import task_options
from workbench.run import Run
from workbench.seeding import Streams
from workbench.sweep import FAILED

DONE, DIVERGED, LOST = "done", "diverged", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came of one job."""

    status: str
    """done, diverged or failed."""
    validation: float
    """Validation accuracy of the weights that were scored."""
    test: float
    """Test accuracy (micro); of a diverged run its last finite validation accuracy, or chance."""
    macro: float
    """Test accuracy as the published code counts it."""
    chance: float
    """Accuracy of guessing."""
    ceiling: float
    """Largest expected accuracy."""
    curve: tuple[dict[str, float], ...] = ()
    """Validation accuracy over steps."""
    rows: TestRows | None = None
    """Right answers and scored positions per test row."""
    steps: int = 0
    """Optimiser steps made."""
    message: str = ""
    """Why it did not finish."""


def directory_of(job: Job) -> Path:
    """The folder of a job's run."""
    return Run.open("mad.train", job.experiment).directory


def read_outcome(job: Job, result: dict[str, Any]) -> Outcome:
    """What a job's result, and the files of its run, say."""
    one = job.experiment
    if FAILED in result:
        task, rows = build_task(one.task, task_options(one))
        chance, ceiling = task.chance(), task.ceiling(rows)
        message = str(result[FAILED])
        if not message.startswith("DivergedError"):
            nothing = math.nan
            return Outcome(LOST, nothing, nothing, nothing, chance, ceiling, message=message)
        last = last_finite_accuracy(directory_of(job) / "metrics.jsonl")
        value = chance if last is None else last
        return Outcome(DIVERGED, value, value, value, chance, ceiling, message=message)
    curve = tuple(result["curve"])
    selected = PROTOCOLS[one.protocol].selected
    return Outcome(
        DONE,
        validation=result["validation_accuracy"] if selected else curve[-1]["accuracy"],
        test=result["test_accuracy"],
        macro=result["test_accuracy_macro_batch"],
        chance=result["chance"],
        ceiling=result["ceiling"],
        curve=curve,
        rows=read_rows(directory_of(job) / "test_rows.safetensors"),
        steps=result["steps"],
    )


def read_rows(path: Path) -> TestRows | None:
    """Right answers and scored positions per test row; None where a run did not keep them."""
    from workbench.storage import read_safetensors

    if not path.is_file():
        return None
    tensors = read_safetensors(path)
    return TestRows(tensors["correct"].numpy(), tensors["scored"].numpy())


def last_finite_accuracy(path: Path) -> float | None:
    """The last validation accuracy that a run logged before it diverged."""
    if not path.is_file():
        return None
    found = None
    for line in path.read_text(encoding="utf-8").splitlines():
        value = json.loads(line).get("val/accuracy")
        if value is not None and math.isfinite(value):
            found = float(value)
    return found


@dataclass(frozen=True)
class Point:
    """One sweep point of one setting: its seeds together."""

    lr: float
    weight_decay: float
    outcomes: tuple[Outcome, ...]

    def mean(self, name: str) -> float:
        """Mean over seeds of a field of the outcomes."""
        return math.fsum(getattr(one, name) for one in self.outcomes) / len(self.outcomes)

    def resampled(self, label: str) -> Score:
        """The test accuracy with its resamples; those of equal label meet the same rows."""
        value = self.mean("test")
        tables = [one.rows for one in self.outcomes if one.rows is not None]
        if len(tables) < len(self.outcomes):  # a diverged run has no rows: nothing to resample
            return Score(value, np.full(DRAWS, value))
        return Score(value, resample_accuracy(tables, Streams(0)(f"bootstrap/{label}")))


@dataclass(frozen=True)
class SettingScore:
    """One setting of one task under a sweep."""

    setting: Setting
    points: tuple[Point, ...]
    batch_rows: int
    """Training rows per step."""

    @property
    def selected(self) -> Point:
        """The point with the highest validation accuracy, the first of equals."""
        return max(self.points, key=lambda point: point.mean("validation"))

    @property
    def best(self) -> Point:
        """The point with the highest test accuracy."""
        return max(self.points, key=lambda point: point.mean("test"))

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.points[0].outcomes[0].chance

    @property
    def ceiling(self) -> float:
        """Largest expected accuracy."""
        return self.points[0].outcomes[0].ceiling

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(one.status == DIVERGED for point in self.points for one in point.outcomes)

    def row(self, stack: str) -> dict[str, Any]:
        """One line of the table of settings."""
        point, first = self.selected, self.selected.outcomes[0]
        score = point.resampled(self.setting.label)
        reached = rows_to_reach(first.curve, 0.95 * self.ceiling, self.batch_rows)
        return {
            "stack": stack,
            "setting": self.setting.label,
            "accuracy": score.value,
            "low": score.interval.low,
            "high": score.interval.high,
            "test_max": self.best.mean("test"),
            "chance": self.chance,
            "ceiling": self.ceiling,
            "lr": point.lr,
            "weight_decay": point.weight_decay,
            "sweep_sensitivity": sweep_sensitivity([one.mean("test") for one in self.points]),
            "rows_to_95": reached,
            "curve_area": area_under_curve(first.curve) if first.curve else None,
            "diverged": self.diverged,
        }


@dataclass(frozen=True)
class TaskScore:
    """One task: the mean over its settings."""

    settings: tuple[SettingScore, ...]
    score: Score
    """Validation-selected."""
    normalised: Score
    """The same, each setting divided by its ceiling."""
    test_max: float
    """Published habit, optimistic."""
    macro: float
    """Accuracy as the published code counts it, at the selected points."""

    @property
    def chance(self) -> float:
        """Mean chance of the settings."""
        return _mean(one.chance for one in self.settings)

    @property
    def ceiling(self) -> float:
        """Mean ceiling of the settings."""
        return _mean(one.ceiling for one in self.settings)


def score_task(settings: Sequence[SettingScore]) -> TaskScore:
    """The scores of a task from those of its settings."""
    parts = [one.selected.resampled(one.setting.label) for one in settings]
    scaled = [
        Score(part.value / one.ceiling, part.draws / one.ceiling)
        for part, one in zip(parts, settings, strict=True)
    ]
    return TaskScore(
        tuple(settings),
        mean_score(parts),
        mean_score(scaled),
        test_max=_mean(one.best.mean("test") for one in settings),
        macro=_mean(one.selected.mean("macro") for one in settings),
    )


@dataclass(frozen=True)
class ModelScore:
    """One model: its tasks and their mean."""

    stack: str
    layers: tuple[str, ...]
    tasks: dict[str, TaskScore]
    missing: tuple[str, ...] = field(default=())
    """Settings of which no run finished; their tasks have no score."""

    @property
    def overall(self) -> Score | None:
        """Mean of the tasks; the MAD score where these are the six of the benchmark."""
        return mean_score([one.score for one in self.tasks.values()]) if self.tasks else None

    @property
    def mean_name(self) -> str:
        """`MAD` if the six tasks are there, else how many tasks the mean is over."""
        if sorted(self.tasks) == sorted(BENCHMARK_TASKS):
            return "MAD"
        return f"mean of {len(self.tasks)} task{'s' if len(self.tasks) != 1 else ''}"

    def rows(self) -> list[dict[str, Any]]:
        """A line per task and one for their mean."""
        lines = [_line(self.stack, name, [one]) for name, one in self.tasks.items()]
        if self.tasks:
            lines.append(_line(self.stack, self.mean_name, list(self.tasks.values())))
        return lines


def _line(stack: str, name: str, tasks: Sequence[TaskScore]) -> dict[str, Any]:
    score = mean_score([one.score for one in tasks])
    scaled = mean_score([one.normalised for one in tasks])
    test_max = _mean(one.test_max for one in tasks)
    return {
        "stack": stack,
        "task": name,
        "accuracy": score.value,
        "low": score.interval.low,
        "high": score.interval.high,
        "test_max": test_max,
        "optimism": test_max - score.value,
        "normalised": scaled.value,
        "accuracy_macro_batch": _mean(one.macro for one in tasks),
        "chance": _mean(one.chance for one in tasks),
        "ceiling": _mean(one.ceiling for one in tasks),
        "settings": sum(len(one.settings) for one in tasks),
        "diverged": sum(setting.diverged for one in tasks for setting in one.settings),
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def score_models(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> list[ModelScore]:
    """Scores of every model of a benchmark, in the order of its jobs."""
    pairs = list(zip(jobs, outcomes, strict=True))
    models = []
    for stack in dict.fromkeys(job.stack for job in jobs):
        mine = [(job, outcome) for job, outcome in pairs if job.stack == stack]
        tasks: dict[str, list[SettingScore]] = {}
        missing = []
        for label in dict.fromkeys(job.setting.label for job, _ in mine):
            here = [(job, outcome) for job, outcome in mine if job.setting.label == label]
            job = here[0][0]
            points = []
            for point in dict.fromkeys(job.point for job, _ in here):
                kept = [o for j, o in here if j.point == point and o.status != LOST]
                if kept:
                    points.append(Point(*point, tuple(kept)))
            if points:
                batch = min(job.experiment.batch_size, job.rows)
                one = SettingScore(job.setting, tuple(points), batch)
                tasks.setdefault(job.setting.task, []).append(one)
            else:
                missing.append(label)
        lost = {label.partition(",")[0] for label in missing}
        scored = {name: score_task(parts) for name, parts in tasks.items() if name not in lost}
        models.append(ModelScore(stack, mine[0][0].experiment.layers, scored, tuple(missing)))
    return models


def compare_models(models: Sequence[ModelScore]) -> list[dict[str, Any]]:
    """Paired differences between the means of every two models that have the same tasks."""
    rows = []
    for i, one in enumerate(models):
        for other in models[i + 1 :]:
            a, b = one.overall, other.overall
            if a is None or b is None or list(one.tasks) != list(other.tasks):
                continue
            found = paired_difference(a, b)
            rows.append({"one": one.stack, "other": other.stack, **found._asdict()})
    return rows
