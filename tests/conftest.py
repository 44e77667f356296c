"""One thread per worker, no network, no optional package, and a scratch folder per test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENCE = ROOT / "tests" / "absence"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["USE_HUB_KERNELS"] = "0"
os.environ["TQDM_DISABLE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Install the absence before anything is imported, unless the extras themselves are tested."""
    if "extras" in (config.option.markexpr or "").replace("not extras", ""):
        return
    sys.path.insert(0, str(ABSENCE))
    import sitecustomize as absence

    if not hasattr(absence, "install"):  # the interpreter brings a sitecustomize of its own
        import importlib.util

        spec = importlib.util.spec_from_file_location("absence", ABSENCE / "sitecustomize.py")
        assert spec is not None
        assert spec.loader is not None
        absence = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(absence)
    absence.install()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: the repository importable, network and extras absent."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ABSENCE)])
    environment["FIVEFOLD_TESTS_ABSENCE"] = "1"
    environment.pop("COLUMNS", None)
    environment.update(changes)
    return environment


@pytest.fixture
def run_module(tmp_path: Path):
    """Run `python -m module arguments…` in a scratch folder; returns the finished process."""

    def run(module: str, *arguments: object, timeout: float = 240, **environment: str):
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=tmp_path,
            env=child_environment(**environment),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )

    return run
