"""Benchmarks of the room, rehearsed at small sizes: they measure what the package does now."""

import importlib.util
import json
import sys

import pytest

from tests.conftest import ROOT
from workbench.tables import read_csv

FOLDER = ROOT / "benchmarks" / "lplr_q"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_of_rounding(tmp_path, capsys):
    load("ldlq").main(1, 64, 128, 64, tmp_path / "ldlq.csv")
    rows = {row["item"]: row for row in read_csv(tmp_path / "ldlq.csv")}
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 8
    assert all(float(row["ratio"]) > 0 for row in rows.values())
    for item in ("Q step with refinement", "outer round, n = 128, rank 8"):
        assert 0 < float(rows[item]["fast_error"]) < 1.2 * float(rows[item]["plain_error"]) < 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_of_a_worker(tmp_path, capsys):
    memory = load("memory")
    memory.write_case(tmp_path, 128, 64)
    for _, _, options in memory.CASES.values():
        json.dumps(options)  # they travel to the process that measures
    memory.measure(tmp_path, {"method": "gptq", "group": 32})
    peak, seconds = map(float, capsys.readouterr().out.split())
    assert peak >= 0
    assert seconds > 0
    assert (tmp_path / "out" / "work").is_dir()
