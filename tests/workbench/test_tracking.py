"""The wandb mirror with a service that misbehaves in every way."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types

import pytest

from workbench.errors import MissingExtra
from workbench.integrations import wandb as mirror


class Service:
    """A stand-in for wandb; `bad` names the call that fails, `how` says how."""

    def __init__(self, bad: str = "", how: str = ""):
        self.bad, self.how = bad, how
        self.calls: list[tuple] = []
        self.release = threading.Event()
        module = types.ModuleType("wandb")
        module.init = self.init
        self.module = module

    def _act(self, name: str) -> None:
        if name == self.bad and self.how == "raises":
            raise ConnectionError(f"{name} failed\nsecond line")
        if name == self.bad and self.how == "exits":
            raise SystemExit(1)
        if name == self.bad and self.how == "hangs":
            self.release.wait(30)

    def init(self, **settings):
        self.calls.append(("init", settings))
        self._act("init")
        return self

    def log(self, metrics, step):
        self._act("log")
        self.calls.append(("log", step, metrics))

    def finish(self):
        self._act("finish")
        self.calls.append(("finish",))


def run_one(service: Service, monkeypatch, tmp_path, steps: int = 20) -> float:
    """Logs `steps` steps through the mirror; returns the seconds it took."""
    monkeypatch.setitem(sys.modules, "wandb", service.module)
    start = time.monotonic()
    tracker = mirror.start_tracker("mad", "train-1", {"seed": 0}, tmp_path)
    for step in range(1, steps + 1):
        tracker.log(step, {"train/loss_nats": 1.0 / step})
    tracker.close()
    return time.monotonic() - start


def test_everything_arrives_in_order_and_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    service = Service()
    run_one(service, monkeypatch, tmp_path)
    name, settings = service.calls[0]
    assert name == "init"
    assert (settings["project"], settings["name"], settings["mode"]) == (
        "mad",
        "train-1",
        "offline",
    )
    assert settings["dir"] == str(tmp_path)
    assert [call[1] for call in service.calls[1:-1]] == list(range(1, 21))
    assert service.calls[-1] == ("finish",)


@pytest.mark.parametrize("bad", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raises", "exits", "hangs"])
def test_a_misbehaving_service_costs_one_warning_and_two_seconds(
    monkeypatch, tmp_path, caplog, bad, how
):
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.3)
    service = Service(bad, how)
    with caplog.at_level(logging.WARNING, logger="fivefold.wandb"):
        seconds = run_one(service, monkeypatch, tmp_path)
        service.release.set()
        time.sleep(0.05)
    assert seconds < 2.0
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "metrics.jsonl has everything" in warnings[0]
    assert "\n" not in warnings[0]


def test_the_wait_is_two_seconds_at_most():
    assert mirror.CLOSE_SECONDS <= 2.0


def test_a_slow_service_with_a_full_queue_never_blocks(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(mirror, "QUEUE_LENGTH", 5)
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.2)
    service = Service("init", "hangs")
    with caplog.at_level(logging.WARNING, logger="fivefold.wandb"):
        assert run_one(service, monkeypatch, tmp_path, steps=500) < 2.0
        service.release.set()
    assert len(caplog.records) == 1


def test_mode_is_offline_without_login_and_wandb_mode_wins(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mirror.wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user", encoding="utf-8")
    assert mirror.wandb_mode() == "online"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mirror.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror.wandb_mode() == "disabled"


def test_missing_wandb_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"\[wandb\]"):
        mirror.start_tracker("mad", "x", {}, tmp_path)


def test_a_run_is_the_same_with_a_broken_mirror(monkeypatch, tmp_path):
    from dataclasses import dataclass, field

    from workbench.run import Run, RunOptions

    @dataclass(frozen=True)
    class Unit:
        seed: int = 0
        run: RunOptions = field(default_factory=RunOptions)

    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.2)
    files = []
    for tracked in (False, True):
        service = Service("log", "raises")
        monkeypatch.setitem(sys.modules, "wandb", service.module)
        unit = Unit(run=RunOptions(root=tmp_path / str(tracked), wandb=tracked))
        with Run.open("demo.track", unit) as run:
            for step in range(1, 4):
                run.log(step, {"loss": 1.0 / step})
            run.finish({"loss": 0.25})
        rows = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        files.append([line.split('"loss"')[1] for line in rows])
    assert files[0] == files[1]
    assert len(files[0]) == 3
