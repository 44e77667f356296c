"""Tables of many runs under the published names: find, join, choose the best of a sweep, score.

    from mad.analysis import aggregate_model_results, compute_model_mad_scores
    frame = aggregate_model_results("mA-Sg-mA-Sg", "runs")
    scores = compute_model_mad_scores("mA-Sg-mA-Sg", "runs")

It reads the runs of mad.train, whoever made them. A model id is the name in the results: the
shorthands of the layers joined by dashes, or the `model_id` of `mad.train` and `mad.benchmark` as
functions. The published choice of a sweep point is the highest test accuracy (`metric="test_acc"`),
which is optimistic; `metric="val_acc"` chooses as `mad.benchmark` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mad.benchmark import Experiment, jobs_of
from mad.grid import BENCHMARK_TASKS
from workbench.errors import ConfigError, DataError, unknown_name
from workbench.run import settings_of
from workbench.storage import read_json

if TYPE_CHECKING:
    import pandas as pd

METRICS = {
    "train_acc": "train_accuracy_dense",
    "train_loss": "train_nll_dense_nats",
    "test_acc": "test_accuracy",
    "test_acc_macro_batch": "test_accuracy_macro_batch",
    "test_loss": "test_nll_nats",
    "val_acc": "validation_accuracy",
}
"""Columns of metrics and the results they are."""

SWEPT = ("lr", "weight_decay")
MODEL_FIELDS = ("layers", "dim", "model_id", "model_digest")
"""Settings of a run that say which model it is, not on what it was trained."""


class MissingRuns(DataError):
    """Runs that should be there are not; `missing` names all of them."""

    def __init__(self, message: str, missing: Sequence[str]):
        super().__init__(message)
        self.missing = tuple(missing)


def get_result_paths(
    model_id: str,
    logs_path: str | Path,
    task: str | None = None,
    check_present: bool = False,
    *,
    benchmark: Experiment | None = None,
) -> list[Path]:
    """The results of all finished runs of a model, of one task or all, in the order of their names.

    With `check_present` every run of `benchmark` (by default the published grid) must be there.

    Raises:
        ConfigError: no run of that model; the names that are there are given.
        DataError: no finished run at all.
        MissingRuns: some runs of the benchmark are not there; all of them are listed.
    """
    found, names = [], set()
    for path in sorted(Path(logs_path).glob("mad/*/results.json")):
        values = read_json(path)["values"]
        if not {"stack", "task", "test_accuracy"} <= set(values):
            continue  # of another script
        names.add(str(values["stack"]))
        if values["stack"] == model_id and task in (None, values["task"]):
            found.append(path)
    if not names:
        raise DataError(
            f"{logs_path}: no finished run of mad.train; expected {logs_path}/mad/*/results.json"
        )
    if model_id not in names:
        raise unknown_name(f"model with finished runs under {logs_path}", model_id, sorted(names))
    if check_present:
        missing = missing_runs(found, benchmark or Experiment(), task)
        if missing:
            raise MissingRuns(
                f"{logs_path}: {len(missing)} runs of {model_id} are missing; run the benchmark to "
                "make them:\n  " + "\n  ".join(missing),
                missing,
            )
    return found


def missing_runs(found: Sequence[Path], benchmark: Experiment, task: str | None) -> list[str]:
    """The runs of a benchmark of one model that are not among those found, in words."""
    if len(benchmark.models()) != 1:
        raise ConfigError(
            f"{len(benchmark.models())} models in the benchmark; expected one to compare with"
        )
    there = {training_key(settings_at(path)) for path in found}
    return [
        f"{job.setting.label}, lr {job.point[0]:g}, weight decay {job.point[1]:g}, seed {job.seed}"
        for job in jobs_of(benchmark)
        if task in (None, job.setting.task)
        and training_key(settings_of(job.experiment)) not in there
    ]


def settings_at(results: Path) -> dict[str, Any]:
    """The settings of a finished run."""
    import yaml

    file = results.with_name("config.yaml")
    if not file.is_file():
        raise DataError(f"{file}: no such file; a run keeps its settings beside its results")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def training_key(settings: Mapping[str, Any]) -> str:
    """What a run was trained on, without the model, as text."""
    kept = {name: value for name, value in settings.items() if name not in MODEL_FIELDS}
    return json.dumps(kept, sort_keys=True)


def aggregate_model_results(
    model_id: str,
    logs_path: str | Path,
    task: str | None = None,
    subset_to_best_sweep_runs: bool = True,
    metric: str = "test_acc",
    metric_criterion: Literal["max", "min"] = "max",
    *,
    check_present: bool = False,
    benchmark: Experiment | None = None,
) -> pd.DataFrame:
    """One row per run of a model: its settings and its metrics; the best of each sweep, or all."""
    import pandas as pd

    rows = []
    paths = get_result_paths(model_id, logs_path, task, check_present, benchmark=benchmark)
    for path in paths:
        values = read_json(path)["values"]
        settings = {
            name: json.dumps(value) if isinstance(value, (list, dict)) else value
            for name, value in settings_at(path).items()
            if name != "model_digest"
        }
        metrics = {name: values.get(source) for name, source in METRICS.items()}
        for part in ("train", "test"):
            metrics[f"{part}_ppl"] = perplexity(metrics[f"{part}_loss"])
        rows.append(settings | {"model_id": model_id} | metrics)
    frame = pd.DataFrame(rows)
    if subset_to_best_sweep_runs and rows:
        return subset_model_results_to_best_sweep_runs(frame, metric, metric_criterion)
    return frame


def perplexity(nats: float | None) -> float | None:
    """exp(nats), infinite where that is too large for a float."""
    return None if nats is None else math.exp(nats) if nats < 700 else math.inf


def is_metric(column: str) -> bool:
    """Does a column hold a metric instead of a setting?"""
    return column in METRICS or column in ("train_ppl", "test_ppl")


def subset_model_results_to_best_sweep_runs(
    results: pd.DataFrame,
    metric: str = "test_acc",
    metric_criterion: Literal["max", "min"] = "max",
) -> pd.DataFrame:
    """The best run of each sweep; a sweep is what differs in learning rate and weight decay only.

    Of equal runs the first one; one without a finite metric never wins over one with.

    Raises:
        ConfigError: an unknown metric or criterion.
    """
    if metric not in results.columns or not is_metric(metric):
        known = [name for name in results.columns if is_metric(name)]
        raise unknown_name("metric", metric, known)
    if metric_criterion not in ("max", "min"):
        raise ConfigError(f"metric_criterion={metric_criterion!r}; expected 'max' or 'min'")
    settings = [name for name in results.columns if name not in SWEPT and not is_metric(name)]
    frame = results.reset_index(drop=True)
    worst = -math.inf if metric_criterion == "max" else math.inf
    values = frame[metric].astype(float).fillna(worst)
    keys = [json.dumps([str(cell) for cell in line]) for line in frame[settings].to_numpy()]
    groups = values.groupby(keys, sort=False)
    chosen = groups.idxmax() if metric_criterion == "max" else groups.idxmin()
    return frame.loc[sorted(chosen)].reset_index(drop=True)


def compute_model_mad_scores(
    model_id: str,
    logs_path: str | Path,
    metric: str = "test_acc",
    metric_criterion: Literal["max", "min"] = "max",
    *,
    check_present: bool = False,
    benchmark: Experiment | None = None,
) -> pd.Series:
    """Mean test accuracy of the best sweep points by task, and the mean of the tasks at the end.

    The mean is called `MAD` if the tasks are the six of the benchmark.
    """
    import pandas as pd

    best = aggregate_model_results(
        model_id,
        logs_path,
        metric=metric,
        metric_criterion=metric_criterion,
        check_present=check_present,
        benchmark=benchmark,
    )
    scores = {
        task: float(best.loc[best["task"] == task, "test_acc"].astype(float).mean())
        for task in sorted(set(best["task"]))
    }
    six = sorted(scores) == sorted(BENCHMARK_TASKS)
    many = f"mean of {len(scores)} task{'s' if len(scores) != 1 else ''}"
    scores["MAD" if six else many] = math.fsum(scores.values()) / len(scores)
    return pd.Series(scores, name=model_id)
