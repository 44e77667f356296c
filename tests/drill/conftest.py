"""One warm process for all trials of this session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
    """What a job gives when nothing happens: (fingerprints, seconds, labels of its events)."""
    known: dict[Path, tuple[dict[str, str], float, list[str]]] = {}

    def of(config: Path):
        if config not in known:
            job = Job(warm, config, tmp_path_factory.mktemp("whole") / "runs")
            done = job.run()
            assert done["status"] == 0, done["stderr"]
            assert not done["network"], done["network"]
            known[config] = job.fingerprints(), done["seconds"], done["labels"]
        return known[config]

    return of
