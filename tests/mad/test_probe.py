"""Probes of length: the same test rows at 1 ×, longer rows of the same task, one trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mad.probe import (
    Experiment,
    longest,
    main,
    probe_task,
    trained_model,
    training_of,
)
from workbench.cli import RunOptions
from workbench.errors import CheckpointError, ConfigError
from workbench.tables import read_csv

SMALL = Experiment(
    layers=("mh-attention,num_heads=2", "mh-hyena,num_heads=4"),
    factors=(1, 2, 4),
    seq_len=8,
    vocab_size=8,
    num_train_examples=64,
    num_test_examples=64,
    dim=16,
    batch_size=32,
    epochs=2,
    lr=1e-2,
)


def in_folder(folder: Path) -> RunOptions:
    return RunOptions(root=folder, device="cpu", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> tuple[Experiment, dict]:
    folder = tmp_path_factory.mktemp("probe")
    experiment = replace(SMALL, run=in_folder(folder))
    return experiment, main(experiment)


def test_only_the_length_of_the_task_changes():
    short, long = probe_task(SMALL, 1), probe_task(SMALL, 4)
    assert (short.seq_len, long.seq_len) == (8, 32)
    assert replace(long, seq_len=8) == short
    assert longest(SMALL) == long.length
    baseline = replace(SMALL, seq_len=None, vocab_size=None)
    assert probe_task(baseline, 16).seq_len == 16 * probe_task(baseline, 1).seq_len


def test_training_is_at_the_short_length_with_layers_for_the_long_one():
    training = training_of(replace(SMALL, factors=(2, 4)))
    assert training.seq_len == 8
    assert training.max_length == longest(SMALL)
    assert training_of(replace(SMALL, factors=(1,))).max_length == probe_task(SMALL, 1).length


def test_the_first_length_gives_the_score_of_the_training_run(probed):
    _, results = probed
    assert results["accuracy_1x"] == results["train_run_test_accuracy"]


def test_every_length_has_a_row_whose_interval_holds_its_accuracy(probed):
    experiment, results = probed
    [file] = experiment.run.root.rglob("figures/lengths.csv")
    rows = read_csv(file)
    assert [row["seq_len"] for row in rows] == [8, 16, 32]
    for row in rows:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert results[f"accuracy_{row['factor']}x"] == row["accuracy"]
        assert row["n_rows"] == 64
    assert rows[0]["n_scored"] < rows[1]["n_scored"] < rows[2]["n_scored"]


def test_the_tested_weights_are_the_trained_ones_at_the_longest_length(probed):
    from safetensors.torch import load_file

    experiment, _ = probed
    model = trained_model(experiment, training_of(experiment), probe_task(experiment, 1))
    [file] = experiment.run.root.rglob("model.safetensors")
    saved = load_file(file)
    assert all(bool((saved[name] == value).all()) for name, value in model.state_dict().items())


def test_a_fresh_run_keeps_the_weights_it_has_just_trained(probed, tmp_path):
    experiment, results = probed
    fresh = replace(experiment, run=replace(in_folder(tmp_path), fresh=True))
    assert main(fresh) == results


def test_weights_that_are_gone_are_named(probed, tmp_path):
    import shutil

    experiment, _ = probed
    shutil.copytree(experiment.run.root, tmp_path / "copy")
    moved = replace(experiment, run=in_folder(tmp_path / "copy"))
    [file] = (tmp_path / "copy").rglob("model.safetensors")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the weights .* are gone"):
        trained_model(moved, training_of(moved), probe_task(moved, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factors": ()}, r"factors=\[\]"),
        ({"factors": (0, 1)}, r"factors=\[0, 1\]"),
        ({"factors": (2, 2)}, "each length once"),
        ({"layers": ("mh-atention",)}, "mh-attention"),
        ({"seq_len": 9}, "seq_len=9"),
        ({"task": "compression"}, "autoencoder"),
        ({"epochs": 0}, "epochs=0"),
        ({"options": ("colour=3",)}, "colour"),
    ],
)
def test_bad_settings_are_refused_before_training(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, **changes)
