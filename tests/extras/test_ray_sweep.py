"""The real Ray on two local workers gives the table of the serial executor, in its order."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from workbench.run import RunOptions
from workbench.sweep import grid, run_all

pytestmark = pytest.mark.extras
ray = pytest.importorskip("ray")


@dataclass(frozen=True)
class Unit:
    a: int = 0
    kind: str = "good"
    folder: str = ""
    run: RunOptions = field(default_factory=RunOptions)


def work(unit: Unit) -> dict:
    """A recorded run that also notes which process did it."""
    from workbench.run import Run

    if unit.kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    with Run.open("demo.ray", unit) as run:
        if run.finished:
            return run.results
        import torch

        with open(Path(unit.folder) / "calls.log", "a", encoding="utf-8") as handle:
            handle.write(f"{os.getpid()} {torch.get_num_threads()}\n")
        value = float(run.streams("x").normal()) + unit.a
        return run.finish({"a": unit.a, "value": value})


def test_two_workers_give_the_serial_table(tmp_path):
    def units(name: str):
        (tmp_path / name).mkdir(exist_ok=True)
        options = RunOptions(root=tmp_path / name)
        return grid(Unit(folder=str(tmp_path / name), run=options), a=[3, 1, 2, 5])

    serial = run_all(work, units("serial"))
    spread = run_all(work, units("ray"), executor="ray", workers=2)
    assert spread == serial
    assert [row["a"] for row in spread] == [3, 1, 2, 5]
    calls = (tmp_path / "ray" / "calls.log").read_text(encoding="utf-8").splitlines()
    assert len(calls) == 4
    assert str(os.getpid()) not in {call.split()[0] for call in calls}
    again = run_all(work, units("ray"), executor="ray", workers=2)  # finished runs return at once
    assert again == serial
    calls = (tmp_path / "ray" / "calls.log").read_text(encoding="utf-8").splitlines()
    assert len(calls) == 4


def test_a_dead_worker_costs_one_row(tmp_path):
    options = RunOptions(root=tmp_path)
    one = Unit(a=1, folder=str(tmp_path), run=options)
    two = Unit(a=2, kind="die", folder=str(tmp_path), run=options)
    results = run_all(
        work, [one, two, Unit(a=3, folder=str(tmp_path), run=options)], executor="ray"
    )
    assert results[0]["a"] == 1
    assert "died" in results[1]["failed"]
    assert results[2]["a"] == 3
    assert not ray.is_initialized()
