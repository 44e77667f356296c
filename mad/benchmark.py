"""Score stacks of layers on the whole benchmark: every task setting, swept.   [arXiv 2403.17844]

    python -m mad.benchmark --layers mh-attention swiglu mh-attention swiglu --dry-run
    python -m mad.benchmark --config configs/mad/benchmark.mini.yaml
    python -m mad.benchmark --stacks "A: mh-attention mlp" "H: hyena mlp" --only-task memorization
    python -m mad.benchmark --layers mh-hyena swiglu mh-hyena swiglu --shard 1/4

Each run is one of mad.train, found again by its settings: the same command continues after any
stop, several processes or machines with one --root share the work, and a run that fails costs only
itself (it is listed, and the exit status is 1). After all shards, the command without --shard makes
the scores. Data that are not there are drawn.

Flags of the published script and what they are here: `--logs-path` is `--root`, `--precision` is
`--dtype`; `--cpus`, `--num-cpus-trial` and `--num-trials-gpu` set `--workers` and `--threads`.
`--data-path` is `--zenodo` for the published rows, else rows are drawn in the processes themselves,
so there are no `--num-data-workers`. Metrics and weights of every run are kept (`--log-to-csv`,
`--save-checkpoints`). Ray takes its folder from RAY_TMPDIR (`--ray-tmp-path`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mad.grid import (
    Job,
    Preset,
    Setting,
    largest_first,
    make_jobs,
    parse_setting,
    parse_shard,
    preset_named,
    select_settings,
    shard_of,
    split_stack,
)
from mad.scores import (
    DIVERGED,
    LOST,
    ModelScore,
    Outcome,
    compare_models,
    read_outcome,
    score_models,
)
from mad.train import DTYPE_OF, Precision
from mad.train import Experiment as Training
from mad.train import main as train_one
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, DataError, InUse, require_least
from workbench.run import Run, settings_of
from workbench.sweep import FAILED, run_all

Main = Callable[[Training], dict[str, Any]]


COUNTS = ("num_trials_gpu", "cpus", "num_cpus_trial")
PUBLISHED_NAMES = (*COUNTS, "precision", "logs_path")
"""Flags of the published script that stand for others here; none of them is in a key."""


class JobsFailed(DataError):
    """Some runs of a benchmark failed; the others are kept."""


@dataclass(frozen=True)
class Experiment:
    """Which models on which settings; what is none comes from the preset."""

    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """The layers of one model, in order."""
    stacks: tuple[str, ...] = ()
    """Several models instead: layers separated by spaces, after a name if wanted (`A: mlp mlp`)."""
    preset: Literal["full", "mini"] = "full"
    """full: 66 settings as published. mini: six tasks, small, for two CPU cores."""
    settings: tuple[str, ...] = ()
    """Settings instead of the preset's: task and options of mad.train, separated by commas."""
    only_task: tuple[str, ...] = ()
    """These tasks only."""
    max_settings: int | None = None
    """At most so many settings of each task."""
    lrs: tuple[float, ...] | None = None
    """Learning rates of the sweep."""
    weight_decays: tuple[float, ...] | None = None
    """Weight decays of the sweep."""
    seeds: tuple[int, ...] | None = None
    """Seeds of every sweep point."""
    dim: int | None = None
    """Width of the models."""
    batch_size: int | None = None
    """Rows per step."""
    epochs: int | None = None
    """Passes over the training rows."""
    num_test_examples: int | None = None
    """Rows of the test split, and of the validation split."""
    zenodo: Path | None = None
    """Folder of the published data sets: train and test rows from there instead of drawn ones."""
    protocol: Literal["lab", "mad-code", "mad-paper"] = "lab"
    """Betas, schedule, clipping and which weights are scored."""
    executor: Literal["serial", "process", "ray"] = "process"
    """How the runs are made; `process` and `ray` give each one thread."""
    workers: int = 2
    """Runs side by side."""
    gpus: int = 0
    """Spread the runs over so many CUDA devices; 0 leaves the choice to --device."""
    num_trials_gpu: int | None = None
    """Published name: runs side by side on each of the --gpus; sets --workers."""
    cpus: int | None = None
    """Published name: processors for all runs; sets --workers where there are no --gpus."""
    num_cpus_trial: int | None = None
    """Published name: threads of each run; sets --threads, and --workers with --cpus."""
    precision: Precision | None = None
    """Published name of --dtype: auto, bf16, 16, 32 or 64."""
    logs_path: Path | None = None
    """Published name of --root."""
    shard: str = ""
    """i/n: make only part i of n of the runs, and no scores."""
    dry_run: bool = False
    """List settings, runs and work, and end."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        sizes = ("max_settings", "dim", "batch_size", "epochs", "num_test_examples")
        require_least(self, 1, *sizes, *COUNTS)
        self.take_published_names()
        for name in ("lrs", "weight_decays", "seeds"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise ConfigError(
                    f"{name}={list(value)}; expected one value or several, all unequal"
                )
        if self.workers < 1 or self.gpus < 0:
            raise ConfigError(f"workers={self.workers}, gpus={self.gpus}; expected ≥ 1 and ≥ 0")
        if self.shard:
            parse_shard(self.shard)
        names = [split_stack(text)[0] for text in self.stacks]
        if len(set(names)) < len(names):
            raise ConfigError(f"two stacks have one name: {', '.join(names)}; name them apart")
        jobs_of(self)

    def take_published_names(self) -> None:
        """Move what has a published name to the fields it stands for."""
        options: dict[str, Any] = {}
        if self.logs_path is not None:
            options["root"] = self.logs_path
        if self.precision is not None:
            options["dtype"] = DTYPE_OF[self.precision.partition("-")[0]]
        if self.num_cpus_trial is not None:
            options["threads"] = self.num_cpus_trial
        if options:
            object.__setattr__(self, "run", replace(self.run, **options))
        if self.num_trials_gpu is not None and not self.gpus:
            raise ConfigError(
                f"num_trials_gpu={self.num_trials_gpu} with gpus=0; give --gpus as well, or "
                "--workers for runs without a GPU"
            )
        if self.num_trials_gpu is not None:
            object.__setattr__(self, "workers", self.gpus * self.num_trials_gpu)
        elif self.cpus is not None and not self.gpus:
            object.__setattr__(self, "workers", max(1, self.cpus // (self.num_cpus_trial or 1)))
        for name in PUBLISHED_NAMES:
            object.__setattr__(self, name, None)

    def models(self) -> list[tuple[str, tuple[str, ...]]]:
        """Names and layers of the models."""
        return [split_stack(text) for text in self.stacks or (" ".join(self.layers),)]

    def training(self, **settings: Any) -> Training:
        """A training run of one of the models."""
        return Training(**settings)


def resolved(experiment: Experiment) -> Experiment:
    """The experiment with everything written out, and without what cannot change a score."""
    preset = preset_named(experiment.preset)
    return replace(
        experiment,
        stacks=tuple(f"{name}: {' '.join(layers)}" for name, layers in experiment.models()),
        layers=(),
        settings=tuple(one.label for one in settings_in(experiment, preset)),
        only_task=(),
        max_settings=None,
        lrs=experiment.lrs or preset.lrs,
        weight_decays=experiment.weight_decays or preset.weight_decays,
        seeds=experiment.seeds or (preset.seed,),
        dim=experiment.dim or preset.dim,
        batch_size=experiment.batch_size or preset.batch_size,
        epochs=experiment.epochs or preset.epochs,
        num_test_examples=experiment.num_test_examples or preset.num_test_examples,
        executor="process",
        workers=2,
        gpus=0,
        shard="",
        dry_run=False,
    )


def settings_in(experiment: Experiment, preset: Preset) -> list[Setting]:
    """The settings that the flags leave."""
    given = [parse_setting(text) for text in experiment.settings] or preset.settings
    return select_settings(given, experiment.only_task, experiment.max_settings)


def jobs_of(experiment: Experiment) -> list[Job]:
    """All runs of a benchmark, model by model and setting by setting."""
    preset = preset_named(experiment.preset)
    shared = ("dim", "batch_size", "epochs", "num_test_examples")
    base = experiment.training(
        **{name: getattr(experiment, name) or getattr(preset, name) for name in shared},
        **preset.training,
        protocol=experiment.protocol,
        zenodo=experiment.zenodo,
        run=replace(experiment.run, name=None, wandb=False, fresh=False),
    )
    jobs = make_jobs(
        experiment.models(),
        settings_in(experiment, preset),
        base,
        lrs=experiment.lrs or preset.lrs,
        weight_decays=experiment.weight_decays or preset.weight_decays,
        seeds=experiment.seeds or (preset.seed,),
    )
    if not experiment.gpus:
        return jobs
    return [on_device(job, f"cuda:{i % experiment.gpus}") for i, job in enumerate(jobs)]


def on_device(job: Job, device: str) -> Job:
    """The job on that device; its key is unchanged."""
    one = job.experiment
    return replace(job, experiment=replace(one, run=replace(one.run, device=device)))


def work_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """How much there is to do if no run stops early."""
    settings = dict.fromkeys(job.setting.label for job in jobs)
    return {
        "settings": len(settings),
        "runs": len(jobs),
        "optimiser_steps": sum(job.steps for job in jobs),
        "training_tokens": sum(job.tokens for job in jobs),
    }


def describe_work(jobs: Sequence[Job]) -> dict[str, Any]:
    """Per setting its runs and tokens, and the sums: what `--dry-run` prints."""
    lines: dict[str, Any] = {}
    for label in dict.fromkeys(job.setting.label for job in jobs):
        here = [job for job in jobs if job.setting.label == label]
        lines[label] = f"{len(here)} runs, {sum(job.tokens for job in here):.2e} tokens"
    return lines | work_of(jobs)


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Make all runs that are not there, score, draw; returns the scores."""
    jobs = jobs_of(experiment)
    if experiment.dry_run:
        return describe_work(jobs)
    return carry_out(experiment, jobs, train_one)


def carry_out(experiment: Experiment, jobs: Sequence[Job], job_main: Main) -> dict[str, Any]:
    """Make the runs with `job_main`, then score them in a run of their own.

    No lock is held while the runs are made, so the same benchmark started twice is shared.

    Raises:
        JobsFailed: some runs failed; the scores of the others are in the tables.
    """
    written_out = resolved(experiment)
    if not experiment.shard and not experiment.run.fresh:
        found = recorded(written_out, jobs)
        if found:
            return found
    mine = largest_first(jobs)
    if experiment.shard:
        mine = shard_of(mine, experiment.shard)
    sys.stderr.write(f"{len(mine)} of {len(jobs)} training runs, {experiment.executor}\n")
    results = run_all(
        job_main,
        [job.experiment for job in mine],
        executor=experiment.executor,
        workers=experiment.workers,
    )
    if experiment.shard:
        refuse_failures(mine, [str(one.get(FAILED, "")) for one in results])
        return {"shard": experiment.shard, "runs_done": len(mine), "runs_of_all": len(jobs)}
    by_run = dict(zip((job.experiment for job in mine), results, strict=True))
    outcomes = [read_outcome(job, by_run[job.experiment]) for job in jobs]
    (scores,) = run_all(Recorder(jobs, outcomes), [written_out])  # waits for one who writes it now
    if FAILED in scores:
        kind, _, message = scores[FAILED].partition(": ")
        raise JobsFailed(message) if kind == "JobsFailed" else DataError(scores[FAILED])
    return scores


def refuse_failures(jobs: Sequence[Job], messages: Sequence[str]) -> None:
    """Raise JobsFailed if a run ended in anything but a result or a diverged loss."""
    lost = [
        f"{job.stack} on {job.setting.label}, lr {job.point[0]:g}, weight decay "
        f"{job.point[1]:g}, seed {job.seed}: {text}"
        for job, text in zip(jobs, messages, strict=True)
        if text and not text.startswith("DivergedError")
    ]
    if lost:
        shown = "\n  ".join(line[:300] for line in lost[:3])
        more = f"\n  and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise JobsFailed(
            f"{len(lost)} of {len(jobs)} runs failed, the others are kept; mend the cause and run "
            f"the same command to make these:\n  {shown}{more}"
        )


def digest_of(jobs: Sequence[Job]) -> str:
    """SHA-256 of the settings of all runs: defaults that are named nowhere count too."""
    text = json.dumps([settings_of(job.experiment) for job in jobs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded(experiment: Experiment, jobs: Sequence[Job]) -> dict[str, Any]:
    """The scores if this benchmark was finished before, else nothing."""
    if not (Run.open("mad.benchmark", experiment).directory / "results.json").is_file():
        return {}
    try:
        with Run.open("mad.benchmark", experiment) as run:
            run.require_same("runs", digest_of(jobs))
            return run.results if run.finished else {}
    except InUse:
        return {}


@dataclass(frozen=True)
class Recorder:
    """Writes scores, tables and figures of a benchmark whose runs are made."""

    jobs: Sequence[Job]
    outcomes: Sequence[Outcome]

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """The scores; not marked as finished, but listed, when runs are missing."""
        from mad.plot import draw_scores

        jobs, outcomes = self.jobs, self.outcomes
        with Run.open("mad.benchmark", experiment) as run:
            run.require_same("runs", digest_of(jobs))
            if run.finished:
                return run.results
            models = score_models(jobs, outcomes)
            lines = [row for model in models for row in model.rows()]
            run.table("runs", run_rows(jobs, outcomes), caption="Every training run.")
            if lines:
                run.table(
                    "settings",
                    [row for model in models for row in setting_rows(model)],
                    caption="Per setting: the sweep point that validation selects.",
                )
                run.table("scores", lines, caption=SCORES_CAPTION)
            refuse_failures(jobs, [one.message if one.status == LOST else "" for one in outcomes])
            differences = compare_models(models)
            if differences:
                run.table("differences", differences, caption="Paired bootstrap between models.")
            draw_scores(run, lines, n_rows=jobs[0].experiment.num_test_examples)
            return run.finish(
                summarize(experiment, models, jobs, outcomes),
                title=f"Benchmark of {len(models)} model{'s' if len(models) != 1 else ''}",
                question="Which layers can do which task?",
                summary=sentence(models),
                headline={m.stack: round(m.overall.value, 3) for m in models[:3] if m.overall},
            )


SCORES_CAPTION = (
    "Accuracy: mean over settings of the test accuracy of the sweep point that validation selects, "
    "with a 95 % bootstrap interval over test rows. test_max: the best test accuracy of each "
    "sweep, as published tables take it (optimistic, by `optimism`). accuracy_macro_batch: the "
    "published way of counting. normalised: divided by the ceiling of each setting."
)


def run_rows(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A line per training run."""
    return [
        {
            "stack": job.stack,
            "setting": job.setting.label,
            "lr": job.point[0],
            "weight_decay": job.point[1],
            "seed": job.seed,
            "status": outcome.status,
            "validation": outcome.validation,
            "test": outcome.test,
            "steps": outcome.steps,
            "message": outcome.message,
        }
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]


def setting_rows(model: ModelScore) -> list[dict[str, Any]]:
    """A line per setting of a model."""
    return [one.row(model.stack) for task in model.tasks.values() for one in task.settings]


def summarize(
    experiment: Experiment,
    models: Sequence[ModelScore],
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    """The results of a benchmark: one number per model and task, and all of them as rows."""
    flat: dict[str, Any] = {}
    for model in models:
        for row in model.rows():
            flat[f"{model.stack}: {row['task']}"] = row["accuracy"]
            if row["task"] == model.mean_name:
                flat[f"{model.stack}: {row['task']}, test-max (optimistic)"] = row["test_max"]
    return {
        **flat,
        "preset": experiment.preset if not is_changed(experiment) else "custom",
        "design": design_of(experiment),
        "runs": len(jobs),
        "n_rows": jobs[0].experiment.num_test_examples,
        "diverged": sum(one.status == DIVERGED for one in outcomes),
        "models": [
            {"stack": model.stack, "layers": list(model.layers), "scores": model.rows()}
            for model in models
        ],
    }


def is_changed(experiment: Experiment) -> bool:
    """Does a written-out experiment differ from its preset in more than the models?"""
    plain = resolved(Experiment(preset=experiment.preset))
    return design_of(plain) != design_of(experiment)


def design_of(experiment: Experiment) -> str:
    """Eight digits that two benchmarks share if their scores may stand in one table."""
    settings = settings_of(resolved(experiment))
    for name in ("stacks", "layers", "preset", *PUBLISHED_NAMES):
        settings.pop(name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def sentence(models: Sequence[ModelScore]) -> str:
    """The ranking in one sentence."""
    ranked = sorted(
        ((model.overall, model) for model in models if model.overall is not None),
        key=lambda pair: -pair[0].value,
    )
    return "; ".join(
        f"{model.stack} {score.value:.3f} [{score.interval.low:.3f}, {score.interval.high:.3f}] "
        f"({model.mean_name})"
        for score, model in ranked
    )


def command(experiment: Experiment) -> dict[str, Any]:
    """`main` of the command line: failed runs are listed and end it with status 1."""
    try:
        return main(experiment)
    except JobsFailed as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    cli(command, EXPERIMENT)
