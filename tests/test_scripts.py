"""Every script as a user meets it: help, typos, bad settings, a tiny run, the same run again."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment
from tests.test_architecture import PACKAGES, scripts


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__main__" else parts)


SCRIPTS = sorted(module_name(p) for p in scripts())
TINY = {
    config: module
    for module in SCRIPTS
    for config in sorted((ROOT / "configs").glob("*/*.yaml"))
    if "tiny" in config.name.split(".")
    and config.parent.name == module.split(".")[0]
    and config.name.split(".")[0] == module.split(".")[-1]
}


def call(module: str, *arguments: object, cwd: Path = ROOT, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, env=child_environment(**environment), capture_output=True, text=True,
        encoding="utf-8", errors="replace", check=False, timeout=300,
    )  # fmt: skip


def test_all_five_packages_have_scripts():
    assert {m.split(".")[0] for m in SCRIPTS} == set(PACKAGES)


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_answers_without_torch_and_a_typo_gets_one_message(module):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{module!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as error:\n"
        "    assert not error.code, error.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported before the flags were parsed'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=child_environment(COLUMNS="100"),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen, typo = "--traceback", "--trcaeback"
    assert chosen in done.stdout

    wrong = call(module, typo)
    assert wrong.returncode == 2, wrong.stderr
    assert "Traceback" not in wrong.stderr + wrong.stdout
    assert chosen in wrong.stderr + wrong.stdout, "no suggestion"


@pytest.mark.parametrize("module", SCRIPTS)
def test_a_typo_in_a_settings_file_is_one_line_with_a_suggestion(module, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("trcaeback: true\n", encoding="utf-8")
    done = call(module, "--config", file)
    assert done.returncode == 2
    assert "'trcaeback'" in done.stderr
    assert "perhaps you meant traceback" in done.stderr
    assert "Traceback" not in done.stderr
    missing = call(module, "--config", tmp_path / "no.yaml")
    assert missing.returncode == 2
    assert "no such file" in missing.stderr


@pytest.mark.parametrize("module", SCRIPTS)
def test_settings_survive_the_way_out_and_in(module, tmp_path):
    printed = call(module, "--print-config")
    assert printed.returncode == 0, printed.stderr
    file = tmp_path / "settings.yaml"
    file.write_text(printed.stdout, encoding="utf-8")
    again = call(module, "--config", file, "--print-config")
    assert again.returncode == 0, again.stderr
    assert again.stdout == printed.stdout


# their own rooms run them, from data to report, in every default pass
ALSO_RUN_BY_THEIR_ROOM = {
    "lplr_q.finetune_glue", "lplr_q.finetune_rht", "lplr_q.finetune_wikitext",
    "lplr_q.finetune_winogrande", "lplr_q.fro_norm_experiment", "lplr_q.matrix_compression",
    "lplr_q.sv_profile", "lplr_q.throughput", "mad.architecture_improvement", "mad.sweep",
}  # fmt: skip


def tiny_runs():
    for config in sorted(TINY):
        late = [pytest.mark.slow] if TINY[config] in ALSO_RUN_BY_THEIR_ROOM else []
        yield pytest.param(config, marks=late, id=f"{config.parent.name}.{config.name}")


@pytest.mark.parametrize("config", tiny_runs())
def test_the_tiny_run_ends_and_the_same_command_returns_at_once(config, tmp_path):
    module = TINY[config]
    done = call(module, "--config", config, "--root", tmp_path, "--threads", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    results = list(tmp_path.rglob("results.json"))
    assert results
    before = {p: p.stat().st_mtime_ns for p in results}
    again = call(module, "--config", config, "--root", tmp_path, "--threads", 1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in results} == before
    for folder in {p.parent for p in results}:
        for drawn in folder.glob("figures/*.png"):
            assert drawn.with_suffix(".csv").is_file()
            assert drawn.with_suffix(".svg").is_file()


@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "workbench"])
def test_a_package_lists_its_scripts(package):
    done = call(package)
    assert done.returncode == 0, done.stderr
    own = [m for m in SCRIPTS if m.startswith(package + ".")]
    assert own
    for module in own:
        line = next(line for line in done.stdout.splitlines() if f"python -m {module} " in line)
        assert len(line) > len(f"python -m {module}") + 10, "no sentence"


SETTINGS = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.stem[:11] != "accelerate."]
"""All but the files of the launcher itself."""


@pytest.mark.parametrize("config", SETTINGS, ids=lambda p: p.name)
def test_every_settings_file_is_read_by_the_script_it_is_named_after(config):
    package = config.parent.name
    names = config.name.split(".")
    candidates = [f"{package}.{names[0]}", package]
    known = [m for m in SCRIPTS if m in candidates or m == f"workbench.{package}"]
    if not known:
        text = config.read_text(encoding="utf-8")
        found = re.search(r"python -m ([\w.]+)", text)
        assert found, f"{config}: name it <script>.<purpose>.yaml or name the command in it"
        known = [found[1]]
    done = call(known[0], "--config", config, "--print-config")
    assert done.returncode == 0, done.stderr


def test_no_script_prints_by_itself():
    bad = []
    for path in scripts():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not bad
