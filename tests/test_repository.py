"""The files around the code agree with each other and name no machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, child_environment


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = done.stdout.split("\n") if done.returncode == 0 else []
    files = [ROOT / n for n in names if n]
    if not files:  # an unpacked archive without git
        skip = {".venv", ".venv-extras", "runs", "__pycache__", ".git"}
        files = [p for p in ROOT.rglob("*") if not skip & set(p.relative_to(ROOT).parts)]
    return [p for p in files if p.is_file()]


TEXT = [p for p in tracked() if p.suffix in {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".j2"}]
MARKDOWN = [p for p in TEXT if p.suffix == ".md"]


def test_no_text_names_a_path_of_one_machine():
    pattern = re.compile("/" + r"(?:work|home|root|Users)" + r"/\w")
    bad = [str(p.relative_to(ROOT)) for p in TEXT if pattern.search(p.read_text(encoding="utf-8"))]
    assert not bad


def test_environment_yml_agrees_with_pyproject_and_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert environment["name"] == project["name"]
    assert "prefix" not in environment
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    (nested,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert all(d.count("=") <= 1 for d in plain), "build hashes cannot be solved elsewhere"
    python = next(d for d in plain if d.startswith("python="))
    assert f">={python.removeprefix('python=')}" == project["requires-python"]
    assert "-c constraints.txt" in nested
    extras = re.findall(r"\[(.*)\]", next(line for line in nested if line.startswith("-e")))
    assert set(",".join(extras).split(",")) <= set(project["optional-dependencies"])


def test_constraints_pin_public_versions_of_declared_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    everything = [*project["dependencies"], *(line for extra in extras for line in extra)]
    bounds = {}
    for line in everything:
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?>=([0-9.]+)", line)
        if found:
            bounds[found[1].lower()] = found[2]
    for name in ("constraints.txt",):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        assert pins["torch"] == "2.13.0"
        for package, version in pins.items():
            assert "+" not in version, f"{package}: a local version suffix ties one platform"
            low = [int(x) for x in bounds[package].split(".")]
            assert [int(x) for x in version.split(".")[: len(low)]] >= low, package


def test_the_lock_contains_the_constraints_and_no_cuda():
    lock = (ROOT / "constraints-lock.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.lower().replace("_", "-") for line in lock if "==" in line}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and not line.startswith(("ruff", "basedpyright")):
            assert line.lower() in pins, line
    assert not [p for p in pins if p.startswith(("nvidia", "triton"))]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target


def commands(text: str) -> list[str]:
    """The `python -m package.script …` lines of a text's shell blocks, continuations joined."""
    found = []
    for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("#")[0].strip().removeprefix("$ ")
            if re.match(r"python -m (mad|sdm|lplr_q|early_exit|sycomode|workbench)\b", line):
                found.append(line)
    return found


DOCUMENTED = sorted(
    {
        command
        for path in MARKDOWN
        for command in commands(path.read_text(encoding="utf-8"))
        if not re.search(r"[<>|…$*]|\.\.\.", command)
    }
)


@pytest.mark.parametrize("command", DOCUMENTED)
def test_every_documented_command_parses(command):
    words = shlex.split(command)[1:]
    module = words[1]
    if "." not in module and module != "workbench":
        words = words[:2]
    elif module != "workbench":
        words.append("--print-config")
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=child_environment(),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
