"""What a run writes down about itself: options, settings as data and key, environment, numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run is made; none of this changes what is computed, nor the run's key."""

    name: str | None = None
    """Folder name instead of <script>-<key>."""
    root: Path = Path("runs")
    """Folder that holds all runs."""
    fresh: bool = False
    """Begin anew; the old folder is renamed aside, never deleted."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu) or a torch device."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16 or float64."""
    threads: int = 0
    """CPU threads of torch; 0 = OMP_NUM_THREADS or all cores."""
    wandb: bool = False
    """Mirror the metrics to Weights & Biases (offline without a login)."""
    wandb_project: str | None = None
    """Project of that mirror; none means the package's name."""
    allow_divergence: bool = False
    """Go on when the loss is not finite."""
    traceback: bool = False
    """Show the traceback of an error that has a one-line message."""


# ---------------------------------------------------------------- settings as data


def to_plain(value: Any) -> Any:
    """Settings as JSON-able data: dataclasses become dicts, paths text, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    return value


def settings_of(experiment: Any) -> dict[str, Any]:
    """The settings that decide the result: everything but the `run` block."""
    plain = to_plain(experiment)
    plain.pop("run", None)
    return plain


def settings_key(name: str, settings: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a script's name and settings, as 64 hex digits."""
    text = json.dumps([name, settings], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, one `name: old → new` each."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += changed_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} → {b!r}")
    return lines


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars as strict JSON; names of non-finite ones are listed under `non_finite`."""
    clean: dict[str, Any] = {}
    bad = []
    for key, value in values.items():
        clean[key] = plain_number(value)
        if isinstance(clean[key], float) and not math.isfinite(clean[key]):
            bad.append(key)
            clean[key] = None
    if bad:
        clean["non_finite"] = bad
    return clean


def plain_number(value: Any) -> Any:
    """A zero-dimensional tensor or numpy scalar as a Python number; anything else as it is."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # of a tensor with a graph too: it gives a plain number
    return value


def clean_tree(value: Any) -> Any:
    """Results as strict JSON: numpy and torch scalars become numbers, non-finite ones null."""
    value = plain_number(value) if getattr(value, "ndim", 0) == 0 else value
    if isinstance(value, Mapping):
        return {str(k): clean_tree(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_tree(v) for v in value]
    if hasattr(value, "tolist"):
        return clean_tree(value.tolist())
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def command_line() -> str:
    """The command that started this process, as one would type it."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    words = [sys.argv[0], *sys.argv[1:]]
    if spec is not None and spec.name:
        words = ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    return shlex.join(words)


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def files_in(folder: str | Path) -> dict[str, list[int]]:
    """Size and time of change (ns) of the files in a folder of a model; {} if there is none."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except (OSError, ValueError):
        return {}
    return {name: [facts.st_size, facts.st_mtime_ns] for name, facts in sorted(found)}


def describe_environment() -> dict[str, Any]:
    """Versions, commit, machine and command of this process."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "numpy", "transformers", "datasets", "safetensors", "peft", "fivefold"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    difference = _git("diff", "HEAD")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "packages": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_sha256": hashlib.sha256(difference.encode()).hexdigest()
        if difference
        else None,
        "command": command_line(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
