"""Every command of the replication scripts, at every scale, names settings that exist.

The scripts run with a stand-in for Python that writes down what it is asked for; each command is
then parsed by the module that it names. Nothing is computed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from workbench.cli import parse

SCRIPTS = sorted((ROOT / "replication_scripts").rglob("*.sh"))
ASKED_FOR = re.compile(r"\$\{(\w+):\?|\$\{(\w+):-SET_ME\}")
LAUNCHER = ("torch.distributed.run", "accelerate.commands.launch")
STAND_IN = """\
#!/bin/sh
{ for word; do printf '%s\\037' "$word"; done; echo; } >> "$COMMANDS"
"""


def commands(script: Path, scale: str, folder: Path) -> list[list[str]]:
    """The arguments of every call of Python by the script."""
    tools, written = folder / "tools", folder / "commands.txt"
    tools.mkdir()
    for name in ("python", "python3"):
        (tools / name).write_text(STAND_IN, encoding="utf-8")
        (tools / name).chmod(0o755)
    (tools / "ls").symlink_to(shutil.which("true") or "true")  # some list what they made
    wanted = {a or b for a, b in ASKED_FOR.findall(script.read_text(encoding="utf-8"))}
    kept = {key: os.environ[key] for key in ("HOME", "TMPDIR") if key in os.environ}
    done = subprocess.run(
        ["bash", str(script)],
        env=kept | {name: f"given-{name}" for name in wanted} | {
            "PATH": f"{tools}:{os.environ['PATH']}", "SCALE": scale, "ROOT": str(folder / "runs"),
            "COMMANDS": str(written),
        },
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = written.read_text(encoding="utf-8").split("\x1f\n")
    return [line.split("\x1f") for line in lines if line]


def named(words: list[str]) -> tuple[str, list[str]]:
    """Module or file and its own arguments, behind a launcher of several processes."""
    if words[0] == "-m" and words[1] in LAUNCHER:
        return named(words[words.index("-m", 2) :])
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


def loaded(name: str) -> Any:
    """The module of that name or in that file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT).with_suffix("")))
def test_every_command_of_a_replication_script_is_understood(script, scale, tmp_path, monkeypatch):
    called = commands(script, scale, tmp_path)
    assert called
    monkeypatch.chdir(ROOT)
    for words in called:
        name, arguments = named(words)
        module = loaded(name)
        experiment = getattr(module, "EXPERIMENT", None)
        if experiment is None:
            continue
        try:
            parse(experiment, arguments)
        except SystemExit as error:
            raise AssertionError(f"{script.name} at {scale}: {' '.join(words)}") from error
