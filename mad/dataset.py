"""What a data set is: a task setting, the sizes of its splits and a seed; and what it is called."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mad.registry import TASKS, build_task, task_spec
from mad.tasks.task import Split, Task
from workbench.errors import ConfigError, DataError

FORMAT = 1
"""Version of the layout of a data set."""

_FIELDS: dict[str, tuple[str, type]] = {
    "vocab_size": ("vs", int),
    "seq_len": ("sl", int),
    "num_train_examples": ("ntr", int),
    "num_test_examples": ("nte", int),
    "k_motif_size": ("km", int),
    "v_motif_size": ("vm", int),
    "multi_query": ("mq", bool),
    "frac_noise": ("fn", float),
    "noise_vocab_size": ("nvs", int),
    "num_tokens_to_copy": ("ntc", int),
    "seed": ("s", int),
}
_ABSENT = {
    "k_motif_size": 1,
    "v_motif_size": 1,
    "multi_query": True,
    "frac_noise": 0.0,
    "noise_vocab_size": 0,
    "num_tokens_to_copy": 0,
}


def make_name(fields: dict[str, Any]) -> str:
    """The published name of a data set; an option the task has not takes the published default.

    True is `mq-1` and False `mq-0` (the published code writes 1 for both). A `key` is put behind.

    >>> make_name({"task": "in-context-recall", "vocab_size": 16, "seq_len": 128, "seed": 12345,
    ...            "num_train_examples": 12800, "num_test_examples": 1280})
    't-CR_vs-16_sl-128_ntr-12800_nte-1280_km-1_vm-1_mq-1_fn-0#0_nvs-0_ntc-0_s-12345'
    """
    task = fields["task"]
    short = TASKS[task].short if task in TASKS else quote(task, safe="")
    parts = [f"t-{short}"]
    for name, (letters, kind) in _FIELDS.items():
        value = fields.get(name, _ABSENT.get(name))
        if value is None:
            raise ConfigError(f"a data set of {task} has no name without {name}")
        text = str(int(value)) if kind is not float else str(float(value)).replace(".", "#")
        parts.append(f"{letters}-{text}")
    if "key" in fields:
        parts.append(f"k-{fields['key']}")
    return "_".join(parts)


def parse(path: Path | str) -> dict[str, Any]:
    """The fields of a data set's folder name: the inverse of `make_name`.

    >>> parse("data/t-SC_vs-16_sl-256_ntr-9_nte-4_km-1_vm-1_mq-0_fn-0#2_nvs-0_ntc-16_s-1")["task"]
    'selective-copying'
    """
    name = Path(path).name
    pattern = "_".join(f"{letters}-([^_]+)" for letters, _ in _FIELDS.values())
    found = re.fullmatch(rf"t-(.+?)_{pattern}(?:_k-([0-9a-f]+))?", name)
    if not found:
        raise DataError(
            f"{name[:200]!r} is no name of a data set; expected e.g. t-CR_vs-16_sl-128_ntr-12800_"
            "nte-1280_km-1_vm-1_mq-1_fn-0#0_nvs-0_ntc-0_s-12345"
        )
    short, *texts, key = found.groups()
    shorthands = {spec.short: task for task, spec in TASKS.items()}
    fields: dict[str, Any] = {"task": shorthands.get(short) or unquote(short)}
    for (field, (_, kind)), text in zip(_FIELDS.items(), texts, strict=True):
        try:
            if kind is bool and text not in ("0", "1"):
                raise ValueError
            fields[field] = kind(text.replace("#", ".")) if kind is float else kind(int(text))
        except ValueError:
            raise DataError(f"{name[:200]!r}: {field} is {text!r}, no {kind.__name__}") from None
    return fields | ({"key": key} if key else {})


PUBLISHED_SEED = 12345
"""Seed in the names of the published data sets."""


@dataclass(frozen=True)
class DataSet:
    """A task setting with the sizes of its splits and the seed."""

    task: str
    """Task name, or module:Class."""
    setting: Task
    """The task with its options."""
    num_train_examples: int
    """Rows of the training split."""
    num_test_examples: int = 1280
    """Rows of the test split, and of the validation split."""
    seed: int = 12345
    """Seed of the generators."""
    legacy: bool = False
    """Published order of calls, row by row from one stream."""

    @property
    def config(self) -> dict[str, Any]:
        """Everything the bytes depend on."""
        return {
            "task": self.task,
            "task_class": type(self.setting).__qualname__,
            "task_version": self.setting.version,
            "options": asdict(self.setting),
            "num_train_examples": self.num_train_examples,
            "num_test_examples": self.num_test_examples,
            "seed": self.seed,
            "legacy": self.legacy,
            "format": FORMAT,
        }

    @property
    def key(self) -> str:
        """SHA-256 of the canonical configuration."""
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    @property
    def fields(self) -> dict[str, Any]:
        """What the published name holds."""
        own = {name: value for name, value in asdict(self.setting).items() if name in _FIELDS}
        sizes = (self.num_train_examples, self.num_test_examples)
        named = dict(zip(("num_train_examples", "num_test_examples"), sizes, strict=True))
        return {"task": self.task, "seed": self.seed, **_ABSENT, **own, **named}

    @property
    def published_name(self) -> str:
        """Folder name of the same set in the published data."""
        return make_name(self.fields)

    @property
    def name(self) -> str:
        """Folder name: the published one and the first digits of the key."""
        return make_name(self.fields | {"key": self.key[:8]})

    @property
    def sizes(self) -> dict[Split, int]:
        """Rows of each split."""
        test = self.num_test_examples
        return {"train": self.num_train_examples, "val": test, "test": test}


def data_set(
    task: str,
    options: dict[str, Any],
    *,
    num_test_examples: int = 1280,
    seed: int = 12345,
    legacy: bool = False,
) -> DataSet:
    """The data set of a task with the given options over its baseline (see `build_task`)."""
    setting, n_train = build_task(task, options)
    for name, n in (("num_train_examples", n_train), ("num_test_examples", num_test_examples)):
        if n < 1:
            raise ConfigError(f"{name}={n}: a data set needs at least one row in every split")
    return DataSet(task, setting, n_train, num_test_examples, seed, legacy)


def published_sets(tasks: Iterable[str] = ()) -> list[DataSet]:
    """The data sets of the published grid (66 for the six tasks), or those of the named tasks."""
    names = list(tasks) or [name for name, spec in TASKS.items() if spec.benchmark]
    return [data_set(name, one) for name in names for one in task_spec(name).settings()]
