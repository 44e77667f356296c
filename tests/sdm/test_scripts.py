"""The two scripts from end to end: artefacts, continuation, input by files, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdm import reexpress
from workbench.cli import RunOptions
from workbench.errors import ConfigError, DataError
from workbench.storage import sha256


def write_features(path, n: int, seed: int, *, far: int = 0, width: int = 4):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n + far):
        label = i % 2 if i < n else -99
        x = rng.normal(size=width) + ([2.5 * (2 * label - 1), 0, 0, 0] if i < n else [0, 40, 0, 0])
        group = "known" if i < n else "far"
        rows.append(
            {"id": str(i), "label": label, "document": f"d{i}", "embedding": x.tolist(),
             "group": group}
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def experiment(tmp_path):
    return dataclasses.replace(
        reexpress.EXPERIMENT,
        input_training_set_file=write_features(tmp_path / "train.jsonl", 60, 0),
        input_calibration_set_file=write_features(tmp_path / "calibration.jsonl", 60, 1),
        input_eval_set_file=write_features(tmp_path / "eval.jsonl", 60, 2, far=20),
        alpha=0.8, epoch=6, number_of_random_shuffles=2, exemplar_vector_dimension=8,
        learning_rate=1e-2, save_every=1,
        run=RunOptions(root=tmp_path / "runs", threads=1),
    )  # fmt: skip


def test_files_in_report_and_model_out(experiment, tmp_path):
    files = {
        name: str(tmp_path / f"{name}.jsonl")
        for name in (
            "label_error_file",
            "prediction_output_file",
            "predictions_in_high_reliability_region_file",
        )
    }
    values = reexpress.main(dataclasses.replace(experiment, **files))
    assert values["region"]
    assert values["sdm_region/known/accuracy"] > 0.9
    assert values["sdm_region/known/admitted_share"] > 0.2
    assert values["sdm_region/far/admitted_share"] == 0.0
    (folder,) = (p for p in (tmp_path / "runs" / "sdm").iterdir() if (p / "model").is_dir())
    for name in ("model/config.json", "report.md", "figures/selection.png", "tables/reasons.csv"):
        assert (folder / name).is_file()
    text = Path(files["prediction_output_file"]).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 80
    assert {row["reason"] for row in lines if row["valid_index__lower"]} == {"admitted"}

    scored = dataclasses.replace(
        experiment, eval_only=True, model_dir=str(folder / "model"), input_training_set_file="",
        input_calibration_set_file="",
    )  # fmt: skip
    again = reexpress.main(scored)
    assert again["sdm_region/known/admitted_share"] == values["sdm_region/known/admitted_share"]
    with pytest.raises(ConfigError, match="recalibrate_with_updated_alpha"):
        reexpress.main(dataclasses.replace(scored, alpha=0.7))
    moved = dataclasses.replace(scored, alpha=0.7, recalibrate_with_updated_alpha=True)
    assert reexpress.main(moved)["q_min"] <= values["q_min"]


def test_an_interrupted_run_continues_to_the_same_bits(experiment, tmp_path, monkeypatch):
    from sdm.train import Trainer

    whole = reexpress.main(experiment)
    (first,) = (p for p in (tmp_path / "runs" / "sdm").iterdir() if (p / "model").is_dir())
    second_root = dataclasses.replace(experiment.run, root=tmp_path / "again")
    broken = dataclasses.replace(experiment, run=second_root)
    original = Trainer.run_epoch

    def stop(self, epoch, *rest):
        if epoch == 4:
            raise KeyboardInterrupt
        return original(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "run_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        reexpress.main(broken)
    monkeypatch.setattr(Trainer, "run_epoch", original)
    assert reexpress.main(broken) == whole
    (second,) = (p for p in (tmp_path / "again" / "sdm").iterdir() if (p / "model").is_dir())
    for name in ("weights", "support", "calibration"):
        file = f"model/{name}.safetensors"
        assert sha256(first / file) == sha256(second / file)


def test_another_content_under_the_same_name_is_refused(experiment, tmp_path):
    reexpress.main(experiment)
    write_features(tmp_path / "eval.jsonl", 60, 7)
    with pytest.raises(ConfigError, match="--fresh"):
        reexpress.main(experiment)


def test_fixed_halves(experiment, tmp_path):
    fixed = dataclasses.replace(experiment, do_not_shuffle_data=True, epoch=2)
    assert "q_min" in reexpress.main(fixed)


def test_damaged_input_stops_before_training(experiment, tmp_path):
    rows = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    cases = {
        "label 7": json.dumps(json.loads(rows[0]) | {"label": 7}),
        "expected 4": json.dumps(json.loads(rows[0]) | {"embedding": [1.0]}),
        ":60": "{broken",
    }
    for match, line in cases.items():
        text = "\n".join([*rows[1:], line]) + "\n"
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=match):
            reexpress.main(experiment)
    wide = write_features(tmp_path / "eval.jsonl", 10, 0)
    data = [json.loads(line) for line in Path(wide).read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(row | {"embedding": [1.0, 2.0]}) + "\n" for row in data)
    (tmp_path / "eval.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 features"):
        reexpress.main(experiment)
    one_class = [json.dumps(json.loads(row) | {"label": 0}) for row in rows]
    for name in ("train.jsonl", "calibration.jsonl"):
        (tmp_path / name).write_text("\n".join(one_class) + "\n", encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match=r"class 1 has|features"):
        reexpress.main(experiment)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"alpha": 0.5}, "not an error rate"),
        ({"alpha": 1.0}, "alpha"),
        ({"class_size": 1}, "class_size"),
        ({"number_of_random_shuffles": 0}, "number_of_random_shuffles"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"eval_only": True}, "model_dir"),
        ({"input": "x", "input_eval_set_file": "y"}, "one folder"),
        ({"do_not_shuffle_data": True}, "two halves"),
    ],
)
def test_nonsense_is_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(reexpress.EXPERIMENT, **changes)


def test_the_built_in_claims_through_a_random_model(tmp_path):
    from sdm import cache_hidden_states
    from sdm.data import read_cache

    run = RunOptions(root=tmp_path, threads=1)
    small = cache_hidden_states.Experiment(
        model="tiny:mistral", n_train=12, n_test=4, batch_size=4, out=tmp_path / "f", run=run,
        answers=("n", "y"),
    )  # fmt: skip
    values = cache_hidden_states.main(small)
    data = read_cache(tmp_path / "f")
    assert values["documents"] == len(data) == 36
    assert torch.isfinite(data.features).all()
    digest = sha256(tmp_path / "f" / "features.safetensors")
    (tmp_path / "f" / "manifest.json").unlink()  # written again from the durable parts
    cache_hidden_states.main(small)
    assert sha256(tmp_path / "f" / "features.safetensors") == digest
