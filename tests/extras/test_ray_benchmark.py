"""The tiny benchmark on two real Ray workers gives the very table of the serial executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from workbench.cli import parse
from workbench.storage import read_json

pytestmark = pytest.mark.extras
ray = pytest.importorskip("ray")


def test_two_ray_workers_give_the_serial_scores(tmp_path):
    from mad.benchmark import EXPERIMENT, main

    config = ROOT / "configs/mad/benchmark.tiny.yaml"
    tiny, _ = parse(EXPERIMENT, ["--config", str(config)])

    def scored(name: str, **changes) -> tuple[dict, Path]:
        root = tmp_path / name
        results = main(replace(tiny, run=replace(tiny.run, root=root), **changes))
        (folder,) = root.glob("mad/benchmark-*")
        return results, folder

    serial, one = scored("serial", executor="serial")
    spread, other = scored("ray", executor="ray", workers=2)
    assert spread == serial
    assert one.name == other.name
    tables = sorted(path.name for path in one.glob("tables/*.csv"))
    assert {"scores.csv", "settings.csv", "runs.csv", "differences.csv"} <= set(tables)
    for name in tables:
        assert (other / "tables" / name).read_bytes() == (one / "tables" / name).read_bytes()
    runs = {path.name: read_json(path / "results.json")["values"]
            for path in (tmp_path / "ray").glob("mad/train-*")}  # fmt: skip
    assert len(runs) == serial["runs"] == 8
    for name, values in runs.items():
        assert values == read_json(tmp_path / "serial/mad" / name / "results.json")["values"]
    assert not ray.is_initialized()
