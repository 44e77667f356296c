"""Whatever a script is given, a wrong input is one clear message and nothing is lost.

For every script with a tiny configuration, each field that names a model or a file is pointed at
something missing, cut, empty, not UTF-8 or not what it should be.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.test_scripts import TINY
from workbench.cli import parse
from workbench.errors import USER_ERRORS

MODEL_FIELDS = ("model", "model_name")
TEXT_FIELDS = ("data", "calibration", "evaluation", "unrelated")
FILE_FIELDS = (
    "prompt_file", "questions_file", "context_file", "qa_file", "input_training_set_file",
    "input_calibration_set_file", "input_eval_set_file", "input",
)  # fmt: skip


PARTNERS = {
    "prompt_file": "questions_file", "questions_file": "prompt_file",
    "context_file": "qa_file", "qa_file": "context_file",
    "input_calibration_set_file": "input_training_set_file",
}  # fmt: skip


QUESTION = json.dumps({"question": " Q where is it ? A", "answer": " here"}) + "\n"
ROWS = [
    {"id": str(i), "label": i % 2, "document": "x", "embedding": [float(i % 2), 0.1 * i]}
    for i in range(40)
]
GOOD = {
    "prompt_file": "The ball is here .", "context_file": "The ball is here .",
    "questions_file": QUESTION, "qa_file": QUESTION,
    "input_training_set_file": "".join(json.dumps(row) + "\n" for row in ROWS),
}  # fmt: skip


def experiment_of(config: Path):
    module = importlib.import_module(TINY[config])
    experiment, _ = parse(module.EXPERIMENT, ["--config", str(config)])
    return module.main, experiment


def cases(names: tuple[str, ...]):
    found = []
    for config in sorted(TINY):
        module = importlib.import_module(TINY[config])
        fields = [f.name for f in dataclasses.fields(module.EXPERIMENT)]
        for field in fields:
            if field in names:
                found.append(pytest.param(config, field, id=f"{TINY[config]}.{field}"))
    return found


def refuse(config: Path, field: str, value, tmp_path: Path) -> str:
    """Run the script with one field replaced; the message of its refusal."""
    main, experiment = experiment_of(config)
    old = getattr(experiment, field)
    if isinstance(old, tuple):
        value = (str(value),)
    elif isinstance(old, str):
        value = str(value)
    elif dataclasses.is_dataclass(old):  # a block of settings about the text
        value = dataclasses.replace(old, devset=(str(value),))
    changes = {field: value}
    if field in PARTNERS:  # the other half of the pair is in order
        partner = tmp_path / f"good-{PARTNERS[field]}"
        partner.write_text(GOOD[PARTNERS[field]], encoding="utf-8")
        changes[PARTNERS[field]] = type(old)(partner) if old is not None else partner
    run = dataclasses.replace(experiment.run, root=tmp_path / "runs", threads=1)
    with pytest.raises(USER_ERRORS) as caught:
        main(dataclasses.replace(experiment, **changes, run=run))
    message = str(caught.value)
    assert 10 < len(message) <= 1500, message
    assert not list((tmp_path / "runs").rglob("results.json"))
    return message


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    from workbench.tiny import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("model") / "m"
    tiny_model("mistral", seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("config", "field"), cases(MODEL_FIELDS))
def test_a_model_that_is_missing_or_damaged_is_refused(config, field, model_folder, tmp_path):
    missing = tmp_path / "nowhere" / "model"
    assert "nowhere" in refuse(config, field, missing, tmp_path)

    assert "micro-mistral" in refuse(config, field, "micro-mistrla", tmp_path)

    cut = tmp_path / "cut"
    shutil.copytree(model_folder, cut)
    weights = cut / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert "model.safetensors" in refuse(config, field, cut, tmp_path)

    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    canary = tmp_path / "fired"
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    assert "pytorch_model.bin" in refuse(config, field, pickled, tmp_path)

    remote = tmp_path / "remote"
    shutil.copytree(model_folder, remote)
    settings = json.loads((remote / "config.json").read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model"}
    (remote / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (remote / "modeling_x.py").write_text(
        f"open({str(canary)!r}, 'w').close()\nclass Model: pass\n", encoding="utf-8"
    )
    refuse(config, field, remote, tmp_path)
    assert not canary.exists(), "code from a model folder was executed"


@pytest.mark.parametrize(("config", "field"), cases(TEXT_FIELDS + FILE_FIELDS))
def test_a_file_that_is_missing_empty_or_no_text_is_refused(config, field, tmp_path):
    missing = tmp_path / "nowhere.jsonl"
    assert "nowhere.jsonl" in refuse(config, field, missing, tmp_path)

    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "empty.jsonl" in refuse(config, field, empty, tmp_path)

    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "é"}\n'.encode("latin-1"))
    assert "latin.jsonl" in refuse(config, field, latin, tmp_path)

    if field not in ("prompt_file", "context_file"):  # those are free text
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"id": "a", "text": "b"\n', encoding="utf-8")
        message = refuse(config, field, broken, tmp_path)
        assert "broken.jsonl" in message
        assert ":1" in message or "line 1" in message
