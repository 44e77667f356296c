"""Peak memory of one worker of `compress_model`, against 3 m n 4 + 2 n^2 8 bytes.

    python benchmarks/lplr_q/memory.py                          # all of CASES, some minutes
    python benchmarks/lplr_q/memory.py --only "E8P, 2048 x 2048" "GPTQ, groups of 128"

Each measurement is a process of its own: it compresses a small matrix first (so that libraries
and code count as what was there before), resets the kernel's high-water mark and compresses one
matrix read from a model folder, with its Hessian read from a file. glibc is told to
give freed arrays back at once (MALLOC_MMAP_THRESHOLD_), so that what is counted was in use. Linux
only.
"""

import argparse
import json
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
from workbench.tables import read_csv, write_csv

NAME = "model.layers.0.mlp.up_proj"

# name -> outputs, inputs, settings; 2 bits and rank 64 where nothing else is said
CASES: dict[str, tuple[int, int, dict]] = {
    **{f"E8P, {size} x {size}": (size, size, {}) for size in (512, 1024, 2048, 4096)},
    "E8P, 4096 x 1024": (4096, 1024, {}),
    "E8P, 1024 x 4096": (1024, 4096, {}),
    "trellis": (2048, 2048, {"codebook": "tcq"}),
    "Lloyd-Max": (2048, 2048, {"codebook": "lloyd-max"}),
    "E8P, 4 bits": (2048, 2048, {"q_bits": 4}),
    "E8P, rank 256": (2048, 2048, {"rank": 256}),
    "E8P, factors of 16 bits": (2048, 2048, {"factor_bits": 16}),
    "E8P, ODLRI": (2048, 2048, {"init": "odlri"}),
    "E8P, SRR": (2048, 2048, {"init": "srr"}),
    "E8P, ProjQ": (2048, 2048, {"q_hessian": "projq"}),
    "E8P, everything tried": (2048, 2048, {"init": "auto", "q_hessian": "auto"}),
    "E8P, rescaled": (2048, 2048, {"rescale": True}),
    "QuIP# form": (2048, 2048, {"method": "quip-sharp"}),
    "GPTQ, groups of 128": (2048, 2048, {"method": "gptq", "group": 128}),
    "RTN, groups of 128": (2048, 2048, {"method": "rtn", "group": 128}),
}


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


def compress(folder: Path, out: str, rank: int, **options) -> None:
    """The model folder of :func:`write_case`, one round."""
    fixed = {"bits": None, "q_bits": 2, "rank": rank, "rounds": 1, "inner_iterations": 2}
    settings = CompressionSettings(**fixed | options)
    compress_model(folder / "model", folder / "hessians", settings, folder / out, threads=1)


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this benchmark reads /proc/self/status: Linux only")


def measure(folder: Path, options: dict) -> None:
    """Print bytes above what was resident before, and CPU seconds."""
    small = folder / "small"
    write_case(small, 64, 64)
    rank = options.pop("rank", 64)
    compress(small, "out", 8, **options)
    load_hessians(folder / "hessians")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, begin = status("VmRSS"), time.process_time()
    compress(folder, "out", rank, **options)
    print(status("VmHWM") - before, time.process_time() - begin)


def main() -> None:
    """Measure the cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.options)
        return
    table = Path(__file__).with_suffix(".csv")
    rows = read_csv(table) if table.is_file() else []
    for case in arguments.only:
        outputs, inputs, options = CASES[case]
        with tempfile.TemporaryDirectory() as name:
            write_case(Path(name), outputs, inputs)
            command = [sys.executable, __file__, "--folder", name, "--options", json.dumps(options)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
            )  # fmt: skip
        peak, seconds = map(float, done.stdout.split())
        bound = 12 * outputs * inputs + 16 * inputs * inputs
        row = {
            "case": case,
            "outputs": outputs,
            "inputs": inputs,
            "peak_mb": peak / 2**20,
            "bound_mb": bound / 2**20,
            "ratio": peak / bound,
            "cpu_seconds": seconds,
        }
        rows = [r for r in rows if r["case"] != case] + [row]
        print(
            "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()),
            flush=True,
        )
        write_csv(table, rows)


if __name__ == "__main__":
    main()
