"""One sweep started four times at once: no unit is computed twice, everyone gets all results.

Row 14 of the fault table; that two processes never share one run is in `test_crash_points`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import child_environment
from workbench import record, sweep
from workbench.run import Run, RunOptions

UNITS = 6


@dataclass(frozen=True)
class Experiment:
    """One unit; it writes itself into a journal when it is really computed."""

    number: int = 0
    pause: float = 0.03
    run: RunOptions = RunOptions()


def unit(experiment: Experiment) -> dict:
    with Run.open("drill.shared", experiment) as run:
        if run.finished:
            return run.results
        line = f"{experiment.number} {os.getpid()}\n".encode()
        journal = os.open(run.options.root / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(journal, line)
        os.close(journal)
        time.sleep(experiment.pause)
        return run.finish({"square": experiment.number**2})


def units(root: Path, pause: float) -> list[Experiment]:
    options = RunOptions(root=root, threads=1)
    return [Experiment(number=n, pause=pause, run=options) for n in range(UNITS)]


def start_one(root: Path, answer: Path, pause: float) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            record._git = lambda *arguments: None
            results = sweep.run_all(unit, units(root, pause))
            answer.write_text(json.dumps(results), encoding="utf-8")
            status = 0
        except BaseException:
            answer.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(status)
    return child


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def journal(root: Path) -> Counter:
    lines = (root / "journal").read_text(encoding="utf-8").splitlines()
    return Counter(int(line.split()[0]) for line in lines)


SERIAL = json.dumps([{"square": n**2} for n in range(UNITS)])


@pytest.mark.parametrize("trial", range(10))
def test_four_workers_on_one_sweep_share_it(tmp_path, trial):
    answers = [tmp_path / f"answer-{i}" for i in range(4)]
    children = [start_one(tmp_path, answer, 0.01 * (1 + trial)) for answer in answers]
    ends = [end_of(child) for child in children]
    texts = [answer.read_text(encoding="utf-8") for answer in answers]
    assert ends == [0] * 4, texts
    assert texts == [SERIAL] * 4
    assert journal(tmp_path) == Counter(range(UNITS)), "a unit was computed twice"
    at_work = {line.split()[1] for line in (tmp_path / "journal").read_text("utf-8").splitlines()}
    assert len(at_work) > 1, "one did it all: nothing was shared"


@pytest.mark.parametrize("trial", range(3))
def test_one_of_four_killed_costs_its_unit_only_and_blocks_no_one(tmp_path, trial):
    answers = [tmp_path / f"answer-{i}" for i in range(4)]
    children = [start_one(tmp_path, answer, 0.3) for answer in answers]
    end = time.monotonic() + 60
    while not (tmp_path / "journal").exists() or len(journal(tmp_path)) < 2 + trial:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(children[0], signal.SIGKILL)
    ends = [end_of(child) for child in children]
    assert ends[1:] == [0] * 3
    assert [answer.read_text(encoding="utf-8") for answer in answers[1:]] == [SERIAL] * 3
    assert sum(journal(tmp_path).values()) <= UNITS + 1
    assert end_of(start_one(tmp_path, answers[0], 0.3)) == 0
    assert answers[0].read_text(encoding="utf-8") == SERIAL
    assert sum(journal(tmp_path).values()) <= UNITS + 1


def test_two_process_pools_share_a_sweep_too(tmp_path):
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from workbench.sweep import run_all\n"
        "import tests.drill.test_shared_sweep as here\n"
        "if __name__ == '__main__':\n"
        f"    units = here.units(Path({str(tmp_path)!r}), 0.2)\n"
        "    results = run_all(here.unit, units, executor='process', workers=2)\n"
        "    sys.stdout.write(json.dumps(results))\n"
    )
    script = tmp_path / "sweep_in_processes.py"
    script.write_text(code, encoding="utf-8")
    both = [
        subprocess.Popen(
            [sys.executable, str(script)], env=child_environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in both:
        answer, message = process.communicate(timeout=120)
        assert process.returncode == 0, message
        assert answer == SERIAL
    assert journal(tmp_path) == Counter(range(UNITS))
