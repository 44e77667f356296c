"""One warm process for all trials of this session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import ROOT, child_environment
from tests.drill.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The process that forks once per trial."""
    process = Warm(child_environment(), ROOT)
    yield process
    process.close()
