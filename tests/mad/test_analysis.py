"""Many runs as one table: best of a sweep, scores, and which runs are missing."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mad.analysis import (
    MissingRuns,
    aggregate_model_results,
    compute_model_mad_scores,
    get_result_paths,
    subset_model_results_to_best_sweep_runs,
)
from mad.benchmark import Experiment, jobs_of
from workbench.errors import ConfigError, DataError
from workbench.run import Run, RunOptions

GRID = Experiment(
    layers=("mlp",),
    settings=(
        "memorization,vocab_size=16,seq_len=8,num_train_examples=64",
        "memorization,vocab_size=32,seq_len=8,num_train_examples=64",
        "in-context-recall,vocab_size=8,seq_len=8,num_train_examples=64",
    ),
    lrs=(1e-3, 1e-2),
    weight_decays=(0.0,),
    seeds=(0,),
    dim=8,
    batch_size=32,
    epochs=3,
    num_test_examples=32,
)
VALIDATION, TEST = (0.2, 0.3, 0.9, 0.8, 0.6, 0.5), (0.3, 0.2, 0.7, 0.75, 0.4, 0.6)


def finished(root: Path, count: int = 6) -> Experiment:
    """The first runs of the grid, with results made by hand."""
    grid = replace(GRID, run=RunOptions(root=root, device="cpu", threads=1))
    for job, validation, test in zip(jobs_of(grid)[:count], VALIDATION, TEST, strict=False):
        with Run.open("mad.train", job.experiment) as run:
            run.finish({
                "stack": job.experiment.stack, "task": job.setting.task, "test_accuracy": test,
                "validation_accuracy": validation, "test_nll_nats": 1.0, "train_nll_dense_nats": 0,
            })  # fmt: skip
    return grid


def test_scores_by_test_and_by_validation(tmp_path):
    finished(tmp_path)
    published = compute_model_mad_scores("M", tmp_path)
    assert list(published.index) == ["in-context-recall", "memorization", "mean of 2 tasks"]
    assert published.to_list() == pytest.approx([0.6, (0.3 + 0.75) / 2, (0.525 + 0.6) / 2])
    selected = compute_model_mad_scores("M", tmp_path, metric="val_acc")
    assert selected.to_list()[:2] == pytest.approx([0.4, (0.2 + 0.7) / 2])
    lowest = compute_model_mad_scores("M", tmp_path, metric_criterion="min")
    assert lowest.to_list()[:2] == pytest.approx([0.4, (0.2 + 0.7) / 2])


def test_a_sweep_is_what_differs_in_rate_and_decay_only(tmp_path):
    finished(tmp_path)
    every = aggregate_model_results("M", tmp_path, subset_to_best_sweep_runs=False)
    assert len(every) == 6
    assert list(every["test_ppl"]) == pytest.approx([2.718281828] * 6)
    best = subset_model_results_to_best_sweep_runs(every)
    assert sorted(best["test_acc"]) == [0.3, 0.6, 0.75]
    two = pd.concat([every.assign(seed=0), every.assign(seed=1)])  # another seed: another sweep
    assert len(subset_model_results_to_best_sweep_runs(two)) == 6
    swept = pd.concat([every, every.assign(weight_decay=0.1, test_acc=0.99)])
    assert set(subset_model_results_to_best_sweep_runs(swept)["test_acc"]) == {0.99}
    broken = every.assign(test_acc=[float("nan"), *every["test_acc"][1:]])
    assert len(subset_model_results_to_best_sweep_runs(broken)) == 3
    assert len(aggregate_model_results("M", tmp_path, "memorization")) == 2


def test_all_missing_runs_are_listed(tmp_path):
    grid = finished(tmp_path, 3)
    assert len(get_result_paths("M", tmp_path)) == 3
    with pytest.raises(MissingRuns, match="3 runs of M are missing") as caught:
        get_result_paths("M", tmp_path, check_present=True, benchmark=grid)
    assert [line.split(",")[0] for line in caught.value.missing] == [
        "memorization", "in-context-recall", "in-context-recall",
    ]  # fmt: skip
    assert all(line in str(caught.value) for line in caught.value.missing)
    with pytest.raises(MissingRuns) as caught:
        get_result_paths("M", tmp_path, "memorization", True, benchmark=grid)
    assert len(caught.value.missing) == 1
    finished(tmp_path)
    assert len(get_result_paths("M", tmp_path, check_present=True, benchmark=grid)) == 6
    with pytest.raises(MissingRuns) as caught:  # the published grid has other runs
        get_result_paths("M", tmp_path, check_present=True)
    assert len(caught.value.missing) == 396


def test_unknown_names_are_refused(tmp_path):
    finished(tmp_path, 2)
    with pytest.raises(ConfigError, match="'N'; known: M"):
        get_result_paths("N", tmp_path)
    with pytest.raises(DataError, match="no finished run"):
        get_result_paths("M", tmp_path / "empty")
    every = aggregate_model_results("M", tmp_path, subset_to_best_sweep_runs=False)
    with pytest.raises(ConfigError, match="nearest: test_acc"):
        subset_model_results_to_best_sweep_runs(every, "test_accuracy")
    with pytest.raises(ConfigError, match="metric_criterion='mean'"):
        aggregate_model_results("M", tmp_path, metric_criterion="mean")  # type: ignore[arg-type]
