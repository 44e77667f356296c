from __future__ import annotations

import sys

import pytest

from workbench import doctor
from workbench.errors import ConfigError


def test_one_screen_and_exit_zero(run_module):
    done = run_module("workbench.doctor", "--seconds", "0.2", NO_COLOR="1", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    for word in (
        "Python",
        "torch",
        "device",
        "engines",
        "FIVEFOLD_DATA",
        "hub",
        "GFLOP/s",
        "wandb",
    ):
        assert word in done.stdout
    assert "not installed → metrics.jsonl alone" in done.stdout
    assert "\x1b[" not in done.stdout
    assert len(done.stdout.splitlines()) <= 60


def test_typo_and_nonsense_exit_two(run_module):
    typo = run_module("workbench.doctor", "--secnds", "1")
    assert typo.returncode == 2
    assert "--seconds" in typo.stderr + typo.stdout
    with pytest.raises(ConfigError, match="--seconds"):
        doctor.Experiment(seconds=0)


def test_a_broken_engine_is_shown_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    lines = {line.name: line for line in doctor.engine_lines()}
    assert lines["faiss"].good is None
    assert "exact search" in lines["faiss"].text


def test_settings_are_reported(monkeypatch, tmp_path):
    (tmp_path / "wikitext2").mkdir()
    monkeypatch.setenv("FIVEFOLD_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = {line.name: line for line in doctor.resource_lines()}
    assert "wikitext2" in lines["FIVEFOLD_DATA"].text
    assert "offline" in lines["hub"].text
    monkeypatch.setenv("FIVEFOLD_DATA", str(tmp_path / "none"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    lines = {line.name: line for line in doctor.resource_lines()}
    assert lines["FIVEFOLD_DATA"].good is False
    assert "online" in lines["hub"].text


def test_missing_backbones_are_wrong_and_name_the_remedy(monkeypatch, tmp_path):
    from workbench import models

    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    lines = {line.name: line for line in doctor.resource_lines()}
    assert lines["backbones"].good is False
    assert "python -m workbench.backbones" in lines["backbones"].text


def test_looking_changes_no_thread_count():
    import torch

    before = torch.get_num_threads()
    doctor.machine_lines()
    lines = doctor.benchmark_lines(0.05)
    assert torch.get_num_threads() == before
    assert all(line.good for line in lines)
