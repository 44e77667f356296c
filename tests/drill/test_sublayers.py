"""Compression of a whole model, killed at sublayers and blocks: the same command ends equal.

Rows 1, 2 and 3 of the fault table for the scripts whose unit of work is a file of their own, not a
unit of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.drill.jobs import Job
from tests.drill.warm import KILLED, Warm

MODULES = {
    ROOT / "configs" / "lplr_q" / "quantize_save.tiny.yaml": "lplr_q.quantize_save",
    ROOT / "configs" / "lplr_q" / "save_hessians.tiny.yaml": "lplr_q.save_hessians",
}
QUANTIZE, HESSIANS = MODULES


@dataclass(frozen=True)
class OwnJob(Job):
    """A job of one of these scripts."""

    def run(self, *more: str, **fault: Any) -> dict[str, Any]:
        arguments = ["--config", str(self.config), "--root", str(self.folder), "--threads", "1"]
        arguments += more
        module = MODULES[self.config]
        return self.warm.run(module, arguments, self.folder.with_name("cwd"), **fault)


def made(warm: Warm, config: Path, folder: Path, *more: str) -> tuple[dict[str, str], list[str]]:
    """Fingerprints of an undisturbed run, and the labels of its events."""
    job = OwnJob(warm, config, folder / "runs")
    done = job.run(*more)
    assert done["status"] == 0, done["stderr"]
    assert not done["network"]
    return job.fingerprints(), done["labels"]


def kill_and_finish(warm: Warm, config: Path, folder: Path, within: str, at: int, *more: str):
    job = OwnJob(warm, config, folder / "runs")
    done = job.run(*more, fault="kill", within=within, at=at)
    assert done["status"] == KILLED, (within, at, done["stderr"][-2000:])
    done = job.run(*more)
    assert done["status"] == 0, done["stderr"]
    assert not list(job.folder.rglob(".tmp*"))
    return job.fingerprints()


def places(labels: list[str], within: str, count: int) -> list[int]:
    """``count`` of the events under a label, the first and the last among them."""
    n = sum(label.startswith(within) for label in labels)
    assert n >= count, (within, n)
    return sorted({1 + i * (n - 1) // (count - 1) for i in range(count)})


@pytest.fixture(scope="module")
def compressed(warm, tmp_path_factory):
    return made(warm, QUANTIZE, tmp_path_factory.mktemp("whole"))


def test_compression_killed_in_three_sublayers(warm, compressed, tmp_path):
    expected, labels = compressed
    for at in places(labels, "progress compress", 3):
        found = kill_and_finish(warm, QUANTIZE, tmp_path / str(at), "progress compress", at)
        assert found == expected, at


@pytest.mark.slow
def test_compression_killed_anywhere(warm, compressed, tmp_path):
    expected, labels = compressed
    for within, count in (("progress compress", 24), ("progress hessians", 6), ("", 10)):
        for at in places(labels, within, count):
            found = kill_and_finish(warm, QUANTIZE, tmp_path / f"{within}{at}", within, at)
            assert found == expected, (within, at)


@pytest.mark.slow
def test_blocks_in_turns_killed_anywhere(warm, tmp_path):
    more = ("--inputs", "compressed", "--error-propagation", "0.5")
    expected, labels = made(warm, QUANTIZE, tmp_path / "whole", *more)
    for at in places(labels, "progress compress", 8):
        folder = tmp_path / str(at)
        found = kill_and_finish(warm, QUANTIZE, folder, "progress compress", at, *more)
        assert found == expected, at


def test_hessians_killed_between_and_inside_blocks(warm, tmp_path):
    expected, labels = made(warm, HESSIANS, tmp_path / "whole")
    for at in places(labels, "progress hessians", 3):
        found = kill_and_finish(warm, HESSIANS, tmp_path / str(at), "progress hessians", at)
        assert found == expected, at
