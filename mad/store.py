"""Data sets on disk: memory-mapped arrays beside a manifest that says what they are.

    <folder>/t-CR_vs-16_sl-128_…_s-12345_k-1f0c92ab/
        manifest.json                        full configuration, its SHA-256, SHA-256 of every array
        train/inputs-00000.npy               16 384 rows a shard, int16 or int32
        train/answers-00000.npy  train/dense-00000.npy   (dense only where it differs)
        val/…  test/…

The first part of the name is that of the published data sets. It leaves options out, so the first
eight digits of the configuration's key follow; the whole key is compared when a set is opened. A
set is made in a hidden folder and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from mad.registry import TASKS, build_task, task_spec
from mad.tasks.task import IGNORE, Rows, Split, Task, generate, generate_splits
from workbench.errors import ConfigError, DataError
from workbench.storage import atomic_write, fsync_directory, read_json, write_json

FORMAT = 1
"""Version of the layout of a data set."""

SHARD_ROWS = 16384
"""Rows of one file, a multiple of the generators' block."""

MANIFEST = "manifest.json"
LEAKAGE_LIMIT = 0.001
"""Share of test rows that may occur in training before a warning."""

# ---------------------------------------------------------------- names

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


# ---------------------------------------------------------------- what a data set is


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


# ---------------------------------------------------------------- writing


def digest_of(array: np.ndarray) -> str:
    """SHA-256 over the array's little-endian bytes in row order."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).hexdigest()


def _write_shard(folder: Path, split: Split, shard: int, rows: Rows, kind: str) -> dict[str, Any]:
    """Write one shard; what the manifest has to know of it."""
    parts = {"inputs": rows.inputs, "answers": rows.answers}
    if not np.array_equal(rows.answers, rows.dense):
        parts["dense"] = rows.dense
    files = {}
    for name, part in parts.items():
        array = part.astype(kind)
        path = folder / split / f"{name}-{shard:05d}.npy"
        atomic_write(path, lambda temporary, a=array: _save_array(temporary, a))
        files[path.relative_to(folder).as_posix()] = {
            "shape": list(array.shape),
            "dtype": kind,
            "sha256": digest_of(array),
        }
    return files


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as handle:
        np.lib.format.write_array(handle, array, allow_pickle=False)


def _make_part(
    folder: Path, data: DataSet, split: Split | None, start: int, rows: int, shard_rows: int
) -> dict[str, Any]:
    """Worker: one shard of a split, or a whole legacy set (its rows are one stream)."""
    kind = "<i2" if data.setting.vocab_size <= 2**15 else "<i4"
    if split is not None:
        part = generate(data.setting, rows, split, data.seed, start)
        return _write_shard(folder, split, start // shard_rows, part, kind)
    files = {}
    for name, whole in generate_splits(data.setting, data.sizes, data.seed, True).items():
        for first in range(0, len(whole.inputs), shard_rows):
            part = Rows(*(one[first : first + shard_rows] for one in whole))
            files |= _write_shard(folder, name, first // shard_rows, part, kind)
    return files


def _parts(data: DataSet, shard_rows: int) -> list[tuple[Split | None, int, int]]:
    """The pieces of work of a data set: split, first row, number of rows."""
    if data.legacy:
        return [(None, 0, 0)]
    return [
        (split, start, min(shard_rows, n - start))
        for split, n in data.sizes.items()
        for start in range(0, n, shard_rows)
    ]


def make(
    root: Path | str, sets: Iterable[DataSet], *, workers: int = 1, shard_rows: int = SHARD_ROWS
) -> Iterator[tuple[DataSet, dict[str, Any], bool]]:
    """Make what is missing; yields each set with its manifest and whether it was made just now.

    The bytes do not depend on the number of workers: a shard is a function of the configuration
    and its row numbers.
    """
    root = Path(root)
    if workers < 1:
        raise ConfigError(f"workers={workers}: at least one has to work")
    todo = []
    for data in dict.fromkeys(sets):
        if (root / data.name).exists():
            yield data, read_manifest(root, data), False
        else:
            todo.append(data)
    folders = {data: root / f".tmp-{os.getpid()}-{data.name}" for data in todo}
    try:
        if workers == 1:
            for data in todo:
                files: dict[str, Any] = {}
                for part in _parts(data, shard_rows):
                    files |= _make_part(folders[data], data, *part, shard_rows)
                yield data, _complete(root, folders[data], data, files), True
            return
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from _made_by(pool, root, folders, shard_rows)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def _made_by(
    pool: ProcessPoolExecutor, root: Path, folders: dict[DataSet, Path], shard_rows: int
) -> Iterator[tuple[DataSet, dict[str, Any], bool]]:
    """The sets in the order in which their last shard arrives."""
    owner = {}
    missing: dict[DataSet, int] = {}
    files: dict[DataSet, dict[str, Any]] = {}
    for data, folder in folders.items():
        parts = _parts(data, shard_rows)
        missing[data], files[data] = len(parts), {}
        for part in parts:
            owner[pool.submit(_make_part, folder, data, *part, shard_rows)] = data
    waiting = set(owner)
    try:
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                data = owner[future]
                files[data] |= future.result()
                missing[data] -= 1
                if not missing[data]:
                    yield data, _complete(root, folders[data], data, files[data]), True
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _complete(root: Path, folder: Path, data: DataSet, files: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, rename the folder to its name, give the manifest."""
    splits = {split: _mapped(folder, sorted(files), split) for split in data.sizes}
    manifest = {
        "key": data.key,
        "config": data.config,
        "files": dict(sorted(files.items())),
        "leakage": leakage(splits["train"].inputs, splits["test"].inputs),
        "answerable": {
            split: float(data.setting.answerable(rows).mean()) for split, rows in splits.items()
        },
        "expected_scored": data.setting.expected_scored(),
        "chance": data.setting.chance(),
        "ceiling": data.setting.ceiling(data.num_train_examples),
    }
    write_json(folder / MANIFEST, manifest)
    try:
        os.rename(folder, root / data.name)
    except OSError:
        if not (root / data.name / MANIFEST).is_file():
            raise
        return read_manifest(root, data)  # another process was faster; its bytes are the same
    fsync_directory(root)
    return manifest


# ---------------------------------------------------------------- reading


def read_manifest(root: Path | str, data: DataSet) -> dict[str, Any]:
    """The manifest of a data set, compared with what is asked for.

    Raises:
        DataError: no such set, a damaged manifest, or another configuration (names the fields).
    """
    folder = Path(root) / data.name
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data set; make it with `python -m mad.data make`")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"key", "config", "files"} <= set(manifest):
        raise DataError(f"{folder / MANIFEST}: not a manifest; remove the folder and make it again")
    if manifest["key"] != data.key or manifest["config"] != json.loads(json.dumps(data.config)):
        found, wanted = _flat(manifest["config"]), _flat(data.config)
        differ = [
            f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} asked for"
            for name in sorted(found | wanted)
            if found.get(name) != wanted.get(name)
        ]
        what = "; ".join(differ[:6]) or "its key is not that of its configuration"
        raise DataError(f"{folder} holds another data set ({what}); remove it or choose a folder")
    return manifest


def _flat(config: Any) -> dict[str, Any]:
    config = dict(config) if isinstance(config, dict) else {}
    options = config.pop("options", {})
    return config | {f"options.{name}": value for name, value in options.items()}


def load(root: Path | str, data: DataSet, split: Split) -> Rows:
    """The rows of a split, memory-mapped; several shards are copied together."""
    manifest = read_manifest(root, data)
    rows = _mapped(Path(root) / data.name, sorted(manifest["files"]), split)
    expected = (data.sizes[split], data.setting.length)
    for name, part in zip(Rows._fields, rows, strict=True):
        _check_array(part, f"{data.name}/{split}/{name}", expected, data.setting.vocab_size)
    return rows


def _mapped(folder: Path, files: list[str], split: Split) -> Rows:
    parts = {}
    for name in Rows._fields:
        shards = [_open_array(folder / file) for file in files if f"{split}/{name}-" in file]
        if shards:
            parts[name] = shards[0] if len(shards) == 1 else np.concatenate(shards)
    if "inputs" not in parts or "answers" not in parts:
        raise DataError(f"{folder}: split {split} is missing; remove the folder and make it again")
    return Rows(parts["inputs"], parts["answers"], parts.get("dense", parts["answers"]))


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; remove the data set and make it again") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: no array ({str(error)[:200]}); it is damaged") from None


def _check_array(
    array: np.ndarray, where: str, shape: tuple[int, int] | None, vocab_size: int
) -> None:
    """Shape, integer type and token range of an array."""
    if array.dtype.kind not in "iu":
        raise DataError(f"{where}: dtype {array.dtype}, expected integers")
    if shape is not None and array.shape != shape:
        raise DataError(f"{where}: shape {array.shape}, the settings ask for {shape}")
    if array.size:
        low = IGNORE if "inputs" not in where.rpartition("/")[2] else 0
        legal = (array >= 0) & (array < vocab_size)
        if low == IGNORE:
            legal |= array == IGNORE
        if not legal.all():
            row, column = np.argwhere(~legal)[0].tolist()
            raise DataError(
                f"{where}: {array[row, column]} at row {row}, position {column} is no token of a "
                f"vocabulary of {vocab_size}"
            )


def verify(root: Path | str, data: DataSet) -> dict[str, Any]:
    """Hash every array again and compare it with the manifest; gives the manifest.

    Raises:
        DataError: a file is missing, added, damaged or altered.
    """
    manifest = read_manifest(root, data)
    folder = Path(root) / data.name
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.npy")}
    for name in sorted(there ^ set(manifest["files"])):
        state = "is not in the manifest" if name in there else "is missing"
        raise DataError(f"{folder / name} {state}; remove the data set and make it again")
    for name, known in manifest["files"].items():
        array = _open_array(folder / name)
        found = {
            "shape": list(array.shape),
            "dtype": array.dtype.newbyteorder("<").str,
            "sha256": digest_of(array),
        }
        for what, value in found.items():
            if value != known[what]:
                raise DataError(
                    f"{folder / name}: {what} is {value}, the manifest says {known[what]}; the "
                    "file was altered, remove the data set and make it again"
                )
    for split in data.sizes:
        load(root, data, split)
    return manifest


# ---------------------------------------------------------------- leakage


def leakage(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Exact duplicates: share of test rows that occur in training, of training rows that repeat.

    >>> leakage(np.array([[1, 2], [3, 4], [1, 2]]), np.array([[3, 4], [9, 9]]))["test_in_train"]
    0.5
    """
    rows = np.ascontiguousarray(np.concatenate([train, test]))
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, group = np.unique(as_bytes, return_inverse=True)
    group = group.reshape(-1)
    in_train = np.bincount(group[: len(train)], minlength=int(group.max()) + 1)
    return {
        "test_in_train": float((in_train[group[len(train) :]] > 0).mean()),
        "train_repeated": 1 - float((in_train > 0).sum()) / len(train),
    }


def leakage_warning(data: DataSet, manifest: dict[str, Any]) -> str:
    """One sentence when more than 0.1 % of the test rows occur in training, else nothing.

    Tasks that repeat rows by design (memorization) are not warned about.
    """
    share = manifest["leakage"]["test_in_train"]
    if data.setting.repeats_rows or share <= LEAKAGE_LIMIT:
        return ""
    return f"{data.name}: {share:.2%} of the test rows occur in training"


# ---------------------------------------------------------------- the published data sets


def published_arrays(root: Path | str, data: DataSet) -> dict[str, Path]:
    """The four files of a published data set: `train|test/inputs|targets.npy`."""
    folder = Path(root) / data.published_name
    if not folder.is_dir():
        names = [p.name for p in Path(root).glob("t-*")] if Path(root).is_dir() else []
        raise DataError(
            f"{folder}: no such published data set; {root} holds {len(names)} of them"
            + (f", e.g. {sorted(names)[0]}" if names else "")
        )
    return {
        f"{split}/{name}": folder / split / f"{name}.npy"
        for split in ("train", "test")
        for name in ("inputs", "targets")
    }


def load_published(root: Path | str, data: DataSet, split: Split) -> Rows:
    """A split of a published data set, memory-mapped and checked for shape and vocabulary.

    The published files hold one array of targets: dense ones for training, answers for the test.
    So answers and dense targets are the same array here. There is no validation split.
    """
    if split == "val":
        raise DataError("the published data sets have no validation split; use train or test")
    paths = published_arrays(root, data)
    parts = []
    for name in ("inputs", "targets"):
        array = _open_array(paths[f"{split}/{name}"])
        expected = (data.sizes[split], data.setting.length)
        where = f"{data.published_name}/{split}/{name}"
        _check_array(array, where, expected, data.setting.vocab_size)
        parts.append(array)
    return Rows(parts[0], parts[1], parts[1])


def verify_published(
    root: Path | str, data: DataSet, hashes: dict[str, str] | None = None
) -> dict[str, str]:
    """Check both splits of a published data set; gives the SHA-256 of its arrays.

    `hashes` (`<folder>/<split>/<array>` → SHA-256) are those known from an earlier look.
    """
    found = {}
    for split in ("train", "test"):
        rows = load_published(root, data, split)
        for name, part in (("inputs", rows.inputs), ("targets", rows.answers)):
            where = f"{data.published_name}/{split}/{name}"
            found[where] = digest_of(part)
            known = (hashes or {}).get(where)
            if known is not None and known != found[where]:
                raise DataError(
                    f"{where}: SHA-256 {found[where]}, known is {known}; fetch the file again"
                )
    return found
