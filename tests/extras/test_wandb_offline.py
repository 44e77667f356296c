"""The real wandb, offline: everything arrives in its local file, nothing is asked or hangs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import pytest

pytestmark = pytest.mark.extras
pytest.importorskip("wandb")


@dataclass(frozen=True)
class Unit:
    steps: int = 5
    seed: int = 0
    run: object = field(default_factory=object)


def test_a_run_is_mirrored_offline_beside_metrics_jsonl(tmp_path, monkeypatch):
    from workbench.integrations import wandb as mirror
    from workbench.run import Run, RunOptions

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 60.0)  # wait for the real one to finish here
    with Run.open("demo.mirror", Unit(run=RunOptions(root=tmp_path, wandb=True))) as run:
        for step in range(1, 6):
            run.log(step, {"train/loss_nats": 1.0 / step})
        run.finish({"loss": 0.2})
    rows = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5]
    stored = list((run.directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stored) == 1
    data = stored[0].read_bytes()
    assert data.count(b"train/loss_nats") >= 5
    assert b"0.2" in data


def test_a_mirror_without_service_costs_two_seconds_at_most(tmp_path, monkeypatch):
    from workbench.integrations import wandb as mirror

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    tracker = mirror.start_tracker("demo", "x", {}, tmp_path)
    tracker.log(1, {"a": 1.0})
    start = time.monotonic()
    tracker.close()
    assert time.monotonic() - start < 3.0
