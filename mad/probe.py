"""Test a trained stack on sequences longer than it was trained on.

    python -m mad.probe --task in-context-recall --layers mh-attention swiglu mh-attention swiglu
    python -m mad.probe --task selective-copying --layers mamba swiglu --factors 1 2 4

Training (one run of mad.train, found again when it is there) is on sequences of length L; the rows
of the tests come from the same task with its `seq_len` set to L times each factor, every other
option the same. All layers are built for the longest test, also in training: Hyena's implicit
filters are functions of position / longest length, so that a filter made for L has nothing to say
beyond it. What follows from it for reading: a Hyena trained here is another model than one of
mad.train's default at the same L.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mad.registry import assignments, backbone_of, build_task, parse_layer, stack_name
from mad.tasks.task import Task, generate
from mad.train import Experiment as Training
from mad.train import main as train_one
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import CheckpointError, ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from mad.model import Stack


@dataclass(frozen=True)
class Experiment:
    """Which layers on which task, trained how, tested how far."""

    task: str = "in-context-recall"
    """Task name, or module:Class of your own."""
    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """Layers in order, with options if any (`mh-attention,num_heads=4`), or module:Class."""
    factors: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Lengths of the tests, in lengths of the training rows."""
    seq_len: int | None = None
    """Length L of the training rows; none means the task's baseline."""
    vocab_size: int | None = None
    """Number of tokens, special ones included."""
    options: tuple[str, ...] = ()
    """Further options of the task, as name=value (`num_tokens_to_copy=8`)."""
    num_train_examples: int | None = None
    """Training rows."""
    num_test_examples: int = 1280
    """Rows of the test at each length."""
    dim: int = 128
    """Width of the model."""
    protocol: Literal["lab", "mad-code", "mad-paper"] = "lab"
    """Betas, schedule, clipping and which weights are tested."""
    batch_size: int = 128
    """Rows per step; long tests take fewer at a time."""
    epochs: int = 200
    """Passes over the training rows."""
    lr: float = 5e-4
    """Largest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    stop_accuracy: float = 0.999
    """Stop training once validation accuracy reaches this; above 1 never."""
    evaluate_every: int | None = None
    """Steps between validations; none means one epoch."""
    seed: int = 12345
    """Seed of all named streams: data, initialisation, order."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) < 1:
            raise ConfigError(
                f"factors={list(self.factors)}; expected whole numbers from 1, e.g. 1 2 4 8 16"
            )
        if len(set(self.factors)) != len(self.factors):
            raise ConfigError(f"factors={list(self.factors)}; expected each length once")
        for layer in self.layers:
            parse_layer(layer)
        task = probe_task(self, 1)
        if backbone_of(task) != "language-model":
            raise ConfigError(
                f"task {self.task} is made for the backbone {backbone_of(task)}; language models "
                "are probed here: choose a task for them, e.g. in-context-recall"
            )
        for factor in self.factors:
            probe_task(self, factor)
        training_of(self)


def given_options(experiment: Experiment) -> dict[str, Any]:
    """The task options that the user gave."""
    flags = {name: getattr(experiment, name) for name in ("vocab_size", "seq_len")}
    given = {name: value for name, value in flags.items() if value is not None}
    return given | assignments(experiment.options, f"options of task {experiment.task}")


def probe_task(experiment: Experiment, factor: int) -> Task:
    """The task with rows `factor` times as long as in training, all else equal."""
    given = given_options(experiment)
    base, _ = build_task(experiment.task, given)
    return build_task(experiment.task, given | {"seq_len": factor * base.seq_len})[0]


def longest(experiment: Experiment) -> int:
    """Positions of the longest rows that the model meets."""
    return max(probe_task(experiment, factor).length for factor in (1, *experiment.factors))


def training_of(experiment: Experiment) -> Training:
    """The training run of a probe: at L, with layers made for the longest test."""
    shared = (
        "task",
        "layers",
        "seq_len",
        "vocab_size",
        "options",
        "num_train_examples",
        "num_test_examples",
        "dim",
        "protocol",
        "batch_size",
        "epochs",
        "lr",
        "weight_decay",
        "stop_accuracy",
        "evaluate_every",
        "seed",
    )
    return Training(
        **{name: getattr(experiment, name) for name in shared},
        max_length=longest(experiment),
        run=replace(experiment.run, name=None, wandb=False),
    )


EXPERIMENT = Experiment()  # edit me


def trained_model(experiment: Experiment, training: Training, task: Task) -> Stack:
    """The trained stack with the weights that the protocol scores, made for the longest test.

    Raises:
        CheckpointError: the weights of the training run are gone.
    """
    from mad.model import build_model
    from mad.protocols import PROTOCOLS
    from workbench.storage import read_safetensors

    file = "model" if PROTOCOLS[experiment.protocol].selected else "model_last"
    found = replace(training, run=replace(training.run, fresh=False))  # never begun anew here
    with Run.open("mad.train", found) as run:
        path = run.path(f"{file}.safetensors")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the weights of the training run are gone; delete its folder to train anew"
        )
    model = build_model(
        experiment.layers,
        vocab_size=task.vocab_size,
        width=experiment.dim,
        max_length=longest(experiment),
        seed=0,
    )
    model.load_state_dict(read_safetensors(path))
    return model


def probe(experiment: Experiment, run: Run, model: Stack, factor: int) -> dict[str, Any]:
    """Accuracy on fresh test rows of one length, beside chance there."""
    import torch

    from mad.evaluate import evaluate

    device, dtype = run.device.device, run.device.dtype
    task = probe_task(experiment, factor)
    # the seed of mad.train's test rows: at factor 1 they are the very same
    rows = generate(task, experiment.num_test_examples, "test", run.streams.integer("data"))
    inputs, answers = (torch.from_numpy(part).to(device, torch.int32) for part in rows[:2])
    mixed = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    with mixed:
        score = evaluate(model, inputs, answers, batch_size=max(1, experiment.batch_size // factor))
    return {
        "factor": factor,
        "seq_len": task.seq_len,
        "positions": task.length,
        "accuracy": score.accuracy,
        "low": score.low,
        "high": score.high,
        "nll_nats": score.nll_nats,
        "accuracy_sequence": score.accuracy_sequence,
        "chance": task.chance(),
        "n_scored": score.n_scored,
        "n_rows": score.n_rows,
    }


def main(experiment: Experiment) -> dict[str, Any]:
    """Train at L, test at every length; returns the accuracies by length."""
    with Run.open("mad.probe", experiment) as run:
        if run.finished:
            return run.results
        import torch

        training = training_of(experiment)
        task = probe_task(experiment, 1)
        run.note(f"training at {task.seq_len}, layers made for {training.max_length} positions")
        trained = train_one(training)
        model = trained_model(experiment, training, task)
        wide = run.device.dtype == torch.float64
        model.to(run.device.device, torch.float64 if wide else torch.float32)
        rows = []
        for factor in run.progress(sorted(experiment.factors), "lengths"):
            row = run.once(
                f"length-{factor}", lambda factor=factor: probe(experiment, run, model, factor)
            )
            run.note(
                f"length {row['seq_len']} ({factor} ×): {row['accuracy']:.4f} "
                f"({row['low']:.4f} to {row['high']:.4f}), chance {row['chance']:.4f}"
            )
            rows.append(row)
        draw(run, experiment, task.seq_len, rows)
        name = stack_name(experiment.layers)
        first, last = rows[0], rows[-1]
        return run.finish(
            {f"accuracy_{row['factor']}x": row["accuracy"] for row in rows}
            | {
                "task": experiment.task,
                "stack": name,
                "trained_seq_len": task.seq_len,
                "train_run_test_accuracy": trained["test_accuracy"],
                "steps": trained["steps"],
            },
            title=f"{name} on {experiment.task}, longer than trained",
            question="Does what was learned hold on longer sequences?",
            summary=f"Trained on {task.seq_len} tokens: {first['accuracy']:.3f} at "
            f"{first['seq_len']}, {last['accuracy']:.3f} ({last['low']:.3f} to {last['high']:.3f}) "
            f"at {last['seq_len']}; chance {last['chance']:.3f}.",
        )


def draw(run: Run, experiment: Experiment, trained: int, rows: list[dict[str, Any]]) -> None:
    """The table and the curve of accuracy by length."""
    from workbench.plots import INK, line_plot, new_figure

    name = stack_name(experiment.layers)
    caption = (
        f"{name} on {experiment.task}, trained on {trained} tokens: test accuracy by length, 95 % "
        f"intervals over n = {rows[0]['n_rows']} rows at each."
    )
    run.table("lengths", rows, caption=caption)
    figure, axes = new_figure(width=5.8, height=3.8)
    line_plot(
        axes,
        rows,
        x="seq_len",
        y="accuracy",
        low="low",
        high="high",
        xlabel="tokens in a test row",
        ylabel="accuracy",
        title=f"{name}, trained on {trained} tokens",
        log="x",
        reference={"chance": rows[0]["chance"]},
    )
    axes.axvline(trained, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.03)
    numbers = "; ".join(f"{row['seq_len']} tokens: {row['accuracy']:.3f}" for row in rows)
    run.figure("lengths", figure, rows, caption=caption, alt=f"Accuracy by length. {numbers}.")


if __name__ == "__main__":
    cli(main, EXPERIMENT)
