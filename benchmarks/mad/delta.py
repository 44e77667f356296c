"""Seconds of the delta rules in chunks beside the loop over time, in one process.

    python benchmarks/mad/delta.py [--length 128] [--batch 32] [--csv benchmarks/mad/delta.csv]

Forward and backward on one thread, best of five in turns: the bare rules (8 heads of 16), and whole
layers of width 128, whose projections are the same in both forms. Goal: every rule at least 3 x at
batch 32, length 128.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.layers.delta import delta_rule_chunked, delta_rule_recurrent, unit
from mad.layers.rwkv7 import generalised_delta_chunked, generalised_delta_recurrent
from mad.registry import parse_layer
from workbench.tables import to_markdown, write_csv

LAYERS = ("deltanet", "gated-deltanet", "rwkv7")


def seconds(compute, cotangent: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    begin = time.process_time()
    compute().backward(cotangent)
    return time.process_time() - begin


def compare(name: str, fast, loop, cotangent: torch.Tensor) -> dict[str, str | float]:
    """One row: both forms in turns, the first turn not counted."""
    taken = [(seconds(fast, cotangent), seconds(loop, cotangent)) for _ in range(6)][1:]
    best = [min(column) for column in zip(*taken, strict=True)]
    return {
        "what": name,
        "loop_ms": round(1e3 * best[1], 1),
        "chunked_ms": round(1e3 * best[0], 1),
        "ratio": round(best[1] / best[0], 2),
    }


def main() -> int:
    """Print the table; the exit status is 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v, cotangent = torch.randn(4, options.batch, 8, options.length, 16)
    beta, pace = torch.rand(2, options.batch, 8, options.length)
    q, k, v, beta, log_decay = (x.requires_grad_() for x in (unit(q), unit(k), v, beta, -pace))
    none = torch.zeros_like(beta)
    rows = [
        compare(
            "delta rule",
            lambda: delta_rule_chunked(q, k, v, beta)[0],
            lambda: delta_rule_recurrent(q, k, v, beta, none)[0],
            cotangent,
        ),
        compare(
            "gated delta rule",
            lambda: delta_rule_chunked(q, k, v, beta, log_decay)[0],
            lambda: delta_rule_recurrent(q, k, v, beta, log_decay)[0],
            cotangent,
        ),
    ]
    channels = (-0.6 * torch.rand_like(q)).detach().requires_grad_()
    rate = torch.rand_like(q).detach().requires_grad_()
    rows.append(
        compare(
            "generalised delta rule",
            lambda: generalised_delta_chunked(q, channels, v, v, k, rate)[0],
            lambda: generalised_delta_recurrent(q, channels, v, v, k, rate)[0],
            cotangent,
        )
    )
    x, cotangent = torch.randn(2, options.batch, options.length, 128)
    for name in LAYERS:
        layer = parse_layer(name).make(128, options.length)
        rows.append(
            compare(
                f"layer {name}",
                lambda layer=layer: layer(x),
                lambda layer=layer: layer.recurrent(x),
                cotangent,
            )
        )
    print(to_markdown(rows))
    if options.csv:
        write_csv(options.csv, rows)
    published = options.length == 128 and options.batch == 32
    return int(published and min(float(row["ratio"]) for row in rows[:3]) < 3)


if __name__ == "__main__":
    raise SystemExit(main())
