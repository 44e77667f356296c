"""Optional engines: which are here, why not, and what runs instead.

An engine is a package that makes something faster or adds a service; none is required. A package
that is installed but does not import counts as missing, with its reason. Each decision is written
to the run's log once (`record`), so a result always says which kernel made it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from workbench.errors import MissingExtra, unknown_name


@dataclass(frozen=True)
class Engine:
    """One optional package."""

    module: str
    """Name to import."""
    extra: str
    """The extra of this distribution that installs it ("" for a core dependency)."""
    purpose: str
    """What it is used for."""
    fallback: str
    """What runs when it is missing."""
    needs_cuda: bool = False
    """Whether it works on CUDA devices only."""


ENGINES: dict[str, Engine] = {
    "mamba-ssm": Engine(
        "mamba_ssm", "cuda", "selective scan", "unbind scan in torch (workbench.mamba)", True
    ),
    "causal-conv1d": Engine("causal_conv1d", "cuda", "Mamba convolution", "torch conv1d", True),
    "flash-linear-attention": Engine(
        "fla",
        "cuda",
        "linear attention, gated linear attention, delta rules, RWKV",
        "chunked forms in torch (mad.layers)",
        True,
    ),
    "flash-attn": Engine(
        "flash_attn", "cuda", "attention", "torch scaled_dot_product_attention", True
    ),
    "fast-hadamard-transform": Engine(
        "fast_hadamard_transform", "cuda", "Hadamard rotation", "butterfly in torch", True
    ),
    "faiss": Engine("faiss", "", "nearest neighbours", "exact search by torch matrix products"),
    "mlx": Engine("mlx.core", "mlx", "generation on Apple devices", "torch"),
    "wandb": Engine("wandb", "wandb", "mirror of metrics.jsonl", "metrics.jsonl alone"),
    "ray": Engine("ray", "ray", "sweeps over machines", "process pool"),
    "lm-eval": Engine("lm_eval", "eval", "zero-shot tasks", "choice scoring of workbench.evaluate"),
    "schedulefree": Engine("schedulefree", "schedulefree", "schedule-free optimiser", "AdamW"),
}


@dataclass(frozen=True)
class Status:
    """Whether an engine can be used, and why not."""

    name: str
    found: bool
    version: str
    reason: str

    def __str__(self) -> str:
        engine = ENGINES[self.name]
        if self.found:
            return f"{self.name} {self.version}: {engine.purpose}"
        return f"{self.name}: {self.reason} → {engine.fallback}"


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    return ENGINES[name]


def status(name: str) -> Status:
    """Imports engine `name` and says whether that worked; any failure counts as missing."""
    engine = _engine(name)
    top = engine.module.partition(".")[0]
    try:
        module = importlib.import_module(engine.module)
    except ModuleNotFoundError as error:
        if error.name in (None, engine.module, top):
            return Status(name, False, "", "not installed")
        return Status(name, False, "", f"broken (its module {error.name} is missing)")
    except Exception as error:  # a broken binary can raise anything
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return Status(name, False, "", f"broken ({type(error).__name__}: {first})")
    return Status(name, True, _version(name, module), "")


def _version(name: str, module: ModuleType) -> str:
    for distribution in (name, "faiss-cpu", "faiss-gpu") if name == "faiss" else (name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(module, "__version__", ""))


def available(name: str) -> bool:
    """Whether engine `name` imports, and a CUDA device is here if it needs one."""
    engine = _engine(name)
    if engine.needs_cuda:
        import torch

        if not torch.cuda.is_available():
            return False
    return status(name).found


def need(name: str, *, extra: str | None = None, feature: str = "") -> ModuleType:
    """The imported package, or `MissingExtra` with the line that installs it.

    `name` is an engine or any optional module; `feature` says what it is needed for.
    """
    known = name if name in ENGINES else _by_module(name)
    if known is None:
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise _missing(name, extra or "", feature, str(error), "") from error
    engine = ENGINES[known]
    found = status(known)
    if not found.found:
        raise _missing(known, extra or engine.extra, feature, found.reason, engine.fallback)
    return importlib.import_module(engine.module)


def _by_module(module: str) -> str | None:
    for name, engine in ENGINES.items():
        if module in (engine.module, engine.module.partition(".")[0]):
            return name
    return None


def _missing(name: str, extra: str, feature: str, reason: str, fallback: str) -> MissingExtra:
    wanted = f" (needed for {feature})" if feature else ""
    install = f'pip install -e ".[{extra}]"' if extra else f"pip install {name}"
    without = f"; without it: {fallback}" if fallback else ""
    return MissingExtra(f"{name} is {reason}{wanted}: {install}{without}")


def record(names: list[str], note: Callable[[str], object]) -> None:
    """Writes one line per engine through `note` (a run's `note`): found, or what runs instead."""
    for name in names:
        note(f"engine {status(name)}")
