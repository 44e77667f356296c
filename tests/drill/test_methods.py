"""Each method's job where packages are broken, the tracker fails, the disk is full, paths are odd.

Rows 6, 18, 19, 21 and 29 of the fault table; what is counted is equal results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.absence.sitecustomize import EXTRAS
from tests.conftest import ROOT, child_environment
from tests.drill.jobs import JOBS, Job
from tests.drill.warm import Warm

CONFIG = {module: config for config, module in JOBS.items()}
QUICK = ("mad.train", "lplr_q.run", "early_exit.train")
METHODS = [
    pytest.param(module, marks=[] if module in QUICK else pytest.mark.slow)
    for module in sorted(CONFIG)
]


def expect_equal(job: Job, whole, *more: str, **fault) -> dict:
    done = job.run(*more, **fault)
    assert done["status"] == 0, done["stderr"]
    assert job.fingerprints() == whole(job.config)[0]
    return done


# ---------------------------------------------------------------- packages (row 18)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, str]:
    """An environment in which all twelve optional packages are installed and none can be used."""
    folder = tmp_path_factory.mktemp("broken")
    for name in EXTRAS:
        package = folder / name
        package.mkdir()
        code = f"raise OSError('lib{name}.so: cannot open shared object file')\n"
        (package / "__init__.py").write_text(code, encoding="utf-8")
        facts = folder / f"{name}-99.0.dist-info"
        facts.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n"
        (facts / "METADATA").write_text(text, encoding="utf-8")
        (facts / "RECORD").write_text(f"{name}/__init__.py,,\n", encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT)])
    return child_environment(PYTHONPATH=path, FIVEFOLD_TESTS_ABSENCE="0")


OF_TRANSFORMERS = ("hqq",)
"""What transformers imports by itself when it is installed: broken, it breaks transformers."""


@pytest.fixture(scope="module")
def warm_among_broken(broken) -> Iterator[Warm]:
    for name in OF_TRANSFORMERS:
        folder = Path(broken["PYTHONPATH"].split(os.pathsep)[0])
        shutil.rmtree(folder / name)
        shutil.rmtree(folder / f"{name}-99.0.dist-info")
    process = Warm(broken, ROOT)
    yield process
    process.close()


def test_every_optional_package_hidden_or_broken_is_named_with_its_remedy(broken):
    assert len(EXTRAS) == 13
    code = (
        "import sys\n"
        "from workbench.engines import need\n"
        "from workbench.errors import MissingExtra\n"
        "for name in sys.argv[2:]:\n"
        "    if sys.argv[1] == 'hidden':\n"
        "        sys.modules[name] = None\n"
        "    try:\n"
        "        need(name)\n"
        "    except MissingExtra as error:\n"
        "        print(name, error)\n"
        "    else:\n"
        "        sys.exit(f'{name} was taken for a working package')\n"
    )
    for state in ("hidden", "broken"):
        done = subprocess.run(
            [sys.executable, "-c", code, state, *EXTRAS], env=broken, capture_output=True,
            text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == list(EXTRAS)
        assert all("pip install" in line for line in lines), done.stdout


@pytest.mark.parametrize("module", METHODS)
def test_broken_packages_change_nothing(module, warm_among_broken, whole, tmp_path):
    expect_equal(Job(warm_among_broken, CONFIG[module], tmp_path / "runs"), whole)


# ---------------------------------------------------------------- network (row 19)


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(
    "module",
    [
        pytest.param(m, marks=[] if m == "early_exit.train" else pytest.mark.slow)
        for m in sorted(CONFIG)
    ],
)
def test_no_system_call_looks_for_the_network(module, tmp_path):
    trace = tmp_path / "trace"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(trace), sys.executable,
         "-m", module, "--config", str(CONFIG[module]), "--root", str(tmp_path / "runs")],
        env=child_environment(FIVEFOLD_TESTS_ABSENCE="0"), cwd=ROOT, capture_output=True,
        check=False, timeout=300,
    )  # fmt: skip
    if b"ptrace" in done.stderr:
        pytest.skip("ptrace is not allowed here")
    assert done.returncode == 0, done.stderr[-2000:]
    calls = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    assert not [line for line in calls if "AF_INET" in line]


# ---------------------------------------------------------------- tracker (row 21)


@pytest.mark.parametrize(
    ("bad", "how"), [("init", "raises"), ("log", "raises"), ("log", "hangs"), ("finish", "hangs")]
)
@pytest.mark.parametrize("module", ["mad.train", "early_exit.train"])
def test_a_broken_tracker_costs_a_warning_and_two_seconds(module, bad, how, warm, whole, tmp_path):
    job = Job(warm, CONFIG[module], tmp_path / "runs")
    poison = ("tests.drill.poison:tracker", [bad, how])
    done = expect_equal(job, whole, "--wandb", prepare=(poison,))
    assert done["seconds"] <= 2.5 * whole(job.config)[1] + 4  # 2 s, and a busy machine
    assert "Traceback" not in done["stderr"]
    assert done["stderr"].count("metrics.jsonl has everything") == 1, done["stderr"]


# ---------------------------------------------------------------- disk (row 6)


@pytest.mark.parametrize("module", METHODS)
def test_files_that_cannot_grow_stop_the_job_and_lose_nothing(module, warm, whole, tmp_path):
    """A limit of the kernel, met inside of the native tensor writer."""
    job = Job(warm, CONFIG[module], tmp_path / "runs")
    poison = ("tests.drill.poison:small_files", [12_000])
    done = job.run(prepare=(poison,))
    assert done["status"] == 2, done["stderr"]
    assert "Traceback" not in done["stderr"]
    assert "run the same command to continue" in done["stderr"]
    assert "free" in done["stderr"]
    expect_equal(job, whole)
    assert not list(job.folder.rglob(".tmp*"))


# ---------------------------------------------------------------- paths (row 29)


@pytest.mark.parametrize("module", METHODS)
def test_a_method_works_under_an_odd_path(module, warm, whole, tmp_path):
    folder: Path = tmp_path / "a b'c\"d \u00e9 e\u0301 \u5b57 %$;" / ("x" * 100) / "runs"
    expect_equal(Job(warm, CONFIG[module], folder), whole)
