"""Hyena's forms in one process: Toeplitz against FFT, and what is carried from token to token.

    python benchmarks/mad/hyena.py [--length 128] [--batch 16]

First the seconds of a training step of the quadratic Toeplitz form beside the FFT form, forward and
backward, best of five in turns; goal: multi-head Hyena at least 6 x at length 128. Then parameters,
published state (channels times filter order), state as carried and multiply-adds, with the
milliseconds of one more token after `--length` of them: a filter of no special form reads its whole
history, a rational one its few modes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.registry import parse_layer
from workbench.tables import to_markdown

LAYERS = ("hyena", "mh-hyena", "hyena-experts")


def make(text: str, length: int) -> torch.nn.Module:
    """A layer of the published width, from a fixed seed."""
    torch.manual_seed(0)
    return parse_layer(text).make(128, length)


def step_seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    begin = time.process_time()
    layer(x).sum().backward()
    return time.process_time() - begin


@torch.no_grad()
def token_seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """CPU seconds of the last token of these, best of five."""
    state = layer.initial_state(len(x))
    for t in range(x.shape[1] - 1):
        _, state = layer.step(x[:, t], state)
    found = []
    for _ in range(5):
        begin = time.process_time()
        layer.step(x[:, -1], state)
        found.append(time.process_time() - begin)
    return min(found)


def training(length: int, batch: int) -> list[dict]:
    """A row per layer: milliseconds of both forms."""
    rows = []
    for name in LAYERS:
        forms = {kernel: make(f"{name},kernel={kernel}", length) for kernel in ("fft", "toeplitz")}
        x = torch.randn(batch, length, 128)
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
    return rows


def accounts(length: int) -> list[dict]:
    """A row per layer and filter: what it costs."""
    rows = []
    for text in [f"{name}{option}" for name in LAYERS for option in ("", ",filter=rtf")]:
        layer = make(text, length)
        cost = layer.accounting(length)
        rows.append(
            {
                "layer": text,
                "parameters": cost.params,
                "published_state": cost.matrix_state_floats,
                "carried_state": cost.state_floats,
                "flops_per_token": cost.flops_per_token,
                "token_ms": round(1e3 * token_seconds(layer, torch.randn(1, length, 128)), 2),
            }
        )
    return rows


def main() -> int:
    """Print the tables; the exit status is 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = training(options.length, options.batch)
    print(to_markdown(rows))
    print()
    print(to_markdown(accounts(options.length)))
    ratio = next(row["ratio"] for row in rows if row["layer"] == "mh-hyena")
    return int(options.length == 128 and ratio < 6)


if __name__ == "__main__":
    raise SystemExit(main())
