"""One screen about this machine: what is here, what runs instead of what is not, how fast it is.

    python -m workbench.doctor
    python -m workbench.doctor --no-benchmark

Paste it into a bug report. It changes nothing and needs no network. Exit status 0 means that the
main jobs can run here.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError


@dataclass(frozen=True)
class Experiment:
    """What to look at."""

    benchmark: bool = True
    """Measure for one second how fast this machine computes."""
    seconds: float = 1.0
    """Length of the measurement in seconds."""
    traceback: bool = False
    """Show the full traceback of an error."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a measurement of no or endless length."""
        if not 0 < self.seconds <= 60:
            raise ConfigError(f"--seconds {self.seconds}: expected more than 0 and at most 60")


EXPERIMENT = Experiment()


@dataclass(frozen=True)
class Line:
    """One line of the screen: a name, whether it is well, and what was found."""

    name: str
    good: bool | None
    """True: fine; None: absent, but something runs instead; False: a main job cannot run."""
    text: str


def machine_lines() -> list[Line]:
    """Python, torch, device, threads, memory and disk."""
    import torch

    from workbench import device

    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    threads = torch.get_num_threads()
    try:
        chosen = device.choose()
    finally:
        torch.set_num_threads(threads)
    disk = shutil.disk_usage(Path.cwd())
    return [
        Line("Python", sys.version_info >= (3, 11), python),
        Line("torch", True, f"{torch.__version__} ({build})"),
        Line("device", True, chosen.describe() + _gpu(torch)),
        Line("memory", True, f"{_memory_gigabytes():.1f} GB, {disk.free / 1e9:.0f} GB disk free"),
    ]


def _gpu(torch: Any) -> str:
    if not torch.cuda.is_available():
        return ""
    facts = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    return f" ({count} × {facts.name}, {facts.total_memory / 1e9:.0f} GB)"


def _memory_gigabytes() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return float("nan")


def package_lines() -> list[Line]:
    """Versions of the core packages that decide about results."""
    from importlib import metadata

    lines = []
    for name in ("transformers", "datasets", "safetensors", "scikit-learn", "scipy", "peft"):
        try:
            lines.append(Line(name, True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            lines.append(
                Line(name, False, "missing; install with `make setup` or pip install -e .")
            )
    return lines


def engine_lines() -> list[Line]:
    """Each optional engine: version, or why it is missing and what runs instead."""
    from workbench import engines

    lines = []
    for name in engines.ENGINES:
        found = engines.status(name)
        lines.append(
            Line(name, True, f"{found.version}, {engines.ENGINES[name].purpose}")
            if found.found
            else Line(name, None, f"{found.reason} → {engines.ENGINES[name].fallback}")
        )
    return lines


def resource_lines() -> list[Line]:
    """Built-in models, data folder and hub setting."""
    from workbench import models

    names = models.built_in_names()
    lines = []
    for name in names:
        folder = models.WEIGHTS / name
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) / 1e6
        try:
            config = models.check_folder(folder)
            lines.append(Line(name, True, f"{config.get('model_type')}, {size:.1f} MB, whole"))
        except ValueError as error:
            lines.append(Line(name, False, str(error)))
    if not names:
        lines.append(Line("backbones", False, "none; python -m workbench.backbones trains them"))
    data = os.environ.get("FIVEFOLD_DATA")
    if not data:
        lines.append(Line("FIVEFOLD_DATA", None, "not set → built-in text alone"))
    elif not Path(data).is_dir():
        lines.append(Line("FIVEFOLD_DATA", False, f"{data} is no folder"))
    else:
        found = ", ".join(sorted(p.name for p in Path(data).iterdir())[:6]) or "empty"
        lines.append(Line("FIVEFOLD_DATA", True, f"{data}: {found}"))
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    state = "offline (HF_HUB_OFFLINE), cached ids only" if offline else "online ids allowed"
    lines.append(Line("hub", None if offline else True, f"{state}; cache {cache}"))
    return lines


def benchmark_lines(seconds: float) -> list[Line]:
    """Dense multiply speed, and training tokens per second of the tiny model, on one thread."""
    import torch

    from workbench.tiny import tiny_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(512, 512)
        rate = _rate(lambda: matrix @ matrix, seconds / 2) * 2 * 512**3 / 1e9
        model = tiny_model("mistral")
        ids = torch.zeros(4, 128, dtype=torch.long)

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        tokens = _rate(step, seconds / 2) * ids.numel()
    finally:
        torch.set_num_threads(threads)
    return [
        Line("multiply", True, f"{rate:.0f} GFLOP/s, float32, one thread"),
        Line("training", True, f"{tokens:,.0f} tokens/s, tiny:mistral (0.2 M weights), one thread"),
    ]


def _rate(action: Callable[[], Any], seconds: float) -> float:
    """Calls per second after one warm-up call."""
    action()
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        action()
        calls += 1
    return calls / passed


def main(experiment: Experiment) -> dict[str, Any]:
    """Prints the screen; returns how many things are fine, absent and wrong."""
    parts: list[tuple[str, Callable[[], list[Line]]]] = [
        ("machine", machine_lines),
        ("core", package_lines),
        ("engines", engine_lines),
        ("models and data", resource_lines),
    ]
    if experiment.benchmark:
        parts.append(("speed", lambda: benchmark_lines(experiment.seconds)))
    gathered = [(title, read()) for title, read in parts]
    _show(gathered)
    lines = [line for _, group in gathered for line in group]
    wrong = [line.name for line in lines if line.good is False]
    return {
        "found": sum(line.good is True for line in lines),
        "absent": sum(line.good is None for line in lines),
        "wrong": ", ".join(wrong) or "nothing",
    }


def _show(groups: list[tuple[str, list[Line]]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    signs = {True: "[green]ok[/]", None: "[yellow]–[/]", False: "[red]wrong[/]"}
    for title, lines in groups:
        table.add_row(f"[bold]{title}[/]", "", "")
        for line in lines:
            table.add_row(f"  {escape(line.name)}", signs[line.good], escape(line.text))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    from workbench.cli import cli

    cli(main, EXPERIMENT)
