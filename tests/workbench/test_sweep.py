from __future__ import annotations

import os
import signal
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from workbench.errors import ConfigError, DataError, Interrupted, MissingExtra
from workbench.run import RunOptions
from workbench.sweep import EXECUTORS, grid, run_all


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Unit:
    a: int = 0
    b: str = "x"
    inner: Inner = field(default_factory=Inner)
    folder: str = ""
    run: RunOptions = field(default_factory=RunOptions)


def work(unit: Unit) -> dict:
    """One line per call into a file, so that repeated work is seen."""
    if unit.folder:
        with open(Path(unit.folder) / f"{unit.a}.log", "a", encoding="utf-8") as handle:
            handle.write(f"{os.getpid()} {unit.run.threads} {os.environ.get('OMP_NUM_THREADS')}\n")
    if unit.b == "error":
        raise DataError("bad input " + "x" * 2000)
    if unit.b == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if unit.b == "stop":
        raise Interrupted(signal.SIGTERM, "saved step 3")
    return {"a": unit.a, "square": unit.a**2}


def recorded(unit: Unit) -> dict:
    """A real run, keyed by its hash."""
    from workbench.run import Run

    with Run.open("demo.sweep", unit) as run:
        if run.finished:
            return run.results
        work(unit)
        return run.finish({"square": unit.a**2})


def test_grid_is_the_product_with_the_first_field_slowest():
    units = grid(Unit(), a=[1, 2], b=["p", "q"])
    assert [(u.a, u.b) for u in units] == [(1, "p"), (1, "q"), (2, "p"), (2, "q")]
    assert grid(Unit(a=5)) == [Unit(a=5)]
    assert [u.inner.rate for u in grid(Unit(), inner__rate=[0.5, 0.25])] == [0.5, 0.25]


def test_cli_offers_the_same_grid():
    from workbench.cli import grid as offered

    assert offered(Unit(), a=[1, 2]) == grid(Unit(), a=[1, 2])


@pytest.mark.parametrize(
    "choices", [{"a": []}, {"a": 3}, {"b": "xy"}, {"c": [1]}, {"inner__r": [1]}]
)
def test_grid_refuses_nonsense(choices):
    with pytest.raises(ConfigError):
        grid(Unit(), **choices)


def test_serial_keeps_order_and_survives_failures():
    results = run_all(work, [Unit(a=2), Unit(b="error"), Unit(a=3)])
    assert results[0] == {"a": 2, "square": 4}
    assert results[1]["failed"].startswith("DataError: bad input")
    assert len(results[1]["failed"]) <= 500
    assert results[2]["square"] == 9
    assert run_all(work, []) == []


def test_processes_give_the_same_table_and_a_crash_costs_one_row(tmp_path):
    units = [Unit(a=a, folder=str(tmp_path)) for a in (3, 1, 2)]
    units[1] = Unit(a=1, b="die", folder=str(tmp_path))
    units.append(Unit(a=9, b="error", folder=str(tmp_path)))
    results = run_all(work, units, executor="process", workers=2)
    assert results[0] == {"a": 3, "square": 9}
    assert "died" in results[1]["failed"]
    assert results[2] == {"a": 2, "square": 4}
    assert results[3]["failed"].startswith("DataError")
    lines = [(tmp_path / f"{a}.log").read_text(encoding="utf-8").split() for a in (1, 2, 3)]
    assert all(len(line) == 3 for line in lines)  # each unit was begun once
    assert {line[0] for line in lines}.isdisjoint({str(os.getpid())})
    assert {line[1] for line in lines} == {"1"}  # one torch thread each
    assert {line[2] for line in lines} == {"1"}


def test_a_sweep_resumes_because_runs_are_keyed_by_their_hash(tmp_path):
    options = RunOptions(root=tmp_path / "runs")
    units = [Unit(a=a, folder=str(tmp_path), run=options) for a in (1, 2)]
    first = run_all(recorded, units[:1])
    both = run_all(recorded, units, executor="process", workers=1)  # another executor, same runs
    assert both == [first[0], {"square": 4}]
    for a in (1, 2):
        assert len((tmp_path / f"{a}.log").read_text(encoding="utf-8").splitlines()) == 1
    assert run_all(recorded, units) == both


@pytest.mark.parametrize("executor", ["serial", "process"])
def test_an_interruption_stops_the_sweep(tmp_path, executor):
    units = [Unit(a=1, b="stop"), Unit(a=2, folder=str(tmp_path))]
    with pytest.raises(Interrupted, match="saved step 3") as caught:
        run_all(work, units, executor=executor, workers=1)
    assert caught.value.signal_number == signal.SIGTERM


def test_bad_choices_are_named(monkeypatch):
    with pytest.raises(ConfigError, match="process"):
        run_all(work, [Unit()], executor="proces")
    with pytest.raises(ConfigError, match="workers=0"):
        run_all(work, [Unit()], workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"\[ray\]"):
        run_all(work, [Unit()], executor="ray")
    assert EXECUTORS == ("serial", "process", "ray")


def test_ray_gets_the_same_units_and_a_dead_worker_costs_one_row(monkeypatch):
    """The scheduling is Ray's; this checks what is handed to it and what comes back."""
    ray = types.ModuleType("ray")

    class Crashed(Exception):
        pass

    ray.exceptions = types.SimpleNamespace(WorkerCrashedError=Crashed)
    calls: list[str] = []
    ray.is_initialized = lambda: False
    ray.init = lambda **options: calls.append(f"init {options['num_cpus']}")
    ray.shutdown = lambda: calls.append("shutdown")

    def remote(**options):
        assert options == {"num_cpus": 1, "max_retries": 0}
        return lambda unit: types.SimpleNamespace(remote=lambda *given: (unit, given))

    def get(reference):
        unit, (main, experiment) = reference
        if experiment.b == "die":
            raise Crashed
        return unit(main, experiment)

    ray.remote, ray.get = remote, get
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    units = [Unit(a=2), Unit(b="die"), Unit(b="error"), Unit(a=4)]
    results = run_all(work, units, executor="ray", workers=3)
    assert results[0] == {"a": 2, "square": 4}
    assert "died" in results[1]["failed"]
    assert results[2]["failed"].startswith("DataError")
    assert results[3]["square"] == 16
    assert calls == ["init 3", "shutdown"]
    with pytest.raises(Interrupted):
        run_all(work, [Unit(b="stop")], executor="ray")
    assert calls[-1] == "shutdown"
