"""CPU seconds of the forms of the selective scan, forward and forward with backward.

    OMP_NUM_THREADS=1 python benchmarks/mamba/scan_forms.py

All in one process on one thread, best of `--repeats` (the reference once).  Writes
benchmarks/mamba/scan_forms.csv and prints it; `ratio` is against the reference of the same family.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch

from workbench.mamba import chunked_scan, selective_scan


def seconds(run: Callable[[], torch.Tensor], repeats: int) -> tuple[float, float]:
    """Smallest CPU seconds of the forward pass, and of both passes."""
    forward, both = [], []
    for _ in range(repeats):
        start = time.process_time()
        loss = run()
        forward.append(time.process_time() - start)
        loss.backward()
        both.append(time.process_time() - start)
    return min(forward), min(both)


def mamba_inputs(batch: int, length: int, width: int, state: int) -> list[torch.Tensor]:
    """u, step sizes, A, B and C of the scan with a decay per channel and state."""
    shapes = [(batch, length, width)] * 2 + [(width, state)] + [(batch, length, state)] * 2
    return _signed(shapes)


def mamba2_inputs(batch: int, length: int, heads: int, state: int) -> list[torch.Tensor]:
    """u, step sizes, A, B and C of the scan with a decay per head."""
    shapes = [(batch, length, heads, 32), (batch, length, heads), (heads,)]
    return _signed([*shapes, (batch, length, 1, state), (batch, length, 1, state)])


def _signed(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Random u, Δ > 0, A < 0, B, C that want gradients."""
    generator = torch.Generator().manual_seed(0)
    u, delta, A, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in (u, delta.exp() * 0.1, -A.exp(), B, C)]


def main() -> None:
    """Time every form of both scans, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family, inputs, kernels in (
        (
            "mamba",
            mamba_inputs(options.batch, options.length, 256, 16),
            ("reference", "unbind", "fused"),
        ),
        ("mamba2", mamba2_inputs(options.batch, options.length, 8, 64), ("reference", "chunked")),
    ):
        scan = selective_scan if family == "mamba" else chunked_scan
        slowest = None
        for kernel in kernels:

            def run(
                scan: Callable = scan, inputs: list = inputs, kernel: str = kernel
            ) -> torch.Tensor:
                return scan(*inputs, kernel=kernel)[0].sum()

            forward, both = seconds(run, 1 if kernel == "reference" else options.repeats)
            slowest = slowest or both
            rows.append(
                {
                    "family": family,
                    "kernel": kernel,
                    "batch": options.batch,
                    "time": options.length,
                    "forward_cpu_seconds": round(forward, 4),
                    "forward_and_backward_cpu_seconds": round(both, 4),
                    "ratio": round(slowest / both, 1),
                }
            )
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
