"""Kill, tear, fill the disk at every file event of a run: the same command ends with equal results.

Rows 1, 3, 6 and 27 of the fault table. Each trial is a fork of this process with a counter on the
events "open for writing", rename, remove, mkdir, rmdir, fsync and on the native tensor writer.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest

from tests.drill import drill_job as job
from workbench import record, storage
from workbench.errors import USER_ERRORS
from workbench.run import RunOptions

WRITING = os.O_WRONLY | os.O_RDWR
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
KILLED, USER_ERROR, CRASHED = 77, 2, 1


def experiment(folder: Path, **changes):
    return job.Experiment(run=RunOptions(root=folder, threads=1), **changes)


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "drill").glob("job-*")
    return found


class Faults:
    """Counts file events and strikes at the k-th one (0 = never)."""

    def __init__(self, strike_at: int, fault: str):
        self.count, self.strike_at, self.fault, self.active = 0, strike_at, fault, True

    def event(self, path: str = "") -> None:
        if not self.active:
            return
        self.count += 1
        if self.count == self.strike_at:
            if self.fault == "kill":
                os._exit(KILLED)
            self.active = False
            raise OSError(errno.ENOSPC, "No space left on device", path)

    def install(self) -> None:
        import safetensors.torch as native

        real_save = native.save_file

        def fsync(descriptor):  # a killed process loses nothing that the kernel has: no real sync
            self.event()

        def save_file(tensors, filename, metadata=None):
            self.event(filename)
            real_save(tensors, filename, metadata=metadata)
            if self.active and self.fault == "kill" and self.count + 1 == self.strike_at:
                size = os.path.getsize(filename)
                os.truncate(filename, size // 2)
            self.event(filename)

        os.fsync = fsync
        native.save_file = save_file

        def hook(name, arguments):
            if name in EVENTS or (
                name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
            ):
                self.event(str(arguments[0]))

        sys.addaudithook(hook)


def in_a_fork(folder: Path, strike_at: int = 0, fault: str = "kill", **changes) -> tuple[int, int]:
    """Run the job in a child; its exit status and the number of events it saw."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = CRASHED
        try:
            os.close(reader)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            record._git = lambda *arguments: None
            faults = Faults(strike_at, fault)
            faults.install()
            try:
                job.main(experiment(folder, **changes))
                status = 0
            except USER_ERRORS:
                status = USER_ERROR
            faults.active = False
            os.write(writer, str(faults.count).encode())
        except BaseException:
            with open(folder / "crash.txt", "w", encoding="utf-8") as handle:
                traceback.print_exc(file=handle)
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    count = os.read(reader, 32)
    os.close(reader)
    crash = folder / "crash.txt"
    assert not crash.exists(), crash.read_text(encoding="utf-8")
    return os.waitstatus_to_exitcode(status), int(count or 0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[str, int]:
    job.main(experiment(tmp_path_factory.mktemp("warm")))  # imports, once for all forks
    folder = tmp_path_factory.mktemp("reference")
    status, events = in_a_fork(folder)
    assert status == 0
    return job.fingerprint(run_folder(folder)), events


def test_the_uninterrupted_job_is_deterministic(tmp_path, reference):
    assert in_a_fork(tmp_path)[0] == 0
    assert job.fingerprint(run_folder(tmp_path)) == reference[0]


@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_file_event_the_run_resumes_to_equal_results(tmp_path, reference, part):
    digest, events = reference
    assert events > 60
    for strike in range(1 + part, events + 1, 4):
        folder = tmp_path / str(strike)
        folder.mkdir()
        status, _ = in_a_fork(folder, strike)
        assert status == KILLED, f"event {strike}"
        assert in_a_fork(folder)[0] == 0, f"event {strike}"
        assert job.fingerprint(run_folder(folder)) == digest, f"event {strike}"
        assert not list(folder.rglob(".tmp*")), f"event {strike} left litter"
        shutil.rmtree(folder)


@pytest.mark.parametrize("chain", range(3))
def test_killed_again_and_again_the_run_still_ends(tmp_path, reference, chain):
    """Ten kills in a row, each a few events after the resume: the saved step never falls."""
    digest, events = reference
    reached = -1
    for kill in range(10):
        status, _ = in_a_fork(tmp_path, strike_at=events // 4 + kill + 7 * chain)
        found = list((tmp_path / "drill").glob("job-*/checkpoints/*/step_*"))
        complete = [p for p in found if (p / storage.MANIFEST).is_file()]
        step = max(
            (int(p.name[5:]) + 100 * (p.parent.name == "second") for p in complete), default=-1
        )
        assert step >= reached
        reached = step
        if status == 0:
            break
        assert status == KILLED
    assert reached > 0
    assert in_a_fork(tmp_path)[0] == 0
    assert job.fingerprint(run_folder(tmp_path)) == digest


def test_a_full_disk_stops_with_a_message_and_costs_nothing(tmp_path, reference):
    digest, events = reference
    for strike in range(8, events + 1, 5):
        folder = tmp_path / str(strike)
        folder.mkdir()
        status, _ = in_a_fork(folder, strike, fault="full")
        assert status in (0, USER_ERROR), f"event {strike}: {status}"
        assert in_a_fork(folder)[0] == 0
        assert job.fingerprint(run_folder(folder)) == digest, f"event {strike}"
        shutil.rmtree(folder)


def test_a_non_finite_loss_stops_before_the_update_and_saves_the_batch(tmp_path):
    status, _ = in_a_fork(tmp_path, diverge_at=3)
    assert status == USER_ERROR
    folder = run_folder(tmp_path)
    batch = storage.load_tree(folder / "diverged_step_00000003")
    assert batch["batch"]["x"].shape == (8, 4)
    assert not (folder / "results.json").exists()
    newest = sorted((folder / "checkpoints" / "second").iterdir())[-1]
    tree = storage.load_tree(newest)
    assert tree["objects"]["model"]["weight"].isfinite().all()
    assert newest.name == "step_00000002"


@pytest.mark.parametrize("trial", range(10))
def test_of_two_processes_started_together_one_works(tmp_path, reference, trial):
    """Row 14: the other is refused (or comes late and finds the finished run)."""
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = CRASHED
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                record._git = lambda *arguments: None
                job.main(experiment(tmp_path))
                status = 0
            except USER_ERRORS:
                status = USER_ERROR
            finally:
                os._exit(status)
        children.append(child)
    ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ends in ([0, USER_ERROR], [0, 0])
    assert job.fingerprint(run_folder(tmp_path)) == reference[0]
