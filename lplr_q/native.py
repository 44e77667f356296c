"""Small C kernels, compiled once where they run; without a compiler torch does the work.

The compiled file lies in ``$XDG_CACHE_HOME/fivefold/native`` (default ``~/.cache``) under a name
made from the source, the compiler and the processor, so a changed one is compiled anew. Nothing
happens before the first use. ``FIVEFOLD_NATIVE=0`` keeps to torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_LANES = 8  # sequences the trellis kernel takes side by side


def _compiler() -> str | None:
    wanted = os.environ.get("CC", "")
    for name in (wanted, "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    return None


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)])


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fivefold" / "native"


def _build(compiler: str, source: Path) -> Path:
    """Path of the compiled library; compiles only when it is not there."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    key = "\0".join([source.read_text(encoding="utf-8"), version, _processor(), *_FLAGS])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    target = _folder() / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / name
            command = [compiler, *_FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            os.replace(built, target)
    return target


@lru_cache(maxsize=8)
def load(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library of a C file of this package, or None, and one line that says why."""
    compiler = _compiler()
    if compiler is None:
        return None, "no C compiler found"
    try:
        return ctypes.CDLL(str(_build(compiler, source))), f"compiled with {compiler}"
    except subprocess.CalledProcessError as error:
        first = (error.stderr.strip().splitlines() or ["no message"])[0]
        return None, f"{compiler} failed: {first[:200]}"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"{type(error).__name__}: {str(error)[:200]}"


def library(source: Path = _SOURCE) -> ctypes.CDLL | None:
    """The kernels, or None where torch has to do the work."""
    if os.environ.get("FIVEFOLD_NATIVE", "1") == "0":
        return None
    return load(source)[0]


def status(device: torch.device | None = None) -> str:
    """One line for a run's log: which form encodes on this device (the CPU), and why."""
    if device is not None and device.type != "cpu":
        return f"C kernels of lplr_q: not for {device.type} → torch"
    if os.environ.get("FIVEFOLD_NATIVE", "1") == "0":
        return "C kernels of lplr_q: switched off by FIVEFOLD_NATIVE=0 → torch"
    found, reason = load(_SOURCE)
    return f"C kernels of lplr_q: {reason}" + ("" if found else " → torch")


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def trellis_circles(
    x: Float[Tensor, "count T"], table: Float[Tensor, " states"], bits: int
) -> Int64[Tensor, "count T"] | None:
    """:func:`lplr_q.codebooks.trellis.circles` in C, on as many threads as torch has; None when it
    cannot be used."""
    kernels = library() if x.device.type == "cpu" else None
    if kernels is None:
        return None
    x = x.detach().to(torch.float32).contiguous()
    table = table.detach().to(device="cpu", dtype=torch.float32).contiguous()
    symbols = torch.empty(x.shape, dtype=torch.uint8)
    length, window = x.shape[1], table.numel().bit_length() - 1

    def work(low: int, high: int) -> int:
        part, result = x[low:high], symbols[low:high]
        return kernels.trellis_circles(
            _address(part),
            ctypes.c_int64(high - low),
            ctypes.c_int64(length),
            _address(table),
            window,
            bits,
            _address(result),
        )

    codes = in_threads(work, x.shape[0], _LANES)
    if any(codes):
        raise MemoryError(f"trellis kernel: no memory for {table.numel()} states, {length} samples")
    return symbols.long()


def trellis_points(
    codes: Int64[Tensor, "m blocks c"], table: Float[Tensor, " states"], bits: int, rows: int
) -> Float[Tensor, "m blocks c"] | None:
    """Points of the codes of tiles of ``rows`` x c entries; None when the kernel cannot be used."""
    kernels = library() if codes.device.type == "cpu" and codes.dtype == torch.int64 else None
    if kernels is None:
        return None
    codes = codes.contiguous()
    m, blocks, columns = codes.shape
    points = torch.empty(codes.shape, dtype=torch.float32)
    window = table.numel().bit_length() - 1

    def work(low: int, high: int) -> int:
        state = torch.empty(blocks, dtype=torch.int32)
        kernels.trellis_points(
            _address(codes[low:high]),
            *map(ctypes.c_int64, (high - low, blocks, columns, rows)),
            _address(table),
            window,
            bits,
            _address(state),
            _address(points[low:high]),
        )
        return 0

    if codes.numel():
        in_threads(work, m, rows)
    return points


def e8p_encode(
    x: Float[Tensor, "N 8"], patterns: Float[Tensor, "256 8"], lookup: Int16[Tensor, " keys"]
) -> Int64[Tensor, " N"] | None:
    """Codes of the nearest E8P points; None when the kernel cannot be used. The tables are those of
    :mod:`lplr_q.codebooks.e8p`, contiguous on the CPU."""
    kernels = library() if x.device.type == "cpu" else None
    if kernels is None:
        return None
    x = x.detach().to(torch.float32).contiguous()
    codes = torch.empty(x.shape[0], dtype=torch.int64)

    def work(low: int, high: int) -> int:
        kernels.e8p_encode(
            _address(x[low:high]),
            ctypes.c_int64(high - low),
            *map(_address, (patterns, lookup)),
            _address(codes[low:high]),
        )
        return 0

    if len(codes):
        in_threads(work, len(codes), 256)
    return codes


def in_threads(work, count: int, step: int) -> list[int]:
    """``work(low, high)`` over 0..count in pieces of whole steps, one piece per torch thread."""
    threads = max(1, min(torch.get_num_threads(), count // step))
    piece = -(-count // (threads * step)) * step
    bounds = [(low, min(low + piece, count)) for low in range(0, count, piece)]
    if len(bounds) == 1:
        return [work(*bounds[0])]
    with ThreadPoolExecutor(len(bounds)) as pool:
        return list(pool.map(lambda b: work(*b), bounds))
