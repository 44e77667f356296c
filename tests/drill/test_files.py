"""Hostile and damaged tensor files, at every reader of tensors.

Rows 12 (files other than checkpoints) and 23 of the fault table.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from early_exit.adapters.base import adapt
from early_exit.model import EarlyExitModel, load_exits
from sdm import artifact
from sdm.data import read_cache, write_cache
from sdm.estimator import SDMClassifier
from workbench import models, storage
from workbench.errors import USER_ERRORS
from workbench.models import check_folder, load_model
from workbench.tiny import byte_tokenizer, tiny_model


def file(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16), **more: Any) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "eight bytes": bytes(8),
    "no header": file(b""),
    "half a header": file(b'{"a": {"dty'),
    "header of 2^60": (2**60).to_bytes(8, "little") + b"{}",
    "header of 2^64 - 1": b"\xff" * 8 + b"{}",
    "header one byte too long": (3).to_bytes(8, "little") + b"{}",
    "a list": file(b"[]"),
    "a number": file(b"1"),
    "not UTF-8": file(b'{"\xff": 1}'),
    "a bare entry": file({"a": 1}),
    "no dtype": file({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "no shape": file({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "no offsets": file({"a": {"dtype": "F32", "shape": [4]}}),
    "unknown dtype": file({"a": entry("F99")}),
    "dtype a number": file({"a": entry(32)}),
    "negative shape": file({"a": entry(shape=(-4,))}),
    "shape of fractions": file({"a": entry(shape=(4.5,))}),
    "shape overflows": file({"a": entry(shape=(2**40, 2**40))}),
    "shape beyond the data": file({"a": entry(shape=(5,))}),
    "offsets reversed": file({"a": entry(offsets=(16, 0))}),
    "offsets negative": file({"a": entry(offsets=(-16, 0))}),
    "offsets beyond the file": file({"a": entry(shape=(400,), offsets=(0, 1600))}),
    "two share bytes": file({"a": entry(), "b": entry()}),
    "an empty one inside another": file({"a": entry(), "b": entry(shape=(0,), offsets=(3, 3))}),
    "a hole": file({"a": entry(shape=(2,), offsets=(0, 8))}),
    "surplus data": file({"a": entry()}, bytes(20)),
    "metadata of numbers": file({"__metadata__": {"a": 1}, "a": entry()}),
    "one key twice": file(
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}'
    ),
    "nested without end": file(b'{"a": ' + b"[" * 100_000),
    "300 000 tensors": file({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(300_000)}),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins",
    "names that climb": file({"../../x": entry()}),
    "not a number": file({"a": entry()}, b"\xff" * 16),
    "other names": file({"a": entry()}),
}
LOADABLE = {"names that climb", "not a number", "other names"}  # refused by those who know better


class Readers:
    """One good folder for each reader; `spoil` puts other bytes in the place of its tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        model, tokenizer = tiny_model("mistral", seed=0), byte_tokenizer()
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        self.adapter = adapt(model)
        EarlyExitModel.from_backbone(model, tokenizer, exits=(1,)).save_exits(folder / "exits")
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 3)))
        y = np.arange(40) % 2
        x[:, 0] += torch.from_numpy(3.0 * y)
        rows = [{"id": str(i), "label": int(c), "document": "x"} for i, c in enumerate(y)]
        write_cache(folder / "cache", x.float(), None, rows)
        classifier = SDMClassifier(n_iterations=1, epochs=1, exemplar_dim=4).fit(x, y)
        artifact.save(classifier, folder / "classifier")
        storage.save_tree(folder / "checkpoint", {"a": torch.zeros(4)})
        storage.write_safetensors(folder / "plain.safetensors", {"a": torch.zeros(4)})

    def all(self) -> dict[str, tuple[str, Callable[[Path], Any]]]:
        return {
            "plain": ("plain.safetensors", lambda p: storage.read_safetensors(p)),
            "model": ("model/model.safetensors", lambda p: load_model(p.parent)),
            "exits": ("exits/exits.safetensors", lambda p: load_exits(p.parent, self.adapter)),
            "cache": ("cache/features.safetensors", lambda p: read_cache(p.parent)),
            "classifier": ("classifier/weights.safetensors", lambda p: artifact.load(
                SDMClassifier(), p.parent)),
            "checkpoint": ("checkpoint/tensors.safetensors", lambda p: storage.load_tree(p.parent)),
        }  # fmt: skip


NAMES = ["plain", "model", "exits", "cache", "classifier", "checkpoint"]


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> Readers:
    made = Readers(tmp_path_factory.mktemp("good"))
    assert list(made.all()) == NAMES
    for place, read in made.all().values():
        read(made.folder / place)
    return made


def spoilt(readers: Readers, name: str, target: Path) -> tuple[Path, Callable[[Path], Any]]:
    place, read = readers.all()[name]
    source = readers.folder / place
    shutil.rmtree(target, ignore_errors=True)
    if source.parent == readers.folder:
        target.mkdir()
        shutil.copy(source, target)
    else:
        shutil.copytree(source.parent, target)
    return target / source.name, read


@pytest.mark.parametrize("reader", NAMES)
def test_no_hostile_file_is_taken_for_tensors(readers, reader, tmp_path):
    assert len(HOSTILE) >= 30
    for what, content in HOSTILE.items():
        if what in LOADABLE and reader == "plain":
            continue
        path, read = spoilt(readers, reader, tmp_path / "x")
        path.write_bytes(content)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.process_time()
        with pytest.raises(USER_ERRORS) as caught:
            read(path)
        assert len(str(caught.value)) <= 1000, what
        assert path.name in str(caught.value) or path.parent.name in str(caught.value), what
        assert time.process_time() - begin <= 2, what
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown <= (len(content) >> 10) + 200 * 1024, what


@pytest.mark.parametrize("reader", ["exits", "cache", "classifier", "checkpoint"])
def test_a_flipped_bit_in_a_stored_file_is_detected(readers, reader, tmp_path):
    """What this package wrote; models of others carry no hash to compare with."""
    path, read = spoilt(readers, reader, tmp_path / "x")
    good = path.read_bytes()
    for position in np.random.default_rng(1).integers(0, len(good) * 8, 40):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bad)
        with pytest.raises(USER_ERRORS):
            read(path)
    path.write_bytes(good)
    read(path)


@pytest.mark.parametrize("name", models.built_in_names())
def test_a_flipped_bit_in_shipped_weights_is_detected(name):
    """Every shipped file with a hash is the one that was published, and one bit would show."""
    folder = models.WEIGHTS / name
    entry = storage.read_json(models.WEIGHTS.parent / "backbones.json")[name]
    for part, key in (("model.safetensors", "sha256"), ("tokenizer.json", "tokenizer_sha256")):
        assert storage.sha256(folder / part) == entry[key]
    models.verify_built_in(folder)


def test_exits_of_another_kind_of_number_are_refused(readers, tmp_path):
    path, read = spoilt(readers, "exits", tmp_path / "x")
    config = storage.read_json(path.parent / "exit_config.json")
    tensors = storage.read_safetensors(path)
    name = next(iter(tensors))
    for bad in (tensors[name].long(), tensors[name] * float("nan"), tensors[name][..., :1]):
        storage.write_safetensors(path, {**tensors, name: bad})
        good_hash = config | {"tensors_sha256": storage.sha256(path)}
        storage.write_json(path.parent / "exit_config.json", good_hash)
        with pytest.raises(USER_ERRORS, match=name):
            read(path)
    check_folder(readers.folder / "model")
