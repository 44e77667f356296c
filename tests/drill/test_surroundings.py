"""Odd paths, locales, terminals and a missing working folder change nothing.

Rows 29 and 30 of the fault table.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import child_environment
from tests.drill import drill_job as job

JOB = str(Path(job.__file__))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    done = call(folder)
    assert done.returncode == 0, done.stderr
    return fingerprint(folder)


def call(folder: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [sys.executable, JOB, "--root", str(folder), "--threads", "1", *arguments],
        env=child_environment(**environment), cwd=folder, capture_output=True, check=False,
        timeout=120,
    )  # fmt: skip


def fingerprint(folder: Path) -> str:
    (run,) = folder.glob("drill/job-*")
    return job.fingerprint(run)


slow = pytest.mark.slow
NAMES = [
    "a b'c\"d é e\u0301 字 %$;",
    *(pytest.param(n, marks=slow) for n in ("with space", "é", "e\u0301", "字", "x" * 200)),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_works_under_any_path(tmp_path, expected, name):
    folder = tmp_path / name
    folder.mkdir()
    done = call(folder)
    assert done.returncode == 0, done.stderr
    assert fingerprint(folder) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "20", "TERM": "dumb"},
        {"NO_COLOR": "1", "TERM": "xterm-256color"},
    ],
    ids=["C locale", "narrow and dumb", "no colour"],
)
def test_a_run_works_in_any_locale_and_terminal(tmp_path, expected, environment):
    done = call(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr
    assert fingerprint(tmp_path) == expected
    for path in tmp_path.rglob("log.txt"):
        assert "█" not in path.read_text(encoding="utf-8")
    assert call(tmp_path, "--help", **environment).returncode == 0


def test_a_closed_output_ends_quietly_and_the_run_is_whole(tmp_path, expected):
    process = subprocess.Popen(
        [sys.executable, JOB, "--root", str(tmp_path), "--threads", "1"],
        env=child_environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()  # as `| head -0` does
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert fingerprint(tmp_path) == expected


def test_a_working_folder_that_disappears_does_not_matter(tmp_path):
    """(torch itself cannot be imported without one, so it goes after the first checkpoint.)"""
    gone, root = tmp_path / "gone", tmp_path / "root"
    gone.mkdir()
    process = subprocess.Popen(
        [sys.executable, JOB, "--root", str(root), "--threads", "1", "--pause", "0.2"],
        env=child_environment(), cwd=gone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not list(root.glob("drill/job-*/checkpoints/first/step_00000000")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    gone.rmdir()
    _, message = process.communicate(timeout=120)
    assert process.returncode == 0, message
    assert fingerprint(root)


def test_a_root_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    done = call(tmp_path, "--root", str(tmp_path / "file" / "runs"))
    assert done.returncode == 2
    assert b"choose another folder with --root" in done.stderr
    assert b"Traceback" not in done.stderr
