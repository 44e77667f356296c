"""Chunks against the masked product, picked experts against all of them, in one process.

    python benchmarks/mad/forms.py

Milliseconds of forward and backward, best of five in turns, on one thread. Linear attention of 16
heads at width 128, batch 4: the masked product grows with the square of the length, chunks do not.
Mixtures of eight experts, two active, over 1 024 tokens: sorting tokens pays above some hundred
hidden units. Goals: chunks at least 2 x at length 512, sorting at least 2 x at 256 units an expert.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.registry import parse_layer
from workbench.tables import to_markdown


def compare(slow: str, fast: str, x: torch.Tensor) -> dict[str, float]:
    """Best of five training steps of two forms of one layer, and their ratio."""
    layers, best = [parse_layer(text).make(128, x.shape[1]) for text in (slow, fast)], [1e9, 1e9]
    for turn in range(6):
        for i, layer in enumerate(layers):
            begin = time.process_time()
            layer(x).sum().backward()
            if turn:
                best[i] = min(best[i], time.process_time() - begin)
    return {
        "slow_ms": round(1e3 * best[0], 1),
        "fast_ms": round(1e3 * best[1], 1),
        "ratio": round(best[0] / best[1], 2),
    }


def main() -> int:
    """Print both tables; the exit status is 1 when a goal is missed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    attention = [
        {"length": length}
        | compare(
            "mh-linear-attention,form=parallel",
            "mh-linear-attention,form=chunked",
            torch.randn(4, length, 128),
        )
        for length in (64, 128, 256, 512)
    ]
    print("linear attention: masked product (slow), chunks of 64 (fast)\n")
    print(to_markdown(attention))
    experts = [
        {"units_per_expert": units}
        | compare(
            f"moe-mlp,hidden={units},kernel=dense",
            f"moe-mlp,hidden={units},kernel=dispatch",
            torch.randn(8, 128, 128),
        )
        for units in (16, 64, 256)
    ]
    print("\nmixture of experts: all computed (slow), picked ones (fast)\n")
    print(to_markdown(experts))
    return int(attention[-1]["ratio"] < 2 or experts[-1]["ratio"] < 2)


if __name__ == "__main__":
    raise SystemExit(main())
