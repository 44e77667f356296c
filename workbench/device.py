"""One place that picks device, number format and thread count, and says what it picked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Device:
    """Where and in which number format a run computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int

    def describe(self) -> str:
        """One line for the log, e.g. `cpu, float32, 2 threads`."""
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {self.threads} threads"


def physical_cores() -> int:
    """Cores this process may use (affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def require_device(device: str) -> torch.device:
    """The torch device of this name, when it is there.

    Raises:
        ConfigError: no such name, no CUDA, or fewer devices than its number.
    """
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0", "mps")) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {device}: this torch ({torch.__version__}) sees no CUDA device; "
            "use --device auto or cpu, or install a CUDA build of torch"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return chosen


def choose(device: str = "auto", dtype: str = "auto", threads: int = 0) -> Device:
    """Pick cuda, then mps, then cpu; bfloat16 where CUDA has it, float32 elsewhere.

    `threads=0` means the value of OMP_NUM_THREADS or else all cores. Sets torch's thread count.

    Raises:
        ConfigError: the device or dtype is unknown or not there.
    """
    import torch

    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if device == "auto":
        mps = getattr(torch.backends, "mps", None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and mps is not None and mps.is_available():
            device = "mps"
    chosen = require_device(device)
    number_format = getattr(torch, dtype) if dtype != "auto" else torch.float32
    if dtype == "auto" and chosen.type == "cuda" and torch.cuda.is_bf16_supported():
        number_format = torch.bfloat16
    if threads < 0:
        raise ConfigError(f"--threads {threads}: expected 0 (automatic) or a positive number")
    if not threads:
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(wanted) if wanted.isdigit() and int(wanted) else physical_cores()
    torch.set_num_threads(threads)
    return Device(chosen, number_format, threads)
