from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

from workbench import models
from workbench.errors import ConfigError, DataError
from workbench.models import check_safetensors, load_model, load_tokenizer, resolve
from workbench.storage import read_safetensors, write_safetensors
from workbench.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def test_a_folder_loads_exactly_what_was_saved(folder):
    model, tokenizer = load_model(folder)
    stored = read_safetensors(folder / "model.safetensors")
    assert not model.training
    for name, tensor in stored.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.decode(tokenizer.encode("héllo", add_special_tokens=False)) == "héllo"


def test_dtype_is_honoured(folder):
    assert load_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    write_safetensors(
        folder / "model.safetensors",
        {k: v.half() for k, v in read_safetensors(folder / "model.safetensors").items()},
        {"format": "pt"},
    )
    assert load_model(folder)[0].dtype == torch.float32  # half precision is no CPU format


def test_tiny_specification():
    model, tokenizer = load_model("tiny:mistral")
    assert model.config.model_type == "mistral"
    assert len(tokenizer) == model.config.vocab_size
    with pytest.raises(ConfigError, match="mistral"):
        load_model("tiny:mistal")


def test_a_folder_below_the_data_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_DATA", str(folder.parent))
    assert resolve("model") == ("folder", str(folder))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(folder, share):
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=r"model\.safetensors: truncated") as caught:
        load_model(folder)
    assert len(str(caught.value)) <= 1000


def test_surplus_bytes_and_broken_headers_are_refused(folder, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="expected"):
        check_safetensors(path)
    for header in (b"{", b"[]", b'{"a": 1}', b'{"a":{}, "a":{}}', b'{"a":{"data_offsets":[0]}}'):
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(DataError, match="damaged"):
            check_safetensors(bad)


def test_another_vocabulary_size_is_refused(folder):
    edit(folder / "config.json", vocab_size=100)
    with pytest.raises(DataError, match="shape"):
        load_model(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match="268 tokens in the tokenizer, 259 rows"):
        load_model(folder)


@pytest.mark.parametrize("change", ["missing", "surplus", "nan", "shape"])
def test_weights_that_do_not_fit_are_named(folder, change):
    path = folder / "model.safetensors"
    tensors = read_safetensors(path)
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        name = "model.layers.7.mlp.up_proj.weight"
        tensors[name] = torch.zeros(2, 2)
    elif change == "nan":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name] = tensors[name][:-1]
    write_safetensors(path, tensors, {"format": "pt"})
    with pytest.raises(DataError, match=r"up_proj"):
        load_model(folder)


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt"])
def test_a_pickle_is_never_opened(folder, tmp_path, name):
    canary = tmp_path / "fired"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(DataError, match="safe_serialization"):
        load_model(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}),
        ("config.json", {"text_config": {"deep": [{"trust_remote_code": True}]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}),
        ("generation_config.json", {"custom_generate": "evil"}),
    ],
)
def test_code_from_the_folder_never_runs(folder, tmp_path, file, content):
    canary = tmp_path / "fired"
    code = f"open({str(canary)!r}, 'w')\nclass Model: pass\nConfig = Tok = Model\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    edit(folder / file, **content)
    with pytest.raises(DataError, match="Remove the field"):
        load_model(folder)
    with pytest.raises(DataError, match="Remove the field"):
        load_tokenizer(folder)
    assert not canary.exists()


def test_a_harmless_false_is_no_reason_to_refuse(folder):
    edit(folder / "config.json", trust_remote_code=False)
    load_model(folder)


def test_index_that_points_outside_is_refused(folder):
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match="outside"):
        load_model(folder)
    index = {"weight_map": {"a": "part2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match="missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gpt2", ["HF_HUB_OFFLINE", "--model FOLDER"]),
        ("someone/some-model", ["HF_HUB_OFFLINE", "--model FOLDER"]),
        ("./nowhere", ["no such folder"]),
        ("a/b/c", ["no such folder"]),
        ("", ["empty"]),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(spec, words):
    with pytest.raises(DataError) as caught:
        load_model(spec)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words)


def test_a_file_or_an_empty_folder_is_no_model(tmp_path, folder):
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        load_model(str(folder / "config.json"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_cut_json_file_is_named(folder, file):
    path = folder / file
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=file):
        load_model(folder)


def test_unknown_model_type_is_explained(folder):
    edit(folder / "config.json", model_type="surely-not")
    with pytest.raises(DataError, match="surely-not"):
        load_model(folder)


def test_unknown_built_in_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="micro-"):
        load_model("micro-mistrl")


@pytest.mark.parametrize("name", models.built_in_names())
def test_built_in_models_load(name):
    model, tokenizer = load_model(name)
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_a_changed_bit_in_a_shipped_model_is_found(folder, monkeypatch):
    from workbench.storage import sha256, write_json

    root = folder.parent / "weights"
    root.mkdir()
    shipped = Path(shutil.move(folder, root / "micro-test"))
    entry = {
        "sha256": sha256(shipped / "model.safetensors"),
        "tokenizer_sha256": sha256(shipped / "tokenizer.json"),
    }
    write_json(root.parent / "backbones.json", {"micro-test": entry})
    monkeypatch.setattr(models, "WEIGHTS", root)
    assert models.built_in_names() == ["micro-test"]
    load_model("micro-test")
    for name in ("model.safetensors", "tokenizer.json"):
        data = (shipped / name).read_bytes()
        (shipped / name).write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
        with pytest.raises(DataError, match=f"{name}: altered"):
            load_model("micro-test")
        (shipped / name).write_bytes(data)


def test_quiet_block_restores_the_library_settings():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with models.quiet_transformers():
        assert logging.get_verbosity() != before or before == logging.CRITICAL
    assert logging.get_verbosity() == before
