"""What a benchmark consists of: settings of tasks, the sweep of each, and the list of all runs.

The published protocol varies one option of a task at a time around its baseline and sweeps learning
rate × weight decay at every setting: 66 settings × 6 points = 396 runs per model.
[arXiv 2403.17844; published code athms/mad-lab]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from mad.registry import TASKS, build_task, stack_name, task_spec
from mad.train import Experiment as Training
from mad.train import task_options
from workbench.cli import apply_settings
from workbench.errors import ConfigError, unknown_name

BENCHMARK_TASKS = (
    "compression",
    "fuzzy-in-context-recall",
    "in-context-recall",
    "memorization",
    "noisy-in-context-recall",
    "selective-copying",
)
"""The six tasks whose mean is the score of a model, in the order of published tables."""


@dataclass(frozen=True)
class Setting:
    """One difficulty of one task: a task and the settings of `mad.train` that differ there."""

    task: str
    """Task name, or module:Class."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `mad.train.Experiment`."""

    @property
    def label(self) -> str:
        """The setting in words, e.g. `in-context-recall, vocab_size=32`."""
        return ", ".join([self.task, *(f"{k}={v}" for k, v in self.changes.items())])


@dataclass(frozen=True)
class Preset:
    """A whole benchmark: settings, sweep, and the size of model and training."""

    settings: tuple[Setting, ...]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    dim: int
    batch_size: int
    epochs: int
    num_test_examples: int
    seed: int = 12345
    training: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `mad.train.Experiment` for every run; a setting's own win."""


def published_settings() -> tuple[Setting, ...]:
    """The baseline of each of the six tasks, and every change of one option beside it."""
    return tuple(
        Setting(task, changes)
        for task in BENCHMARK_TASKS
        if task in TASKS
        for changes in (
            {},
            *({name: value} for name, values in TASKS[task].changes.items() for value in values),
        )
    )


def parse_setting(text: str) -> Setting:
    """A setting as a user writes it.

    >>> parse_setting("memorization, vocab_size=512, lr=1e-3").changes
    {'vocab_size': 512, 'lr': '1e-3'}
    """
    name, *assignments = (part.strip() for part in text.split(","))
    task_spec(name)
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"setting {text!r}: {assignment!r} is not of the form name=value")
        changes[key.strip()] = yaml.safe_load(value)
    return Setting(name, changes)


MINI = (
    "compression,vocab_size=16,seq_len=8",
    "fuzzy-in-context-recall,vocab_size=8,seq_len=24,k_motif_size=2,v_motif_size=2",
    "in-context-recall,vocab_size=8,seq_len=16,epochs=6",
    "memorization,vocab_size=256,num_train_examples=256,epochs=60,evaluate_every=40",
    "memorization,vocab_size=1024,num_train_examples=256,epochs=60,evaluate_every=40",
    "noisy-in-context-recall,vocab_size=12,noise_vocab_size=4,seq_len=16,epochs=6",
    "selective-copying,vocab_size=16,seq_len=32,num_tokens_to_copy=6",
)
"""Settings of the mini benchmark: small enough that attention passes its transition on recall."""


def preset_named(name: str) -> Preset:
    """`full` is the published grid; `mini` is sized for two CPU cores."""
    if name == "full":
        return Preset(
            published_settings(),
            lrs=(1e-4, 5e-4, 1e-3),
            weight_decays=(0.0, 0.1),
            dim=128,
            batch_size=128,
            epochs=200,
            num_test_examples=1280,
        )
    if name == "mini":
        return Preset(
            tuple(parse_setting(text) for text in MINI),
            lrs=(5e-3,),
            weight_decays=(0.0,),
            dim=64,
            batch_size=64,
            epochs=4,
            num_test_examples=512,
            seed=1,
            training={
                "num_train_examples": 12800,
                "evaluate_every": 100,
                "save_every": 500,
                "stop_accuracy": 0.995,
                "test_curve": False,
            },
        )
    raise unknown_name("preset", name, ("full", "mini"))


def split_stack(text: str) -> tuple[str, tuple[str, ...]]:
    """The name and the layers of a stack; its layers' shorthands are its name if it has none.

    >>> split_stack("perceptron: mlp mlp")
    ('perceptron', ('mlp', 'mlp'))
    >>> split_stack("mh-attention swiglu")
    ('mA-Sg', ('mh-attention', 'swiglu'))
    """
    name, colon, rest = text.partition(": ")
    layers = tuple((rest if colon else text).split())
    return (name.strip() if colon else stack_name(layers)), layers


@dataclass(frozen=True)
class Job:
    """One training run of a benchmark and where it belongs."""

    stack: str
    """Name of the model."""
    setting: Setting
    """Task and difficulty."""
    point: tuple[float, float]
    """Learning rate and weight decay."""
    seed: int
    """Seed of all streams of the run."""
    experiment: Training
    """The run itself."""
    rows: int
    """Training rows."""
    tokens: int
    """Training tokens if no run stops early: the size that orders and prices the jobs."""
    steps: int
    """Optimiser steps if no run stops early."""


def make_jobs(
    stacks: Iterable[tuple[str, tuple[str, ...]]],
    settings: Sequence[Setting],
    base: Training,
    *,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    seeds: Sequence[int],
) -> list[Job]:
    """All runs: stack by stack, setting by setting, point by point, seed by seed."""
    jobs = []
    for (name, layers), setting in itertools.product(stacks, settings):
        for lr, decay, seed in itertools.product(lrs, weight_decays, seeds):
            sweep = {"lr": lr, "weight_decay": decay, "seed": seed}
            given = {"task": setting.task, **sweep, **setting.changes, "layers": list(layers)}
            one = apply_settings(base, given, f"setting {setting.label!r}")
            task, rows = build_task(one.task, task_options(one))
            steps = one.epochs * -(-rows // min(one.batch_size, rows))
            tokens = one.epochs * rows * task.seq_len
            point = (one.lr, one.weight_decay)
            jobs.append(Job(name, setting, point, one.seed, one, rows, tokens, steps))
    return unique(jobs)


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Jobs without repetitions (a setting that fixes its own rate is swept at one point only)."""
    seen: dict[tuple[str, str, Training], Job] = {}
    for job in jobs:
        seen.setdefault((job.stack, job.setting.label, job.experiment), job)
    return list(seen.values())


def largest_first(jobs: Sequence[Job]) -> list[Job]:
    """The jobs by falling size, so that no large one is left alone at the end."""
    return sorted(jobs, key=lambda job: -job.tokens)


def shard_of(jobs: Sequence[Job], shard: str) -> list[Job]:
    """Part i of n of the jobs, `shard` = `i/n` with 1 ≤ i ≤ n; parts are disjoint and complete.

    >>> [len(shard_of(range(7), f"{i}/3")) for i in (1, 2, 3)]
    [3, 2, 2]
    """
    part, count = parse_shard(shard)
    return list(jobs[part - 1 :: count])


def parse_shard(shard: str) -> tuple[int, int]:
    """The two numbers of `i/n`."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"shard={shard!r}; expected i/n with 1 ≤ i ≤ n, e.g. 1/4 … 4/4")
    return int(match[1]), int(match[2])


def select_settings(
    settings: Sequence[Setting], only_task: Sequence[str], max_settings: int | None
) -> list[Setting]:
    """The settings of the named tasks, the first `max_settings` of each."""
    known = list(dict.fromkeys(setting.task for setting in settings))
    for name in only_task:
        if name not in known:
            raise unknown_name("task of this benchmark", name, known)
    counts = dict.fromkeys(known, 0)
    chosen = []
    for setting in settings:
        if only_task and setting.task not in only_task:
            continue
        counts[setting.task] += 1
        if max_settings is None or counts[setting.task] <= max_settings:
            chosen.append(setting)
    return chosen
