"""Durable files and trees: whole or absent, equal after the way out and in, verified when read."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import storage
from workbench.errors import CheckpointError, DataError


def same(a, b) -> bool:
    if isinstance(a, (np.ndarray, torch.Tensor)):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool((a == b).all())
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return (a == b or (a != a and b != b)) and type(a) is type(b)


LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.builds(lambda n: torch.arange(n), st.integers(0, 3))
    | st.builds(lambda n: np.full((n, 2), 0.5), st.integers(0, 3))
)  # fmt: skip
KEYS = st.text(max_size=4) | st.integers(0, 5)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_a_tree_comes_back_as_it_was(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("tree") / "t"
    try:
        storage.save_tree(path, tree)
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    assert same(storage.load_tree(path), tree)


def test_an_optimizer_state_comes_back_bit_equal(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    storage.save_tree(tmp_path / "t", optimizer.state_dict())
    assert same(storage.load_tree(tmp_path / "t"), optimizer.state_dict())


def test_a_tree_replaces_an_older_one_and_leaves_no_litter(tmp_path):
    for value in (1, 2):
        storage.save_tree(tmp_path / "t", {"x": torch.tensor([value])})
    assert storage.load_tree(tmp_path / "t")["x"].item() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_what_has_no_plain_form_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"cannot store .* at '\.a'"):
        storage.save_tree(tmp_path / "t", {"a": object()})
    assert not list(tmp_path.iterdir())


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = storage.write_text(tmp_path / "a.txt", "old")

    def fail(temporary):
        temporary.write_text("half", encoding="utf-8")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        storage.atomic_write(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_the_umask_allows(tmp_path, umask):
    old = os.umask(umask)
    try:
        a = storage.write_text(tmp_path / "a.txt", "x")
        b = storage.write_safetensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(old)
    for path in (a, b):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_shared_and_strided_tensors_are_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    path = storage.write_safetensors(
        tmp_path / "x.safetensors", {"a": base, "b": base.T, "c": base}
    )
    back = storage.read_safetensors(path)
    assert torch.equal(back["b"], base.T)
    assert torch.equal(back["a"], back["c"])


def test_equal_content_gives_equal_bytes_whatever_the_order_of_the_metadata(tmp_path):
    """The library's own order changes from process to process (a hash map)."""
    import itertools

    notes = {"format": "pt", "z": "1", "a": '{"k": "ü"}'}
    seen = set()
    for i, order in enumerate(itertools.permutations(notes)):
        path = storage.write_safetensors(
            tmp_path / f"{i}.safetensors",
            {"b": torch.arange(3), "a": torch.zeros(2, 2)},
            metadata={key: notes[key] for key in order},
        )
        seen.add(path.read_bytes())
        assert storage.read_safetensors(path)["b"].tolist() == [0, 1, 2]
    assert len(seen) == 1
    header = next(iter(seen))[8:]
    assert header.index(b'"a":"{') < header.index(b'"format"') < header.index(b'"z"')


def test_a_truncated_safetensors_file_is_one_clear_error(tmp_path):
    path = storage.write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(100)})
    data = path.read_bytes()
    for cut in (0, 7, 8, 40, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=rf"x\.safetensors: not a complete.*found {cut} bytes"):
            storage.read_safetensors(path)
    with pytest.raises(DataError, match="no such file"):
        storage.read_safetensors(tmp_path / "none.safetensors")


HEADERS = [
    b"",
    b"{",
    b"[]",
    b'{"a": 1}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [99999999999999999], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    b"\xff\xfe",
    b"[" * 5000,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_adversarial_safetensors_headers_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(DataError, match="not a complete safetensors"):
        storage.read_safetensors(path)
    path.write_bytes((2**60).to_bytes(8, "little") + header)
    with pytest.raises(DataError, match="not a complete safetensors"):
        storage.read_safetensors(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_json_that_python_would_swallow_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        storage.read_json(path)
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8 at byte 7"):
        storage.read_json(path)


def test_written_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(tmp_path / "x.json", {"a": float("nan")})
    path = storage.write_json(tmp_path / "x.json", {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}


def test_a_folder_without_its_manifest_is_incomplete(tmp_path):
    storage.save_tree(tmp_path / "t", {"x": torch.zeros(1)})
    (tmp_path / "t" / storage.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        storage.load_tree(tmp_path / "t")
