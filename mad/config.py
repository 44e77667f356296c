"""The published configuration objects: what is trained on what, and of which layers a model is.

    config = MADConfig(task="memorization", vocab_size=512, epochs=50)
    model = MADModelConfig(layers=("mh-attention", "swiglu"), vocab_size=512)
    results = mad.train(model.build_model_from_registry(), config, "logs")

Field names, order and defaults are the published ones, with three exceptions: `accelerator` and
`precision` are `auto` (which is cuda and bf16 where there is a GPU), and the norm is RMSNorm in
every script, where the published ones disagree. What the published classes pass over in silence (a
misspelt name above all) is an error here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from mad.registry import build_task, load_object, parse_layer, task_spec
from mad.train import DTYPE_OF, TASK_FLAGS, Experiment, Precision
from workbench.errors import ConfigError, require_least, unknown_name
from workbench.record import RunOptions

if TYPE_CHECKING:
    from mad.model import Stack
    from mad.tasks.task import Task


class Updatable:
    """Setting several fields by name, unknown names being errors."""

    def update_from_kwargs(self, kwargs: dict[str, Any]) -> Self:
        """Set the fields named in `kwargs`; returns the object itself.

        Raises:
            ConfigError: a name is no field, or the values do not go together.
        """
        known = [f.name for f in fields(self)]
        for name in kwargs:
            if name not in known:
                raise unknown_name(f"field of {type(self).__name__}", name, known)
        checked = replace(self, **kwargs)  # type: ignore[type-var]
        for name in known:
            setattr(self, name, getattr(checked, name))
        return self

    def __post_init__(self) -> None:
        """Check the values against one another."""


@dataclass
class MADConfig(Updatable):
    """One training run: task, data, training, hardware."""

    task: str = "in-context-recall"
    """Task name, or module:Class."""
    vocab_size: int = 16
    """Number of tokens, special ones included."""
    seq_len: int = 128
    """Sequence length."""
    frac_noise: float = 0.0
    """Probability of noise in a slot."""
    noise_vocab_size: int = 0
    """Number of noise tokens."""
    num_tokens_to_copy: int = 0
    """Copying: tokens to remember."""
    k_motif_size: int = 1
    """Fuzzy recall: largest number of tokens in a key."""
    v_motif_size: int = 1
    """Fuzzy recall: largest number of tokens in a value."""
    multi_query: bool = True
    """Score every repeated key, not only the last."""
    num_train_examples: int = 12800
    """Training rows."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    data_path: str = "./data"
    """Folder for rows on disk; training draws its rows itself and needs none."""
    num_data_workers: int = 0
    """Kept for compatibility: rows are drawn in the process itself, their bytes never depend on
    this."""
    persistent_data_workers: bool = True
    """Kept for compatibility, as `num_data_workers`."""
    batch_size: int = 128
    """Rows per step."""
    epochs: int = 200
    """Passes over the training rows."""
    lr: float = 5e-4
    """Largest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser."""
    scheduler: Literal["cosine", "plateau", "none"] = "cosine"
    """Schedule; `cosine` is the protocol's own form of it."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    early_stop: bool = False
    """Stop after `stop_patience` validations without a better accuracy."""
    stop_patience: int = 20
    """See `early_stop`."""
    plateau_patience: int = 5
    """Scheduler plateau: validations to wait."""
    plateau_factor: float = 0.9
    """Scheduler plateau: factor of the learning rate."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Device; `auto` is CUDA where there is one, `cuda` without one is an error."""
    devices: int = 1
    """Kept for compatibility: one model is trained on one device."""
    save_checkpoints: bool = True
    """Save on the way and keep the best and the last weights."""
    precision: Precision = "auto"
    """Number format of the matrix products (weights stay float32); `auto` is bf16 on CUDA."""
    seed: int = 12345
    """Seed of all named streams."""
    target_ignore_index: int = -100
    """Target of positions that are not scored."""

    def __post_init__(self) -> None:
        if self.devices != 1:
            raise ConfigError(
                f"devices={self.devices}: one model is trained on one device; runs side by side "
                "are the business of mad.benchmark (--executor, --shard)"
            )
        if self.num_data_workers < 0:
            raise ConfigError(f"num_data_workers={self.num_data_workers} is negative")
        self.experiment()

    def task_fields(self) -> dict[str, Any]:
        """The options of the task: those fields that it has, and those it lacks but were changed.

        A field at its default is left out where the task has no such option; the task then refuses
        the others by name.
        """
        make = load_object(task_spec(self.task).build)
        known = {f.name for f in fields(make)} | {"num_train_examples"}
        default = {f.name: f.default for f in fields(type(self))}
        return {
            name: getattr(self, name)
            for name in (*TASK_FLAGS, "multi_query")
            if name in known or getattr(self, name) != default[name]
        }

    def build_task(self) -> Task:
        """The task as an object."""
        return build_task(self.task, self.task_fields())[0]

    def experiment(self, kind: type[Experiment] = Experiment, **more: Any) -> Experiment:
        """The settings of `mad.train` that say the same; `more` are its other fields."""
        given = self.task_fields()
        multi_query = given.pop("multi_query", True)
        same = (
            "task",
            "num_test_examples",
            "batch_size",
            "epochs",
            "lr",
            "weight_decay",
            "optimizer",
            "min_lr",
            "early_stop",
            "stop_patience",
            "plateau_patience",
            "plateau_factor",
            "save_checkpoints",
            "seed",
            "target_ignore_index",
        )
        settings = {name: getattr(self, name) for name in same} | given
        settings["multi_query"] = multi_query
        settings["scheduler"] = None if self.scheduler == "cosine" else self.scheduler
        settings["run"] = RunOptions(
            device={"gpu": "cuda"}.get(self.accelerator, self.accelerator),
            dtype=DTYPE_OF[self.precision.partition("-")[0]],
        )
        return kind(**settings | more)

    @property
    def dataset_path(self) -> Path:
        """Folder of the rows under `data_path`, by the published rule for its name."""
        values = (
            ("t", task_spec(self.task).short),
            ("vs", self.vocab_size),
            ("sl", self.seq_len),
            ("ntr", self.num_train_examples),
            ("nte", self.num_test_examples),
            ("km", self.k_motif_size),
            ("vm", self.v_motif_size),
            ("mq", int(self.multi_query)),
            ("fn", self.frac_noise),
            ("nvs", self.noise_vocab_size),
            ("ntc", self.num_tokens_to_copy),
            ("s", self.seed),
        )
        name = "_".join(f"{key}-{value}" for key, value in values)
        return Path(self.data_path) / name.replace(".", "#")

    @property
    def train_dataset_path(self) -> Path:
        """Training rows under `dataset_path`."""
        return self.dataset_path / "train"

    @property
    def test_dataset_path(self) -> Path:
        """Test rows under `dataset_path`."""
        return self.dataset_path / "test"


@dataclass
class MADModelConfig(Updatable):
    """A model of named layers."""

    layers: tuple[str, ...] = ("mh-attention", "swiglu", "mh-attention", "swiglu")
    """Layers in order, with options if any (`mh-attention,num_heads=4`)."""
    backbone: Literal["language-model", "autoencoder"] = "language-model"
    """Language model, or auto-encoder for compression."""
    dim: int = 128
    """Width."""
    max_length: int = 1280
    """Longest sequence that filters and position tables are made for."""
    vocab_size: int = 16
    """Number of tokens."""
    norm: Callable[[int], Any] | None = None
    """Makes a normalisation of a width (`torch.nn.LayerNorm`); none means RMSNorm, eps 1e-5."""
    position_embeds: Callable[[int, int], Any] | None = None
    """Makes a table (max_length, dim), or an Embedding, that is added to the embeddings."""
    embed_drop_rate: float = 0.0
    """Dropout after the embeddings."""
    seed: int = 12345
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        self.layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        for layer in self.layers:
            parse_layer(layer)
        require_least(self, 1, "dim", "max_length", "vocab_size")

    def build_model_from_registry(self) -> Stack:
        """The model, each layer with its registered defaults, initialised from `seed` alone."""
        from mad.model import build_model

        norm = {} if self.norm is None else {"norm": self.norm}
        return build_model(
            self.layers,
            vocab_size=self.vocab_size,
            width=self.dim,
            max_length=self.max_length,
            seed=self.seed,
            backbone=self.backbone,
            position_embeds=self.position_embeds,
            embed_drop_rate=self.embed_drop_rate,
            **norm,
        )
