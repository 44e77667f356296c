"""Seconds of a training step of Hyena's two exact forms, in one process.

    python benchmarks/mad/hyena.py [--length 128] [--batch 16]

The quadratic Toeplitz form beside the FFT form, forward and backward, best of five in turns. Goal:
multi-head Hyena at least 6 x at length 128.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.registry import parse_layer
from workbench.tables import to_markdown


def step_seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    begin = time.process_time()
    layer(x).sum().backward()
    return time.process_time() - begin


def main() -> int:
    """Print the table; the exit status is 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in ("hyena", "mh-hyena"):
        torch.manual_seed(0)
        forms = {
            kernel: parse_layer(f"{name},kernel={kernel}").make(128, options.length)
            for kernel in ("fft", "toeplitz")
        }
        x = torch.randn(options.batch, options.length, 128)
        seconds = {kernel: [] for kernel in forms}
        for _ in range(6):
            for kernel, layer in forms.items():
                seconds[kernel].append(step_seconds(layer, x))
        best = {kernel: min(values[1:]) for kernel, values in seconds.items()}
        rows.append(
            {
                "layer": name,
                "fft_ms": round(1e3 * best["fft"], 1),
                "toeplitz_ms": round(1e3 * best["toeplitz"], 1),
                "ratio": round(best["fft"] / best["toeplitz"], 2),
            }
        )
    print(to_markdown(rows))
    return int(options.length == 128 and rows[-1]["ratio"] < 6)


if __name__ == "__main__":
    raise SystemExit(main())
