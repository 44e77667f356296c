"""The shape of the house: direction of imports, lazy extras, importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment

ROOMS = ("mad", "sdm", "lplr_q", "early_exit", "sycomode")
PACKAGES = (*ROOMS, "workbench")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
EXTRAS = {
    "wandb", "ray", "mlx", "mlx_lm", "lm_eval", "mamba_ssm", "causal_conv1d", "flash_attn",
    "fast_hadamard_transform", "fla", "schedulefree",
}  # fmt: skip
HEAVY = {"transformers", "datasets", "faiss", "sklearn", "matplotlib", "peft", "accelerate"}
DISTRIBUTION = {
    "sklearn": "scikit-learn", "yaml": "pyyaml", "faiss": "faiss-cpu", "lm_eval": "lm-eval",
    "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "flash_attn": "flash-attn",
    "fast_hadamard_transform": "fast-hadamard-transform", "mlx_lm": "mlx-lm", "PIL": "matplotlib",
    "fla": "flash-linear-attention", "huggingface_hub": "transformers", "pandas": "datasets",
}  # fmt: skip


def imports_of(path: Path, module_level_only: bool = False):
    """(top-level name, line, whole module) of every absolute import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if module_level_only:
        nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    else:
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, alias.name
        elif not node.level and node.module:
            yield node.module.split(".")[0], node.lineno, node.module


def test_there_is_something_to_look_at():
    assert len(FILES) > 40


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_never_import_their_siblings(package):
    bad = []
    for path in (p for p in FILES if p.relative_to(ROOT).parts[0] == package):
        for name, line, _ in imports_of(path):
            if name in ROOMS and name != package:
                bad.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not bad


def test_lazy_packages_are_not_imported_at_module_level():
    bad = []
    for path in FILES:
        for name, line, _ in imports_of(path, module_level_only=True):
            if name in HEAVY | EXTRAS:
                bad.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not bad


def test_extras_are_imported_under_integrations_only():
    bad = []
    for path in FILES:
        if "integrations" in path.parts:
            continue
        for name, line, _ in imports_of(path):
            if name in EXTRAS:
                bad.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not bad


def test_every_import_is_declared_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = set()
    for line in (
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ):
        declared.add(re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower())
    standard = set(sys.stdlib_module_names)
    bad = []
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for name, line, _ in imports_of(path):
            if name in standard | set(PACKAGES) | {"tests", "sitecustomize"}:
                continue
            if name.startswith(("drill_", "benchmarks")):
                continue
            if DISTRIBUTION.get(name, name).lower() not in declared:
                bad.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not bad


def scripts() -> list[Path]:
    """Modules that are run with `python -m`: they have `main` and call `cli`."""
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        if "main" in names and "cli(" in path.read_text(encoding="utf-8"):
            if path.name == "cli.py":
                continue
            found.append(path)
    return found


@pytest.mark.parametrize("path", scripts(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_script_parses_its_flags_before_torch_is_imported(path):
    """A script and what it imports at module level must not pull torch in: `--help` stays fast."""
    heavy = {"torch", "scipy", *HEAVY}
    seen: set[str] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        for name, line, module in imports_of(current, module_level_only=True):
            where = f"{current.relative_to(ROOT)}:{line}"
            assert name not in heavy, f"{where} imports {name} at module level"
            if name in PACKAGES and module not in seen:
                seen.add(module)
                base = ROOT.joinpath(*module.split("."))
                for file in (base.with_suffix(".py"), base / "__init__.py"):
                    if file.is_file():
                        todo.append(file)


def test_importing_any_module_does_nothing():
    """No file, socket, thread or global setting changes when every module is imported."""
    modules = []
    for path in FILES:
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = f"""
import os, sys, threading, random
import numpy as np, torch, yaml, tyro, jaxtyping, filelock
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(),
          np.random.get_state()[1].sum(), random.getstate()[1][:3], threading.active_count(),
          dict(os.environ))
written = []
def hook(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        if "__pycache__" not in str(args[0]) and not str(args[0]).startswith("/dev/"):
            written.append(str(args[0]))
    if event in ("socket.connect", "os.mkdir", "subprocess.Popen"):
        written.append(event)
sys.addaudithook(hook)
for name in {modules!r}:
    __import__(name)
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(),
         np.random.get_state()[1].sum(), random.getstate()[1][:3], threading.active_count(),
         dict(os.environ))
assert not written, written
assert before == after, [(a, b) for a, b in zip(before, after) if a != b]
for heavy in {sorted(HEAVY)!r}:
    assert heavy not in sys.modules, heavy
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env=child_environment(), capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_unsafe_loading_and_every_open_names_its_encoding():
    bad = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            text = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if text in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec"):
                bad.append(f"{where} {text}")
            if text == "torch.load" and keywords.get("weights_only") != "True":
                bad.append(f"{where} torch.load without weights_only=True")
            if text == "yaml.load" and "Loader" not in keywords:
                bad.append(f"{where} yaml.load")
            if (
                keywords.get("trust_remote_code") == "True"
                or keywords.get("allow_pickle") == "True"
            ):
                bad.append(f"{where} {text} trusts its input")
            if text in ("open", "gzip.open"):
                mode = ast.unparse(node.args[1]) if len(node.args) > 1 else keywords.get("mode", "")
                if "b" not in mode and "encoding" not in keywords:
                    bad.append(f"{where} {text} without encoding")
    assert not bad
