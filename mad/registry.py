"""The tasks and layers by name, and how a name on the command line becomes one.

A task: `TASKS["mine"] = TaskSpec("my_package.my_task:MyTask", short="Mine", …)`.
A layer: `LAYERS["mine"] = LayerSpec("my_package.mixer:Mine", …)`, or no entry at all and
`--layers my_package.mixer:Mine,num_heads=4`. Options stand behind the name, separated by commas.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import yaml

from mad.layers.options import (
    AttentionOptions,
    BasedOptions,
    DeltaNetOptions,
    GatedLinearAttentionOptions,
    HyenaExpertsOptions,
    HyenaOptions,
    LinearAttentionOptions,
    Mamba2Options,
    MambaOptions,
    MLPOptions,
    MLSTMOptions,
    MoEMLPOptions,
    MultiHeadHyenaOptions,
    RetNetOptions,
    RWKV5TimeMixerOptions,
    RWKV6TimeMixerOptions,
    RWKV7Options,
    RWKVChannelMixerOptions,
    SwiGLUOptions,
)
from workbench.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import nn

    from mad.tasks.task import Task


@dataclass(frozen=True)
class TaskSpec:
    """Where a task lives, and the settings of the published benchmark."""

    build: str
    """`module:Class` of the task, a subclass of `mad.tasks.task.Task`."""
    short: str
    """Shorthand in directory and column names."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """Options and example counts that differ from the class's defaults."""
    changes: dict[str, tuple] = field(default_factory=dict)
    """Values each option takes, one at a time, beside the baseline."""
    benchmark: bool = True
    """Does the published benchmark have this task?"""

    def settings(self) -> list[dict[str, Any]]:
        """The baseline, then every change of it alone: options and `num_train_examples`."""
        varied = [self.baseline | {key: one} for key, all in self.changes.items() for one in all]
        return [dict(self.baseline), *varied]


@dataclass(frozen=True)
class LayerSpec:
    """Where a layer lives and with which options it is built."""

    build: str
    """`module:Class`, built as `Class(width, [max_length], **options)`."""
    short: str
    """Shorthand in model names."""
    kind: Literal["sequence", "channel"]
    """Does it mix positions or only channels?"""
    options: Any
    """Instance of an options dataclass: names, types and default values."""


_FEWER_ROWS = {"num_train_examples": (6400, 3200, 1600, 800)}
_RECALL_SIZES = {"seq_len": (256, 512, 1024), **_FEWER_ROWS}

TASKS: dict[str, TaskSpec] = {
    "in-context-recall": TaskSpec(
        "mad.tasks.recall:InContextRecall",
        short="CR",
        baseline={"num_train_examples": 12800},
        changes={"vocab_size": (32, 64, 128), **_RECALL_SIZES},
    ),
    "fuzzy-in-context-recall": TaskSpec(
        "mad.tasks.fuzzy:FuzzyInContextRecall",
        short="FR",
        baseline={"num_train_examples": 12800},
        changes={"vocab_size": (32, 64, 128), **_RECALL_SIZES},
    ),
    "noisy-in-context-recall": TaskSpec(
        "mad.tasks.recall:NoisyInContextRecall",
        short="NR",
        baseline={"num_train_examples": 12800},
        changes={"vocab_size": (48, 80, 144), "frac_noise": (0.4, 0.6, 0.8), **_RECALL_SIZES},
    ),
    "selective-copying": TaskSpec(
        "mad.tasks.copying:SelectiveCopying",
        short="SC",
        baseline={"num_train_examples": 12800},
        changes={
            "vocab_size": (32, 64, 128),
            "seq_len": (512, 1024),
            "num_tokens_to_copy": (32, 64, 96),
            **_FEWER_ROWS,
        },
    ),
    "compression": TaskSpec(
        "mad.tasks.compression:Compression",
        short="C",
        baseline={"num_train_examples": 12800},
        changes={"vocab_size": (32, 64, 128), "seq_len": (64, 128, 256), **_FEWER_ROWS},
    ),
    "memorization": TaskSpec(
        "mad.tasks.memorization:Memorization",
        short="M",
        baseline={"num_train_examples": 256},
        changes={"vocab_size": (512, 1024, 2048, 4096, 8192)},
    ),
    "copying": TaskSpec("mad.tasks.copying:Copying", short="Cp", benchmark=False),
    "mqar": TaskSpec("mad.tasks.mqar:MultiQueryRecall", short="MQ", benchmark=False),
    "induction-heads": TaskSpec("mad.tasks.induction:InductionHeads", short="IH", benchmark=False),
    "sorting": TaskSpec("mad.tasks.sorting:Sorting", short="So", benchmark=False),
    "parity": TaskSpec("mad.tasks.tracking:Parity", short="Pa", benchmark=False),
    "modular-addition": TaskSpec("mad.tasks.tracking:ModularAddition", short="MA", benchmark=False),
    "state-tracking": TaskSpec("mad.tasks.tracking:StateTracking", short="ST", benchmark=False),
    "dyck": TaskSpec("mad.tasks.dyck:Dyck", short="Dy", benchmark=False),
}

LAYERS: dict[str, LayerSpec] = {  # order = order in reports
    "attention": LayerSpec("mad.layers.attention:Attention", "A", "sequence", AttentionOptions()),
    "mh-attention": LayerSpec(
        "mad.layers.attention:Attention", "mA", "sequence", AttentionOptions(num_heads=16)
    ),
    "sliding-attention": LayerSpec(
        "mad.layers.attention:Attention", "As", "sequence", AttentionOptions(window=32)
    ),
    "mh-sliding-attention": LayerSpec(
        "mad.layers.attention:Attention",
        "mAs",
        "sequence",
        AttentionOptions(num_heads=16, window=32),
    ),
    "canon-attention": LayerSpec(
        "mad.layers.attention:Attention", "Ac", "sequence", AttentionOptions(canon="a")
    ),
    "mh-canon-attention": LayerSpec(
        "mad.layers.attention:Attention",
        "mAc",
        "sequence",
        AttentionOptions(num_heads=16, canon="a"),
    ),
    "linear-attention": LayerSpec(
        "mad.layers.linear_attention:LinearAttention", "Al", "sequence", LinearAttentionOptions()
    ),
    "mh-linear-attention": LayerSpec(
        "mad.layers.linear_attention:LinearAttention",
        "mAl",
        "sequence",
        LinearAttentionOptions(num_heads=16),
    ),
    "based": LayerSpec("mad.layers.based:Based", "Ba", "sequence", BasedOptions()),
    "hyena": LayerSpec("mad.layers.hyena:Hyena", "H", "sequence", HyenaOptions()),
    "mh-hyena": LayerSpec(
        "mad.layers.hyena:MultiHeadHyena", "mH", "sequence", MultiHeadHyenaOptions()
    ),
    "gated-linear-attention": LayerSpec(
        "mad.layers.gla:GatedLinearAttention", "Ag", "sequence", GatedLinearAttentionOptions()
    ),
    "mh-gated-linear-attention": LayerSpec(
        "mad.layers.gla:GatedLinearAttention",
        "mAg",
        "sequence",
        GatedLinearAttentionOptions(num_heads=8),
    ),
    "mamba": LayerSpec("mad.layers.mamba:Mamba", "Mb", "sequence", MambaOptions()),
    "mamba2": LayerSpec("mad.layers.mamba2:Mamba2", "Mb2", "sequence", Mamba2Options()),
    "retnet": LayerSpec("mad.layers.retnet:RetNet", "Rn", "sequence", RetNetOptions()),
    "mlstm": LayerSpec("mad.layers.mlstm:MLSTM", "mL", "sequence", MLSTMOptions()),
    "rwkv5-time-mixer": LayerSpec(
        "mad.layers.rwkv:RWKV5TimeMixer", "R5", "sequence", RWKV5TimeMixerOptions()
    ),
    "rwkv6-time-mixer": LayerSpec(
        "mad.layers.rwkv:RWKV6TimeMixer", "R6", "sequence", RWKV6TimeMixerOptions()
    ),
    "deltanet": LayerSpec("mad.layers.delta:DeltaNet", "D", "sequence", DeltaNetOptions()),
    "gated-deltanet": LayerSpec(
        "mad.layers.delta:GatedDeltaNet", "gD", "sequence", DeltaNetOptions()
    ),
    "hyena-experts": LayerSpec(
        "mad.layers.experts:HyenaExperts", "He", "sequence", HyenaExpertsOptions()
    ),
    "rwkv7": LayerSpec("mad.layers.rwkv7:RWKV7TimeMixer", "R7", "sequence", RWKV7Options()),
    "mlp": LayerSpec("mad.layers.channel:MLP", "M", "channel", MLPOptions()),
    "swiglu": LayerSpec("mad.layers.channel:SwiGLU", "Sg", "channel", SwiGLUOptions()),
    "rwkv5-channel-mixer": LayerSpec(
        "mad.layers.rwkv:RWKV5ChannelMixer", "R5c", "channel", RWKVChannelMixerOptions()
    ),
    "rwkv6-channel-mixer": LayerSpec(
        "mad.layers.rwkv:RWKV6ChannelMixer", "R6c", "channel", RWKVChannelMixerOptions()
    ),
    "moe-mlp": LayerSpec("mad.layers.experts:MoEMLP", "MoE", "channel", MoEMLPOptions()),
}


def load_object(path: str) -> Any:
    """The object named by `module:Name`."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path!r} cannot be loaded ({error}); expected module:Class, importable from here"
        ) from error


def task_spec(name: str) -> TaskSpec:
    """The registered task, or one made from `module:Class`."""
    if name in TASKS:
        return TASKS[name]
    if ":" in name:
        return TaskSpec(build=name, short=name.rpartition(":")[2])
    raise unknown_name("task", name, TASKS)


def backbone_of(task: Task) -> Literal["language-model", "autoencoder"]:
    """The backbone that a task is made for, its attribute `backbone`; a language model if none."""
    return getattr(task, "backbone", "language-model")


def build_task(name: str, given: dict[str, Any]) -> tuple[Task, int]:
    """The task and its number of training rows; `given` options win over the task's baseline.

    An option of value None counts as not given. An option the task does not have is an error.
    """
    spec = task_spec(name)
    make = load_object(spec.build)
    options = spec.baseline | {key: value for key, value in given.items() if value is not None}
    n_train = options.pop("num_train_examples", 12800)
    known = {f.name for f in fields(make)}
    for key in options:
        if key not in known:
            flag = "--" + key.replace("_", "-")
            names = ", ".join(sorted(known))
            raise ConfigError(f"task {name} has no option {flag}; its options: {names}")
    return make(**options), n_train


def assignments(texts: Iterable[str], where: str) -> dict[str, Any]:
    """What `option=value` texts say; values are read as YAML scalars (`none` is null).

    >>> assignments(["num_heads=4", "window=none"], "layer")
    {'num_heads': 4, 'window': None}
    """
    given: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{where}: {text!r} is not of the form option=value")
        try:
            given[key.strip()] = None if value == "none" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{where}: {text!r} has no readable value") from error
    return given


@dataclass(frozen=True)
class LayerChoice:
    """A layer as the user wrote it: name or `module:Class`, with options."""

    text: str
    """What was written, e.g. `mh-attention,num_heads=4`."""
    short: str
    """Shorthand with the options that were set, e.g. `mA(num_heads=4)`."""
    build: str
    """`module:Class`."""
    options: dict[str, Any]
    """All options, defaults included."""

    def make(
        self, width: int, max_length: int, *, layer_id: int = 0, n_layers: int = 1
    ) -> nn.Module:
        """The layer, freshly initialised from torch's current random state.

        `layer_id` (its place in the stack, from 0) and `n_layers` reach the layers that ask for
        them by name: some start differently at the bottom and at the top.
        """
        layer = load_object(self.build)
        parameters = inspect.signature(layer).parameters
        place = {"layer_id": layer_id, "n_layers": n_layers}
        known = {key: value for key, value in place.items() if key in parameters}
        arguments = known | self.options
        if "max_length" in parameters:
            return layer(width, max_length, **arguments)
        return layer(width, **arguments)


def parse_layer(text: str) -> LayerChoice:
    """What `name,option=value,…` means; values are read as YAML scalars (`none` is null).

    >>> parse_layer("mh-attention,num_heads=4").short
    'mA(num_heads=4)'
    """
    name, *parts = (part.strip() for part in text.split(","))
    given = assignments(parts, f"layer {text!r}")
    if name in LAYERS:
        spec = LAYERS[name]
        defaults, build, short = asdict(spec.options), spec.build, spec.short
    elif ":" in name:
        build, short = name, name.rpartition(":")[2]
        parameters = inspect.signature(load_object(build)).parameters
        set_by_model = ("width", "max_length", "layer_id", "n_layers")
        defaults = {key: None for key in parameters if key not in set_by_model}
    else:
        raise unknown_name("layer", name, LAYERS)
    for key, value in given.items():
        if key not in defaults:
            raise unknown_name(f"option of layer {name}", key, defaults)
        default = defaults[key]
        if value is None and type(default) is str:  # a choice may be called none
            given[key] = value = "none"
        if type(default) is float and type(value) in (int, str):  # 1e-5 is text to YAML
            try:
                given[key] = value = float(value)
            except ValueError:
                raise ConfigError(f"layer {text!r}: {key}={value!r} should be a number") from None
        if type(default) in (int, str, bool) and type(value) is not type(default):
            raise ConfigError(
                f"layer {text!r}: {key}={value!r} should be of type {type(default).__name__}"
            )
    settings = ",".join(f"{key}={value}" for key, value in given.items())
    shown = f"{short}({settings})" if settings else short
    return LayerChoice(text, shown, build, (given if ":" in name else defaults | given))


def stack_name(layers: tuple[str, ...]) -> str:
    """The model's name: layer shorthands joined by dashes, a repeated pattern written once.

    >>> stack_name(("mh-attention", "swiglu", "mh-attention", "swiglu"))
    'mA-Sg x2'
    """
    shorts = [parse_layer(layer).short for layer in layers]
    for period in range(1, len(shorts)):
        if len(shorts) % period == 0 and shorts == shorts[:period] * (len(shorts) // period):
            return f"{'-'.join(shorts[:period])} x{len(shorts) // period}"
    return "-".join(shorts)
