"""The benchmark: what it consists of, how it selects, how it survives a kill and a failed run."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mad
from mad.benchmark import (
    Experiment,
    JobsFailed,
    carry_out,
    describe_work,
    design_of,
    jobs_of,
    main,
    resolved,
)
from mad.grid import largest_first, published_settings, shard_of
from mad.scores import Outcome, read_outcome, score_models
from mad.train import main as train_one
from tests.conftest import ROOT, child_environment
from workbench.errors import ConfigError
from workbench.run import RunOptions
from workbench.storage import read_json, read_safetensors
from workbench.sweep import FAILED
from workbench.tables import read_csv

TINY = Experiment(
    stacks=("attention: mh-attention,num_heads=2 swiglu", "perceptron: mlp"),
    settings=("memorization,vocab_size=16,seq_len=8,num_train_examples=64",),
    lrs=(3e-3, 1e-2),
    weight_decays=(0.0,),
    seeds=(0,),
    dim=8,
    batch_size=32,
    epochs=3,
    num_test_examples=32,
    executor="serial",
)
CONFIG = ROOT / "configs/mad/benchmark.tiny.yaml"


def at(folder: Path, **changes) -> Experiment:
    return replace(TINY, run=RunOptions(root=folder, device="cpu", threads=1), **changes)


def score_table(folder: Path) -> str:
    (path,) = folder.glob("mad/benchmark-*/tables/scores.csv")
    return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------- what it consists of


def test_the_published_grid_has_66_settings_and_396_runs():
    work = main(Experiment(dry_run=True))
    assert (work["settings"], work["runs"]) == (66, 396)
    assert work["optimiser_steps"] == pytest.approx(5.38e6, rel=0.001)
    assert work["training_tokens"] == pytest.approx(1.82e11, rel=0.002)
    counts = Counter(setting.task for setting in published_settings())
    assert sorted(counts.values()) == [6, 11, 11, 11, 13, 14]
    assert counts["memorization"] == 6
    assert counts["noisy-in-context-recall"] == 14


def test_mini_has_all_six_tasks():
    jobs = jobs_of(Experiment(preset="mini"))
    assert len({job.setting.task for job in jobs}) == 6
    assert describe_work(jobs)["runs"] == 7


def test_shards_are_disjoint_and_complete():
    jobs = largest_first(jobs_of(Experiment(only_task=("memorization",))))
    for n in (1, 2, 5, 7):
        parts = [shard_of(jobs, f"{i}/{n}") for i in range(1, n + 1)]
        keys = [job.experiment for part in parts for job in part]
        assert len(keys) == len(set(keys)) == len(jobs) == 36
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [job.tokens for job in jobs] == sorted((job.tokens for job in jobs), reverse=True)


def test_the_executor_does_not_change_the_key():
    spread = replace(TINY, executor="ray", workers=7, shard="1/2")
    assert resolved(spread) == resolved(TINY)
    assert resolved(replace(TINY, lrs=(1e-3,))) != resolved(TINY)


def test_flags_of_the_published_script_are_other_names(tmp_path):
    plain = replace(TINY, run=RunOptions(root=tmp_path, dtype="bfloat16", threads=2), workers=4)
    published = replace(TINY, logs_path=tmp_path, precision="bf16", cpus=9, num_cpus_trial=2)
    assert published == plain
    assert replace(TINY, gpus=2, num_trials_gpu=3, cpus=16).workers == 6
    assert design_of(published) == design_of(TINY)
    assert {job.experiment.run.dtype for job in jobs_of(published)} == {"bfloat16"}
    with pytest.raises(ConfigError, match="num_trials_gpu=2 with gpus=0"):
        replace(TINY, num_trials_gpu=2)
    with pytest.raises(ConfigError, match="cpus=0"):
        replace(TINY, cpus=0)


# ---------------------------------------------------------------- scores


def outcome(validation: float, test: float, **changes) -> Outcome:
    return replace(Outcome("done", validation, test, test, 0.125, 1.0), **changes)


def test_validation_selects_and_test_max_is_beside_it():
    jobs = jobs_of(replace(TINY, stacks=TINY.stacks[:1]))
    (model,) = score_models(jobs, [outcome(0.9, 0.6), outcome(0.8, 0.7)])
    (task,) = model.tasks.values()
    assert task.score.value == 0.6
    assert task.test_max == 0.7
    assert model.rows()[0]["optimism"] == pytest.approx(0.1)


def test_a_score_is_the_mean_over_settings_and_seeds():
    two = ("memorization,vocab_size=16,seq_len=8", "memorization,vocab_size=32,seq_len=8")
    jobs = jobs_of(replace(TINY, stacks=("M: mlp",), settings=two, lrs=(1e-3,), seeds=(0, 1)))
    values = [0.2, 0.4, 0.5, 0.9]
    (model,) = score_models(jobs, [outcome(v, v, ceiling=0.5) for v in values])
    (task,) = model.tasks.values()
    assert task.score.value == pytest.approx((0.3 + 0.7) / 2)
    assert task.normalised.value == pytest.approx(1.0)


def test_a_diverged_run_counts_as_chance_and_is_flagged(tmp_path):
    jobs = jobs_of(at(tmp_path))
    lost = read_outcome(jobs[0], {FAILED: "DivergedError: loss is not finite"})
    assert (lost.status, lost.test) == ("diverged", pytest.approx(jobs_chance(jobs)))

    def one(experiment):
        if experiment.lr == 1e-2:
            from workbench.errors import DivergedError

            raise DivergedError("loss is not finite")
        return train_one(experiment)

    results = carry_out(at(tmp_path), jobs, one)
    assert results["diverged"] == 2
    rows = read_csv(next(tmp_path.glob("mad/benchmark-*/tables/runs.csv")))
    assert [row["status"] for row in rows] == ["done", "diverged"] * 2


def jobs_chance(jobs) -> float:
    from mad.registry import build_task
    from mad.train import task_options

    return build_task(jobs[0].experiment.task, task_options(jobs[0].experiment))[0].chance()


def test_rows_of_the_test_split_are_kept_and_add_up(tmp_path):
    experiment = jobs_of(at(tmp_path))[0].experiment
    results = train_one(experiment)
    (path,) = tmp_path.glob("mad/train-*/test_rows.safetensors")
    rows = read_safetensors(path)
    assert len(rows["correct"]) == 32
    assert int(rows["scored"].sum()) == results["n_scored"]
    ratio = rows["correct"].sum() / rows["scored"].sum()
    assert float(ratio) == pytest.approx(results["test_accuracy"])


# ---------------------------------------------------------------- kills, failures, executors


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "mad.benchmark", "--config", str(CONFIG), "--root", str(folder)]
    return subprocess.Popen(
        [*words, *arguments], cwd=ROOT, env=child_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_in_the_middle_it_ends_with_equal_scores_and_repeats_nothing(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = start(whole)
    process = start(cut, "--executor", "process", "--workers", "2")
    try:
        deadline = time.monotonic() + 120
        while len(list(cut.glob("mad/train-*/results.json"))) < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = {p: p.stat().st_mtime_ns for p in cut.glob("mad/train-*/results.json")}
    assert 3 <= len(done) < 8
    assert not list(cut.glob("mad/benchmark-*/results.json"))
    again = start(cut, "--executor", "process", "--workers", "2")
    errors = again.communicate(timeout=240)[1]
    assert again.returncode == 0, errors
    first.communicate(timeout=240)
    assert first.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert len(list(cut.glob("mad/train-*/results.json"))) == 8
    assert score_table(cut) == score_table(whole)  # serial and process give one table
    values = [
        read_json(next(f.glob("mad/benchmark-*/results.json")))["values"] for f in (cut, whole)
    ]
    assert values[0] == values[1]


def test_a_failed_run_costs_only_itself_and_ends_with_status_1(tmp_path):
    bad = at(tmp_path, stacks=("bad: mh-attention,num_heads=3", "good: mlp"))
    with pytest.raises(JobsFailed, match=r"(?s)2 of 4 runs failed.*not divisible"):
        main(bad)
    rows = read_csv(next(tmp_path.glob("mad/benchmark-*/tables/runs.csv")))
    assert [row["status"] for row in rows] == ["failed", "failed", "done", "done"]
    assert "good" in score_table(tmp_path)
    assert not list(tmp_path.glob("mad/benchmark-*/results.json"))
    words = ["--stacks", "bad: mh-attention,num_heads=3", "good: mlp"]
    process = start(tmp_path, *words, "--only-task", "memorization")
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert "2 of 4 runs failed" in errors
    assert "Traceback" not in errors


def test_shards_then_the_whole_repeat_nothing(tmp_path):
    for shard in ("1/2", "2/2"):
        assert main(at(tmp_path, shard=shard))["runs_done"] == 2
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("mad/train-*/results.json")}
    assert len(done) == 4
    results = main(at(tmp_path))
    assert results["runs"] == 4
    assert {p: p.stat().st_mtime_ns for p in done} == done


# ---------------------------------------------------------------- own models


class Mean(torch.nn.Module):
    def __init__(self, vocab_size: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.head = torch.nn.Linear(width, vocab_size)

    def forward(self, ids):
        return self.head(self.embedding(ids).cumsum(dim=1))


SMALL = {
    "settings": TINY.settings, "lrs": (1e-2,), "weight_decays": (0.0,), "epochs": 2,
    "num_test_examples": 32, "batch_size": 32,
}  # fmt: skip


def test_a_model_of_ones_own_is_scored_and_found_again(tmp_path):
    made = []

    def make(task, vocab_size, max_length):
        made.append((task, vocab_size, max_length))
        return Mean(vocab_size)

    scores = mad.benchmark(make, "mean", logs_path=tmp_path, **SMALL)
    assert list(scores.index) == ["memorization", "mean of 1 task"]
    assert scores.name == "mean"
    assert set(made) == {("memorization", 16, 8)}
    (path,) = tmp_path.glob("mad/train-*/results.json")
    before = path.stat().st_mtime_ns
    assert mad.benchmark(make, "mean", logs_path=tmp_path, **SMALL).equals(scores)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="runs has changed"):  # another model, the same name
        mad.benchmark(lambda t, v, n: Mean(v, 9), "mean", logs_path=tmp_path, **SMALL)


def test_factories_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="top of a module"):
        mad.benchmark(lambda t, v, n: Mean(v), "m", logs_path=tmp_path, executor="process")
    with pytest.raises(ConfigError, match="returned a int"):
        mad.benchmark(lambda t, v, n: 1, "m", logs_path=tmp_path, **SMALL)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stacks": ("mh-atention",)}, "nearest: mh-attention"),
        ({"stacks": ("A: mlp", "A: swiglu")}, "two stacks have one name"),
        ({"settings": ("memorisation",)}, "nearest: memorization"),
        ({"settings": ("memorization,vocab",)}, "name=value"),
        ({"settings": ("memorization,vocab_sise=4",)}, "vocab_size"),
        ({"settings": ("in-context-recall,vocab_size=8,noise_vocab_size=8",)}, "vocab_size"),
        ({"settings": ("in-context-recall,seq_len=7",)}, "even"),
        ({"only_task": ("memorisation",)}, "nearest: memorization"),
        ({"lrs": (1e-3, 1e-3)}, "all unequal"),
        ({"shard": "3/2"}, "i/n"),
        ({"workers": 0}, "workers=0"),
        ({"max_settings": 0}, "max_settings=0"),
    ],
)
def test_bad_benchmarks_are_refused_before_anything_is_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


def test_a_folder_of_another_benchmark_is_refused(tmp_path):
    named = RunOptions(root=tmp_path, device="cpu", threads=1, name="one")
    main(replace(TINY, stacks=("perceptron: mlp",), run=named))
    with pytest.raises(Exception, match="other settings"):
        main(replace(TINY, stacks=("perceptron: mlp mlp",), run=named))
