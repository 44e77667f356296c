"""Peak memory of one worker of `compress_model`, against 3 m n 4 + 2 n^2 8 bytes.

    python benchmarks/lplr_q/memory.py
    python benchmarks/lplr_q/memory.py --size 1024 2048 --rank 64

Each measurement is a process of its own: it compresses a small matrix first (so that libraries
and code count as what was there before), resets the kernel's high-water mark and compresses one
size x size matrix read from a model folder, with its Hessian read from a file. glibc is told to
give freed arrays back at once (MALLOC_MMAP_THRESHOLD_), so that what is counted was in use. Linux
only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lplr_q.activation_aware.hessian import (
    Calibration,
    SecondMomentAccumulator,
    load_hessians,
    save_hessians,
)
from lplr_q.quantize_model import CompressionSettings, compress_model
from workbench import storage
from workbench.tables import write_csv

NAME = "model.layers.0.mlp.up_proj"


def write_case(folder: Path, outputs: int, inputs: int) -> None:
    """A model folder with one matrix whose spectrum decays, and the Hessian of its input."""
    g = torch.Generator().manual_seed(outputs + inputs)
    few = min(outputs, inputs) // 8
    left, right = torch.randn(outputs, few, generator=g), torch.randn(few, inputs, generator=g)
    weight = left * torch.arange(1, few + 1) ** -0.6 @ right / inputs**0.5
    weight += 0.3 * torch.randn(outputs, inputs, generator=g)
    storage.write_json(folder / "model" / "config.json", {"model_type": "llama"})
    path = folder / "model" / "model.safetensors"
    storage.write_safetensors(path, {f"{NAME}.weight": 0.02 * weight})
    sums = SecondMomentAccumulator(inputs)
    scale = torch.arange(1, inputs + 1) ** -0.25
    for _ in range(8):
        sums.add(torch.randn(inputs // 4, inputs, generator=g) * scale)
    key = "0.mlp.up_proj"
    save_hessians(Calibration({key: sums.finish()}, {NAME: key}), folder / "hessians", {})


def compress(folder: Path, out: str, rank: int) -> None:
    settings = CompressionSettings(bits=None, q_bits=2, rank=rank, rounds=1, inner_iterations=2)
    compress_model(folder / "model", folder / "hessians", settings, folder / out, threads=1)


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this benchmark reads /proc/self/status: Linux only")


def measure(folder: Path, rank: int) -> None:
    """Print bytes above what was resident before, and CPU seconds."""
    small = folder / "small"
    write_case(small, 64, 64)
    compress(small, "out", 8)
    load_hessians(folder / "hessians")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, begin = status("VmRSS"), time.process_time()
    compress(folder, "out", rank)
    print(status("VmHWM") - before, time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.rank)
        return
    rows = []
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as name:
            write_case(Path(name), size, size)
            done = subprocess.run(
                [sys.executable, __file__, "--folder", name, "--rank", str(arguments.rank)],
                capture_output=True, text=True, check=True,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
            )  # fmt: skip
        peak, seconds = map(float, done.stdout.split())
        bound = 3 * size * size * 4 + 2 * size * size * 8
        rows.append(
            {
                "size": size,
                "rank": arguments.rank,
                "peak_mb": peak / 2**20,
                "bound_mb": bound / 2**20,
                "ratio": peak / bound,
                "cpu_seconds": seconds,
            }
        )
        print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    write_csv(Path(__file__).with_suffix(".csv"), rows)


if __name__ == "__main__":
    main()
