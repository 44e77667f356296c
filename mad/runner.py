"""`benchmark` as a function: a model of your own on the whole benchmark, one score per task.

from mad import benchmark
def make(task, vocab_size, max_length):
    return MyModel(vocab_size, 128, max_length)
scores = benchmark(make, "my-model", logs_path="logs")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mad.api import GivenModel, digest
from mad.benchmark import Experiment, carry_out, jobs_of
from mad.grid import Job
from mad.registry import build_task
from mad.tasks.task import Task
from mad.train import Experiment as Training
from mad.train import fit, task_options
from workbench.errors import ConfigError
from workbench.record import RunOptions
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

MakeModel = Callable[[str, int, int], "nn.Module"]
"""`make(task, vocab_size, max_length)`: a fresh model that maps token ids to logits."""


@dataclass(frozen=True)
class GivenBenchmark(Experiment):
    """A benchmark of a model that a function makes."""

    model_id: str = "model"
    """Name of the model in results and in the keys of its runs."""

    def models(self) -> list[tuple[str, tuple[str, ...]]]:
        """The one model; no layers are named."""
        return [(self.model_id, ())]

    def training(self, **settings: Any) -> GivenModel:
        """A training run of the model."""
        return GivenModel(**settings, model_id=self.model_id)


@dataclass(frozen=True)
class GivenMain:
    """`mad.train.main` for models that a function makes."""

    make_model: MakeModel

    def __call__(self, experiment: Training) -> dict[str, Any]:
        """The results of one run."""
        with Run.open("mad.train", experiment) as run:
            if run.finished:
                return run.results
            return fit(run, experiment, initial_model(self.make_model, experiment))


def initial_model(make_model: MakeModel, experiment: Training) -> nn.Module:
    """The model of a run, with weights that its seed decides."""
    import torch

    from workbench.seeding import Streams

    task, _ = build_task(experiment.task, task_options(experiment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Streams(experiment.seed).integer("init"))
        model = make_model(experiment.task, task.vocab_size, longest(task))
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"make_model_fn returned a {type(model).__name__} for task {experiment.task}; expected "
            "a torch.nn.Module that maps token ids (batch, time) to logits (batch, time, vocab)"
        )
    return model


def longest(task: Task) -> int:
    """Positions that a model must be able to read, the shift not counted."""
    return max(task.length, task.seq_len)


def with_digest(job: Job, make_model: MakeModel) -> Job:
    """The job with the digest of its initial model in its key: another model is another run."""
    found = digest(initial_model(make_model, job.experiment))
    one = cast("GivenModel", job.experiment)
    return replace(job, experiment=replace(one, model_digest=found))


def benchmark(
    make_model_fn: MakeModel,
    model_id: str,
    gpus: int = 0,
    cpus: int = 2,
    num_trials_gpu: int = 1,
    num_cpus_trial: int = 1,
    logs_path: str | Path = "benchmark/logs",
    *,
    executor: Literal["serial", "process", "ray"] = "serial",
    tasks: Sequence[str] = (),
    **settings: Any,
) -> pd.Series:
    """Benchmark the models of `make_model_fn(task, vocab_size, max_length)`; scores by task.

    The last entry is the mean of the tasks, called `MAD` if these are the six of the benchmark.
    Scores are selected on validation; the published way stands in the table `scores.csv` of the run
    under `logs_path`, beside intervals and every run. `settings` are further fields of
    `mad.benchmark.Experiment`, such as `preset="mini"` or `lrs=(1e-3,)`. Runs side by side:
    `gpus` · `num_trials_gpu`, or `cpus` // `num_cpus_trial` without a GPU. Executors other than
    serial need a function that other processes can import. Runs that are there are not repeated.

    Raises:
        ConfigError: settings that do not go together, or a factory that makes no module.
        JobsFailed: some runs failed.
    """
    import pandas as pd

    name = getattr(make_model_fn, "__qualname__", type(make_model_fn).__qualname__)
    if executor != "serial" and ("<locals>" in name or "<lambda>" in name):
        raise ConfigError(
            f"make_model_fn={name} is local: executor={executor!r} needs a function at the top of "
            "a module, which other processes can import; or use executor='serial'"
        )
    if gpus < 0 or min(cpus, num_trials_gpu, num_cpus_trial) < 1:
        raise ConfigError(
            f"gpus={gpus}, cpus={cpus}, num_trials_gpu={num_trials_gpu}, "
            f"num_cpus_trial={num_cpus_trial}: expected gpus ≥ 0 and the others ≥ 1"
        )
    workers = gpus * num_trials_gpu if gpus else max(1, cpus // num_cpus_trial)
    experiment = GivenBenchmark(
        layers=(),
        model_id=model_id,
        executor=executor,
        workers=workers,
        gpus=gpus,
        only_task=tuple(tasks),
        run=settings.pop("run", RunOptions(root=Path(logs_path))),
        **settings,
    )
    jobs = [with_digest(job, make_model_fn) for job in jobs_of(experiment)]
    results = carry_out(experiment, jobs, GivenMain(make_model_fn))
    scores = {row["task"]: row["accuracy"] for row in results["models"][0]["scores"]}
    return pd.Series(scores, name=model_id)
