"""The settings of one training run; `python -m mad.train` makes a flag of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mad.registry import assignments, build_task, parse_layer, stack_name
from workbench.cli import RunField, RunOptions
from workbench.errors import ConfigError, require_least

DTYPE_OF = {
    "auto": "auto",
    "bf16": "bfloat16",
    "16": "float16",
    "32": "float32",
    "64": "float64",
}
"""Published names of number formats, less what follows a dash."""

Precision = Literal["auto", "bf16", "bf16-mixed", "16", "16-mixed", "32", "32-true", "64"]


@dataclass(frozen=True)
class Experiment:
    """Which layers on which task, trained how."""

    task: str = "in-context-recall"
    """Task name, or module:Class of your own."""
    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """Layers in order, with options if any (`mh-attention,num_heads=4`), or module:Class."""

    vocab_size: int | None = None
    """Number of tokens, special ones included."""
    seq_len: int | None = None
    """Sequence length."""
    multi_query: bool = True
    """Recall: score every repeated key, not only the last."""
    noise_vocab_size: int | None = None
    """Number of noise tokens."""
    frac_noise: float | None = None
    """Probability of a noise pair in a slot."""
    num_tokens_to_copy: int | None = None
    """Copying: tokens to remember."""
    k_motif_size: int | None = None
    """Fuzzy recall: largest number of tokens in a key."""
    v_motif_size: int | None = None
    """Fuzzy recall: largest number of tokens in a value."""
    target_ignore_index: int = -100
    """Target of positions that are not scored; published and fixed."""
    options: tuple[str, ...] = ()
    """Further options of the task, as name=value (`map_seed=7`)."""
    num_train_examples: int | None = None
    """Training rows."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    zenodo: Path | None = None
    """Folder of the published data sets: train and test rows from there, validation drawn here."""

    dim: int = 128
    """Width of the model."""
    backbone: Literal["language-model", "autoencoder"] | None = None
    """Language model or auto-encoder; none means the one the task is made for."""
    global_pool: Literal["last", "cls", "avg"] = "last"
    """Auto-encoder: the last position, an extra one or the mean is the code."""
    max_length: int | None = None
    """Length that Hyena's filters are made for; none means the task's."""

    protocol: Literal["lab", "mad-code", "mad-paper"] = "lab"
    """Betas, schedule, clipping and which weights are scored."""
    train_targets: Literal["dense", "answers"] = "dense"
    """Recall tasks: learn to predict every next token (as published) or the answers only."""
    batch_size: int = 128
    """Rows per step."""
    epochs: int = 200
    """Passes over the training rows."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser."""
    scheduler: Literal["cosine", "cosine-epochs", "plateau", "none"] | None = None
    """Learning-rate schedule; none given means the protocol's."""
    plateau_patience: int = 5
    """Scheduler plateau: validations without a lower loss before the rate falls."""
    plateau_factor: float = 0.9
    """Scheduler plateau: the rate is multiplied by this when it falls."""
    lr: float = 5e-4
    """Largest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of a cosine schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    stop_accuracy: float = 0.999
    """Stop once validation accuracy reaches this; above 1 never."""
    early_stop: bool = False
    """Also stop after `stop_patience` validations without a better accuracy."""
    stop_patience: int = 20
    """Validations that `early_stop` waits for a better accuracy."""
    test_curve: bool = True
    """Score the test split at every validation too, for the optimistic best of them."""
    evaluate_every: int | None = None
    """Steps between validations; none means one epoch."""
    save_every: int | None = None
    """Steps between checkpoints; none means the validation period, at least 100."""
    save_checkpoints: bool = True
    """Save on the way, to continue from, and keep the best and the last weights."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] | None = None
    """Published name of --device."""
    precision: Precision | None = None
    """Published name of --dtype: bf16 is bfloat16, 16 float16, 32 float32, 64 float64."""
    log_to_wandb: bool = False
    """Published name of --wandb."""
    seed: int = 12345
    """Seed of all named streams: data, initialisation, order."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        self.take_published_names()
        require_least(self, 1, "num_test_examples", "dim", "batch_size", "epochs", "stop_patience")
        require_least(self, 1, "num_train_examples", "evaluate_every", "save_every", "max_length")
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise ConfigError(
                f"min_lr={self.min_lr} and lr={self.lr}: expected 0 ≤ min_lr ≤ lr > 0"
            )
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay={self.weight_decay} is negative")
        if not 0 < self.plateau_factor < 1 or self.plateau_patience < 0:
            raise ConfigError(
                f"plateau_factor={self.plateau_factor} and plateau_patience="
                f"{self.plateau_patience}: expected a factor between 0 and 1 and a patience from 0"
            )
        if self.zenodo is not None and self.train_targets != "dense":
            raise ConfigError(
                "the published data sets hold dense training targets only: leave --train-targets "
                "as it is, or draw the rows (no --zenodo)"
            )
        if self.target_ignore_index != -100:
            raise ConfigError(
                f"target_ignore_index={self.target_ignore_index}: the rows drawn here mark what is "
                "not scored with -100, as the published ones do; leave it at -100"
            )
        self.check_model()
        build_task(self.task, task_options(self))

    def take_published_names(self) -> None:
        """Move `accelerator`, `precision` and `log_to_wandb` into the run block they stand for."""
        changes: dict[str, Any] = {}
        if self.accelerator is not None:
            changes["device"] = {"gpu": "cuda"}.get(self.accelerator, self.accelerator)
        if self.precision is not None:
            changes["dtype"] = DTYPE_OF[self.precision.partition("-")[0]]
        if self.log_to_wandb:
            changes["wandb"] = True
        if changes:
            object.__setattr__(self, "run", replace(self.run, **changes))
        for name, value in (("accelerator", None), ("precision", None), ("log_to_wandb", False)):
            object.__setattr__(self, name, value)

    def check_model(self) -> None:
        """Refuse layers that do not exist before anything is made."""
        if not self.layers:
            raise ConfigError(
                "no layers given; name at least one, e.g. --layers mh-attention swiglu"
            )
        for layer in self.layers:
            parse_layer(layer)

    @property
    def stack(self) -> str:
        """The model's name in results and reports."""
        return stack_name(self.layers)


TASK_FLAGS = (
    "vocab_size",
    "seq_len",
    "noise_vocab_size",
    "frac_noise",
    "num_tokens_to_copy",
    "k_motif_size",
    "v_motif_size",
    "num_train_examples",
)
"""Fields of `Experiment` that a task or its number of training rows takes when they are given."""


def task_options(experiment: Experiment) -> dict[str, Any]:
    """The options the user gave to the task; what is left out takes the task's baseline."""
    flags = {name: getattr(experiment, name) for name in TASK_FLAGS}
    given = {name: value for name, value in flags.items() if value is not None}
    if not experiment.multi_query:
        given["multi_query"] = False
    return given | assignments(experiment.options, f"options of task {experiment.task}")
