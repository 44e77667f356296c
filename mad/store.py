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
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mad.dataset import DataSet
from mad.tasks.task import IGNORE, Rows, Split, generate, generate_splits
from workbench.errors import ConfigError, DataError
from workbench.storage import atomic_write, fsync_directory, read_json, write_json

SHARD_ROWS = 16384
"""Rows of one file, a multiple of the generators' block."""

MANIFEST = "manifest.json"
LEAKAGE_LIMIT = 0.001
"""Share of test rows that may occur in training before a warning."""


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
        check_array(part, f"{data.name}/{split}/{name}", expected, data.setting.vocab_size)
    return rows


def _mapped(folder: Path, files: list[str], split: Split) -> Rows:
    parts = {}
    for name in Rows._fields:
        shards = [open_array(folder / file) for file in files if f"{split}/{name}-" in file]
        if shards:
            parts[name] = shards[0] if len(shards) == 1 else np.concatenate(shards)
    if "inputs" not in parts or "answers" not in parts:
        raise DataError(f"{folder}: split {split} is missing; remove the folder and make it again")
    return Rows(parts["inputs"], parts["answers"], parts.get("dense", parts["answers"]))


def open_array(path: Path) -> np.ndarray:
    """An array of a file, memory-mapped; DataError if there is none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; remove the data set and make it again") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: no array ({str(error)[:200]}); it is damaged") from None


def check_array(
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
        array = open_array(folder / name)
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
