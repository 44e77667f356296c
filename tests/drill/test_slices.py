"""Each method's own job, killed and stopped at random moments: the same command ends equal.

Rows 2, 3 (later kills hit the resume) and 5 (SIGTERM) of the fault table; weights, results and
metrics are compared bit for bit, measured seconds left out.
"""

from __future__ import annotations

import os
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
    """Kill the job `kills` times, ask it once to stop, let it end, compare with the whole run."""
    module = JOBS[config]
    seconds = finish(module, config, folder / "whole")
    expected = fingerprints(folder / "whole")
    moments = np.random.default_rng(seed).uniform(0.3, 0.95, kills + 1)
    done = 0
    for i, moment in enumerate(moments):
        process = start(module, config, folder / "killed")
        number = signal.SIGTERM if i == kills else signal.SIGKILL
        try:
            process.wait(timeout=moment * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            done += 1
        _, message = process.communicate(timeout=60)
        # 143: stopped by us after saving; -SIGTERM: it came before the run was opened
        assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
        if number == signal.SIGTERM:
            assert b"Traceback" not in message, message.decode("utf-8", "replace")[-2000:]
    finish(module, config, folder / "killed")
    assert fingerprints(folder / "killed") == expected
    assert done, "no signal hit the job"


def test_every_method_has_a_job():
    assert {m.split(".")[0] for m in JOBS.values()} == {
        "mad", "sdm", "lplr_q", "early_exit", "sycomode",
    }  # fmt: skip


@pytest.mark.parametrize("config", sorted(JOBS), ids=lambda p: f"{p.parent.name}.{p.name}")
def test_a_job_killed_and_stopped_ends_as_if_nothing_had_happened(config, tmp_path):
    kill_and_compare(config, tmp_path, kills=3, seed=len(config.name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("config", sorted(JOBS), ids=lambda p: f"{p.parent.name}.{p.name}")
def test_a_job_killed_many_times_ends_as_if_nothing_had_happened(config, tmp_path, seed):
    kill_and_compare(config, tmp_path, kills=10, seed=seed)


def test_workers_of_a_killed_sweep_end_with_it(tmp_path):
    """Left alone they would hold the locks of their runs."""
    code = (
        "import os, sys, time\n"
        "from workbench.sweep import run_all\n"
        "import tests.drill.test_slices as here\n"
        "if __name__ == '__main__':\n"
        f"    units = [{str(tmp_path)!r}] * 2\n"
        "    run_all(here.sleep_and_tell, units, executor='process', workers=2)\n"
    )
    script = tmp_path / "sweep_to_kill.py"
    script.write_text(code, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], env=child_environment(), cwd=tmp_path)
    end = time.monotonic() + 90
    while len(list(tmp_path.glob("worker-*"))) < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for file in tmp_path.glob("worker-*"):
        number = int(file.name.split("-")[1])
        while _alive(number):
            assert time.monotonic() < end, f"worker {number} outlived its sweep"
            time.sleep(0.1)


def sleep_and_tell(folder: str) -> dict:
    """A unit that says which process it runs in and then takes long."""
    (Path(folder) / f"worker-{os.getpid()}").touch()
    time.sleep(300)
    return {}


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/stat")
    return not (
        status.is_file() and status.read_text(encoding="utf-8").split(")")[1].split()[0] == "Z"
    )
