"""The benchmark for GPUs, rehearsed on the CPU."""

import importlib.util
import math

import pytest
import torch

from tests.conftest import ROOT

FOLDER = ROOT / "benchmarks" / "lplr_q"
REHEARSAL = ("--device", "cpu", "--repeats", "1", "--size")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs_and_measures_something(gpu):
    words = ["--rank", "8", "--rounds", "1", "--ranks", "4", "128", *REHEARSAL, "64"]
    table = FOLDER / "gpu.csv"
    before = table.read_bytes() if table.is_file() else None
    rows = gpu.main(words)
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    found = {(row["item"], row["shape"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    for (item, _), value in found.items():
        assert math.isfinite(value), item
        if "L R adds" in item or "memory" in item:
            continue
        assert value > 0, item
        if "error" in item:
            assert value < 0.5, item
    # a decoder layer is as long as its matrices
    parts = [v for (item, _), v in found.items() if item.endswith("rounds") and ":" in item]
    assert len(parts) == 4
    assert found["decoder layer, rank 8, 1 rounds", "64 wide, 176 inside"] == pytest.approx(
        sum(parts)
    )
    # codes of 2 bits are a quarter of a byte each
    speed = found["copy", ""] * 1e9
    took, share = (v for (item, _), v in found.items() if item.startswith("e8p 2 bits"))
    assert share * took / 1000 * speed == pytest.approx(64 * 64 / 4)
    assert not any("rank 128" in item for item, _ in found)  # wider than the matrix
    assert (table.read_bytes() if table.is_file() else None) == before


def test_targets_stand_beside_what_they_ask_for(gpu):
    rows = gpu.main(["--only", "rounding", *REHEARSAL, "16"])
    targets = {row["item"]: row["target"] for row in rows if row["target"]}
    assert targets == {"LDLQ, E8P 2 bits": "<= 3"}


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "no CUDA device"), (["--device", "cpu", "--size", "12"], "multiple of 8")],
)
def test_without_a_device_or_with_an_odd_size_it_ends(gpu, monkeypatch, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_on_a_device_graphs_are_replayed(gpu):
    clock = gpu.Clock(torch.device("cuda"), 2)
    with torch.inference_mode():
        rows = list(gpu.layer(clock, 512, [32]))
    assert any(row["item"].endswith("graph") for row in rows)
