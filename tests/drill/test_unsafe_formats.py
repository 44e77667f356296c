"""Files that run code when a careless program opens them: every reader refuses, nothing runs.

Row 24 of the fault table. The canary creates a file when it is unpickled.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench import storage
from workbench.cli import read_yaml
from workbench.errors import USER_ERRORS
from workbench.text import read_jsonl, read_texts


class Canary:
    """Unpickling it creates the file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def _torch(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Canary(canary), buffer)
    return buffer.getvalue()


def _numpy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _npz(canary: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", _numpy(canary))
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Path], bytes]] = {
    "weights.pkl": lambda c: pickle.dumps(Canary(c)),
    "text pickle.txt": lambda c: pickle.dumps(Canary(c), protocol=0),
    "joblib.joblib": lambda c: pickle.dumps([Canary(c)], protocol=2),
    "dill.dill": lambda c: pickle.dumps({"x": Canary(c)}, protocol=4),
    "torch.pt": _torch,
    "objects.npy": _numpy,
    "objects.npz": _npz,
    "packed.jsonl.gz": lambda c: gzip.compress(pickle.dumps(Canary(c))),
    "yaml.yaml": lambda c: f"steps: !!python/object/apply:builtins.open [{c}, w]\n".encode(),
    "json.json": lambda c: b'{"py/reduce": [{"py/type": "builtins.open"}]',
}
READERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda p: read_jsonl(p, required={"text": str}),
    "safetensors": storage.read_safetensors,
    "json": storage.read_json,
    "tree": storage.load_tree,
    "settings": read_yaml,
}


def test_the_canary_works(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "fired")))
    assert (tmp_path / "fired").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_refuses_what_could_run_code(tmp_path, name, reader):
    canary = tmp_path / "fired"
    path = tmp_path / name
    path.write_bytes(FORMATS[name](canary))
    with pytest.raises(USER_ERRORS) as caught:
        READERS[reader](path)
    assert len(str(caught.value)) <= 1500
    assert not canary.exists()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".json", ".txt.gz"])
def test_text_readers_never_run_what_they_read(tmp_path, name, ending):
    """Some of these bytes are text after all; what counts is that nothing runs."""
    canary = tmp_path / "fired"
    path = tmp_path / f"data{ending}"
    content = FORMATS[name](canary)
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    with contextlib.suppress(*USER_ERRORS):
        read_texts(path)
    assert not canary.exists()


def test_a_class_named_in_a_settings_file_is_text_not_an_import(tmp_path):
    """`module:Class` is imported only where a flag asks for a class, never for plain data."""
    module = tmp_path / "evil_module.py"
    code = f"open({str(tmp_path / 'fired')!r}, 'w').close()\nclass Mine: pass\n"
    module.write_text(code, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "evil_module:Mine"}\n', encoding="utf-8")
    assert read_jsonl(rows, required={"text": str})[0]["text"] == "evil_module:Mine"
    (tmp_path / "s.yaml").write_text("layers: [evil_module:Mine]\n", encoding="utf-8")
    assert read_yaml(tmp_path / "s.yaml") == {"layers": ["evil_module:Mine"]}
    assert not (tmp_path / "fired").exists()
