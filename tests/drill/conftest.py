"""One warm process for all trials of this session."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import ROOT, child_environment
from tests.drill.jobs import Job
from tests.drill.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The process that forks once per trial."""
    process = Warm(child_environment(), ROOT)
    yield process
    process.close()


@pytest.fixture(scope="session")
def whole(warm, tmp_path_factory):
    """What a job gives when nothing happens: (fingerprints, seconds, labels of its events).

    Made once for all test workers.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def of(config: Path) -> tuple[dict[str, str], float, list[str]]:
        known = shared / f"whole-{config.parent.name}-{config.stem}.json"
        with FileLock(known.with_suffix(".lock")):
            if not known.exists():
                job = Job(warm, config, tmp_path_factory.mktemp("whole") / "runs")
                done = job.run()
                assert done["status"] == 0, done["stderr"]
                assert not done["network"], done["network"]
                found = [job.fingerprints(), done["seconds"], done["labels"]]
                known.write_text(json.dumps(found), encoding="utf-8")
            return tuple(json.loads(known.read_text(encoding="utf-8")))

    return of
