"""Damage done to a run's files between two sessions is detected, never resumed from in silence.

Rows 11, 12, 13 and 14 of the fault table.
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

from tests.conftest import child_environment
from tests.drill import drill_job as job
from workbench import storage
from workbench.errors import CheckpointError, ConfigError, Interrupted
from workbench.run import Run, RunOptions

HERE = Path(__file__).parent


def experiment(folder: Path, **changes):
    return job.Experiment(run=RunOptions(root=folder, threads=1), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run; its copies without results.json are runs to be continued."""
    folder = tmp_path_factory.mktemp("finished")
    job.main(experiment(folder))
    (found,) = (folder / "drill").glob("job-*")
    return found


def copy_unfinished(finished: Path, folder: Path) -> Path:
    target = folder / "drill" / finished.name
    shutil.rmtree(folder / "drill", ignore_errors=True)
    shutil.copytree(finished, target)
    (target / "results.json").unlink()
    return target


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints" / "second").iterdir())[-1]


def test_truncation_of_any_checkpoint_file_is_reported_and_the_previous_one_used(
    finished, tmp_path
):
    digest = job.fingerprint(finished)
    names = [p.name for p in newest_checkpoint(finished).iterdir()]
    assert sorted(names) == ["tensors.safetensors", "tree.json"]
    for name in names:
        size = (newest_checkpoint(finished) / name).stat().st_size
        data = (newest_checkpoint(finished) / name).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if name == "tensors.safetensors" else 65
        for cut in sorted({0, 7, 8, header - 1, size // 2, size - 1}):
            run = copy_unfinished(finished, tmp_path)
            os.truncate(newest_checkpoint(run) / name, cut)
            job.main(experiment(tmp_path))
            assert job.fingerprint(run) == digest
            assert "checkpoint skipped" in (run / "log.txt").read_text(encoding="utf-8")


def test_every_single_bit_flip_in_a_checkpoint_is_detected(finished):
    checkpoint = newest_checkpoint(finished)
    generator = np.random.default_rng(0)
    flips = 0
    for name in ("tensors.safetensors", "tree.json"):
        file = checkpoint / name
        good = file.read_bytes()
        for position in generator.integers(0, len(good) * 8, 100):
            bad = bytearray(good)
            bad[position // 8] ^= 1 << (position % 8)
            file.write_bytes(bad)
            with pytest.raises(CheckpointError):
                storage.load_tree(checkpoint)
            flips += 1
        file.write_bytes(good)
    assert flips == 200
    storage.load_tree(checkpoint)


def test_files_of_two_checkpoints_or_two_runs_cannot_be_mixed(finished, tmp_path):
    digest = job.fingerprint(finished)
    run = copy_unfinished(finished, tmp_path)
    older, newer = sorted((run / "checkpoints" / "second").iterdir())
    shutil.copy(older / "tensors.safetensors", newer / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="altered|bytes"):
        storage.load_tree(newer)

    run = copy_unfinished(finished, tmp_path)
    older, newer = sorted((run / "checkpoints" / "second").iterdir())
    shutil.rmtree(newer)
    shutil.copytree(older, newer)  # a whole checkpoint under another step's name
    job.main(experiment(tmp_path))
    assert job.fingerprint(run) == digest
    assert "step is 2, expected 4" in (run / "log.txt").read_text(encoding="utf-8")

    run = copy_unfinished(finished, tmp_path)
    other = tmp_path / "other"
    job.main(experiment(other, seed=1))
    (foreign,) = (other / "drill").glob("job-*")
    shutil.rmtree(newest_checkpoint(run))
    shutil.copytree(newest_checkpoint(foreign), run / "checkpoints" / "second" / "step_00000004")
    job.main(experiment(tmp_path))
    assert job.fingerprint(run) == digest


@pytest.mark.parametrize("missing", ["tensors.safetensors", "tree.json"])
def test_a_missing_file_falls_back_to_the_previous_checkpoint(finished, tmp_path, missing):
    run = copy_unfinished(finished, tmp_path)
    (newest_checkpoint(run) / missing).unlink()
    job.main(experiment(tmp_path))
    assert job.fingerprint(run) == job.fingerprint(finished)


def test_a_checkpoint_without_its_random_states_is_no_checkpoint(finished, tmp_path):
    run = copy_unfinished(finished, tmp_path)
    path = newest_checkpoint(run)
    header = storage.read_header(path)
    tree = storage.load_tree(path)
    del tree["random"]["torch"]
    keep = {k: header[k] for k in ("run", "phase", "step", "metrics_bytes", "seconds")}
    storage.save_tree(path, tree, keep)
    with pytest.raises(CheckpointError, match="random states"):
        job.main(experiment(tmp_path))


def test_a_damaged_unit_is_computed_again(finished, tmp_path):
    run = copy_unfinished(finished, tmp_path)
    shutil.rmtree(run / "checkpoints")
    file = run / "units" / "data" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    job.main(experiment(tmp_path))
    assert job.fingerprint(run) == job.fingerprint(finished)
    assert "unit computed again" in (run / "log.txt").read_text(encoding="utf-8")


def test_a_torn_tail_of_the_metrics_is_cut_back(finished, tmp_path):
    run = copy_unfinished(finished, tmp_path)
    with open(run / "metrics.jsonl", "ab") as handle:
        handle.write(b'{"step": 7, "pha')
    job.main(experiment(tmp_path))
    assert job.fingerprint(run) == job.fingerprint(finished)


def test_damaged_results_are_put_aside_and_made_again(finished, tmp_path):
    run = copy_unfinished(finished, tmp_path)
    (run / "results.json").write_text('{"values": {"err', encoding="utf-8")
    job.main(experiment(tmp_path))
    assert job.fingerprint(run) == job.fingerprint(finished)
    assert list(run.glob("results.damaged-*.json"))


# ---------------------------------------------------------------- two processes, signals


def start_job(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(HERE / "drill_job.py"), "--root", str(folder), "--threads", "1",
         *arguments],
        env=child_environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_second_process_is_told_who_holds_the_run_and_a_killed_one_never_blocks(tmp_path):
    first = start_job(tmp_path, "--pause", "0.2", "--steps", "200")
    wait_for(lambda: list(tmp_path.glob("drill/job-*/checkpoints/first/step_00000002")))
    second = start_job(tmp_path, "--pause", "0.2", "--steps", "200")
    _, message = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"process {first.pid} on " in message
    assert "Traceback" not in message
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start_job(tmp_path, "--pause", "0.2", "--steps", "200")
    (run,) = tmp_path.glob("drill/job-*")
    wait_for(lambda: "continuing after step" in (run / "log.txt").read_text(encoding="utf-8"))
    third.send_signal(signal.SIGTERM)
    _, message = third.communicate(timeout=10)
    assert third.returncode == 143
    assert "saved step" in message
    assert "run the same command to continue" in message
    assert "Traceback" not in message


def test_ctrl_c_ends_with_130_and_twice_stops_at_once(tmp_path):
    process = start_job(tmp_path, "--pause", "0.1", "--steps", "500")
    wait_for(lambda: list(tmp_path.glob("drill/job-*/checkpoints/first/step_00000002")))
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "saved step" in message

    process = start_job(tmp_path, "--pause", "15", "--steps", "500")
    wait_for(lambda: list(tmp_path.glob("drill/job-*/checkpoints/first/step_00000000")))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in message


def test_an_interrupt_outside_of_the_loop_is_honoured_too(tmp_path):
    with (
        pytest.raises(Interrupted, match="same command"),
        Run.open("drill.job", experiment(tmp_path)) as run,
    ):
        for item in run.progress(range(5)):
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            assert item < 3


def test_settings_that_differ_under_one_name_are_refused_with_the_difference(tmp_path):
    options = RunOptions(root=tmp_path, name="mine", threads=1)
    job.main(job.Experiment(run=options))
    with pytest.raises(ConfigError, match="steps: 4 → 8"):
        job.main(job.Experiment(steps=8, run=options))
    fresh = RunOptions(root=tmp_path, name="mine", threads=1, fresh=True)
    job.main(job.Experiment(steps=8, run=fresh))
    assert len(list((tmp_path / "drill").glob("mine.old-*"))) == 1
