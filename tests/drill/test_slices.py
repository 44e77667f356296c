"""Each method's own job, killed at random moments: the same command ends with equal results.

Row 2 (and 3: the second kill hits the resume) of the fault table; weights, results and metrics are
compared bit for bit, measured seconds left out.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, child_environment
from tests.drill.drill_job import fingerprint
from tests.test_scripts import TINY

SLICES = {
    "mad.train", "mad.compare", "sdm.reexpress", "lplr_q.run", "early_exit.train",
    "sycomode.consolidate",
}  # fmt: skip
JOBS = {config: module for config, module in TINY.items() if module in SLICES}


def start(module: str, config: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, "--config", str(config), "--root", str(folder),
         "--threads", "1"],
        env=child_environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(module: str, config: Path, folder: Path) -> float:
    begin = time.monotonic()
    process = start(module, config, folder)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 0, message.decode("utf-8", "replace")[-3000:]
    return time.monotonic() - begin


def fingerprints(folder: Path) -> dict[str, str]:
    runs = sorted(p.parent for p in folder.rglob("results.json"))
    assert runs
    return {str(r.relative_to(folder)): fingerprint(r) for r in runs}


def kill_and_compare(config: Path, folder: Path, kills: int, seed: int) -> None:
    module = JOBS[config]
    seconds = finish(module, config, folder / "whole")
    expected = fingerprints(folder / "whole")
    moments = np.random.default_rng(seed).uniform(0.15, 0.95, kills)
    done = 0
    for moment in moments:
        process = start(module, config, folder / "killed")
        try:
            process.wait(timeout=moment * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    finish(module, config, folder / "killed")
    assert fingerprints(folder / "killed") == expected
    assert done, "no kill hit the job"


def test_every_method_has_a_job():
    assert {m.split(".")[0] for m in JOBS.values()} == {
        "mad", "sdm", "lplr_q", "early_exit", "sycomode",
    }  # fmt: skip


@pytest.mark.parametrize("config", sorted(JOBS), ids=lambda p: f"{p.parent.name}.{p.name}")
def test_a_job_killed_twice_ends_as_if_nothing_had_happened(config, tmp_path):
    kill_and_compare(config, tmp_path, kills=2, seed=len(config.name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("config", sorted(JOBS), ids=lambda p: f"{p.parent.name}.{p.name}")
def test_a_job_killed_many_times_ends_as_if_nothing_had_happened(config, tmp_path, seed):
    kill_and_compare(config, tmp_path, kills=10, seed=seed)
