"""Each method's own job, killed and stopped at random moments: the same command ends equal.

Rows 2, 3 (later kills hit the resume), 5 and 19 of the fault table, and of rows 1 and 6 the slow
part; weights, results and metrics are compared bit for bit, measured seconds left out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, child_environment
from tests.drill.jobs import JOBS, Job, fingerprints, stop
from tests.drill.warm import KILLED


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


# ---------------------------------------------------------------- warm trials


def by_job(function):
    return pytest.mark.parametrize(
        "config", sorted(JOBS), ids=lambda p: f"{p.parent.name}.{p.name}"
    )(function)


def test_every_method_has_a_job():
    assert {m.split(".")[0] for m in JOBS.values()} == {
        "mad", "sdm", "lplr_q", "early_exit", "sycomode",
    }  # fmt: skip


def kill_at_random(job: Job, whole, kills: int, generator: np.random.Generator) -> None:
    """Kill the job `kills` times, each time during the resume of the last; let it end, compare."""
    expected, seconds, _ = whole(job.config)
    hits = 0
    for _ in range(5 * kills):
        done = job.run(after=generator.uniform(0.02, 0.98) * seconds)
        if done["status"] == 0:  # quicker than the whole one was: begin again, aim earlier
            assert job.fingerprints() == expected
            seconds *= 0.7
            shutil.rmtree(job.folder)
            continue
        assert done["status"] == -signal.SIGKILL, done["stderr"]
        hits += 1
        if hits == kills:
            break
    assert hits == kills, f"only {hits} kills hit the job"
    done = job.run()
    assert done["status"] == 0, done["stderr"]
    assert job.fingerprints() == expected
    assert not list(job.folder.rglob(".tmp*"))


@by_job
def test_a_job_killed_four_times_ends_as_if_nothing_had_happened(config, warm, whole, tmp_path):
    job = Job(warm, config, tmp_path / "runs")
    kill_at_random(job, whole, 4, np.random.default_rng(len(config.name)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
@by_job
def test_a_job_killed_a_hundred_times_ends_the_same(config, warm, whole, tmp_path, seed):
    kill_at_random(Job(warm, config, tmp_path / "runs"), whole, 4, np.random.default_rng(seed))


# Where the signals come: the nth event of what the job is doing, in the order of the job. The next
# one comes in the resumed run.
SIGNALS = {
    "mad.train": [
        ("term", "step train", 3), ("int", "save", 20), ("int2", "step train", 5),
        ("term", "step train", 4), ("int", "report", 3), ("term", "finish", 4),
    ],
    "mad.compare": [
        ("int", "step train", 2), ("term", "save", 70), ("int2", "save", 40),
        ("term", "report", 9), ("int", "report", 30), ("term", "finish", 20),
    ],
    "early_exit.train": [
        ("term", "progress hidden states", 1), ("term", "step translators", 4),
        ("int2", "save", 30), ("int", "step gates", 5), ("int", "unit features_test", 1),
        ("term", "progress distributions", 1), ("int", "report", 8),
    ],
    "lplr_q.run": [
        ("int", "progress hessians", 2), ("term", "unit evaluate/16-bit", 1),
        ("int", "progress gptq", 2), ("int2", "progress compress", 40), ("int", "unit lplr", 2),
        ("term", "unit evaluate/lplr", 1), ("term", "report", 8),
    ],
    "sdm.reexpress": [
        ("int", "progress hidden", 1), ("term", "unit hidden", 1), ("term", "step train", 2),
        ("int2", "save", 12), ("int", "report", 5),
    ],
    "sycomode.consolidate": [
        ("int", "progress selfstudy", 3), ("term", "unit guard", 1),
        ("int2", "step lora", 3), ("term", "step memory", 2), ("int", "unit scores-memory", 1),
        ("term", "report", 5),
    ],
}  # fmt: skip


@by_job
def test_a_job_stopped_by_signals_in_every_part_ends_the_same(config, warm, whole, tmp_path):
    job = Job(warm, config, tmp_path / "runs")
    for fault, within, at in SIGNALS[JOBS[config]]:
        stop(job, fault, within, at)
    done = job.run()
    assert done["status"] == 0, done["stderr"]
    assert job.fingerprints() == whole(config)[0]


def events(warm, config: Path, folder: Path) -> list[str]:
    """What an undisturbed job is doing at each of its events.

    Not those of `whole`: the first job of a module in the warm process imports more than the later
    ones, and some imports write.
    """
    done = Job(warm, config, folder / "undisturbed" / "runs").run()
    assert done["status"] == 0, done["stderr"]
    return done["labels"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["term", "int", "int2"])
@by_job
def test_a_job_stopped_at_twenty_places_ends_the_same(config, warm, whole, tmp_path, fault):
    expected, labels = whole(config)[0], events(warm, config, tmp_path)
    for at in np.linspace(1, len(labels), 20).round().astype(int).tolist():
        job = Job(warm, config, tmp_path / str(at) / "runs")
        stop(job, fault, "", at)
        assert job.run()["status"] == 0
        assert job.fingerprints() == expected, f"{fault} at event {at}: {labels[at - 1]}"
        shutil.rmtree(job.folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "full"])
@by_job
def test_a_job_struck_at_its_file_events_ends_the_same(config, warm, whole, tmp_path, fault):
    """Rows 1 and 6 on each method: killed, or the disk full, at 80 events from first to last."""
    expected, labels = whole(config)[0], events(warm, config, tmp_path)
    for at in np.linspace(1, len(labels), 80).round().astype(int).tolist():
        job = Job(warm, config, tmp_path / str(at) / "runs")
        done = job.run(fault=fault, at=at)
        where = f"{fault} at event {at} ({labels[at - 1]}): {done['stderr'][-1500:]}"
        assert done["status"] in ((KILLED,) if fault == "kill" else (0, 2)), where
        if done["status"] == 2:
            assert "Traceback" not in done["stderr"], where
        done = job.run()
        assert done["status"] == 0, where + done["stderr"]
        assert job.fingerprints() == expected, where
        assert not list(job.folder.rglob(".tmp*")), where
        shutil.rmtree(job.folder)


# ---------------------------------------------------------------- cold: real processes


def kill_and_compare(config: Path, folder: Path, kills: int, seed: int) -> None:
    """The same with `python -m …`, so that kills also hit the imports; the last is a SIGTERM."""
    module = JOBS[config]
    seconds = finish(module, config, folder / "whole")
    expected = fingerprints(folder / "whole")
    moments = np.random.default_rng(seed).uniform(0.0, 0.95, kills + 1)
    for i, moment in enumerate(moments):
        number = signal.SIGTERM if i == kills else signal.SIGKILL
        while not struck(module, config, folder / "killed", moment * seconds, number):
            seconds *= 0.7  # the job was faster this time: anew, and earlier
            shutil.rmtree(folder / "killed")
    finish(module, config, folder / "killed")
    assert fingerprints(folder / "killed") == expected


def struck(module: str, config: Path, folder: Path, seconds: float, number: int) -> bool:
    """Send a signal to the job after so many seconds; False if it had ended before."""
    process = start(module, config, folder)
    hit = False
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        hit = True
    _, message = process.communicate(timeout=60)
    # 143: stopped by us after saving; -SIGTERM: Python itself was still starting
    assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
    if number == signal.SIGTERM:
        assert b"Traceback" not in message, message.decode("utf-8", "replace")[-2000:]
    return hit


COLD = [
    pytest.param(c, marks=[] if m == "mad.train" else pytest.mark.slow, id=m)
    for c, m in sorted(JOBS.items())
]


@pytest.mark.parametrize("config", COLD)
def test_a_process_killed_from_import_to_report_ends_the_same(config, tmp_path):
    kill_and_compare(config, tmp_path, kills=2, seed=len(config.name))


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
