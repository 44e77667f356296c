"""Seconds of a training step of every decaying layer, its scan as naive loop and as fast form.

    python benchmarks/mad/recurrences.py [--batch 32] [--length 128] [--repeats 3]

Both are the whole layer, projections and all, at width 128, forward and backward; only the
recurrence differs: the equation token by token under autograd, or what `forward` does. One process,
one thread, in turns, best of the repeats. `factored` and `halved` are the two chunk forms of
per-channel decays. Writes benchmarks/mad/recurrences.csv. Goals at batch 32 and length 128: Mamba
at least 5 x, gated linear attention at least 2.5 x; the exit status is 1 when one is missed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.layers.decay import channel_decay_recurrent
from mad.layers.mlstm import mlstm_recurrent
from mad.layers.retnet import retention_recurrent
from mad.registry import parse_layer
from workbench.mamba import chunked_scan, selective_scan
from workbench.tables import to_markdown, write_csv

GOALS = {"mamba": 5.0, "mh-gated-linear-attention": 2.5}


def loop_mamba(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The selective scan, token by token."""
    return selective_scan(*tensors, kernel="reference")


def loop_mamba2(*tensors: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan with one decay per head, token by token."""
    del chunk
    return chunked_scan(*tensors, kernel="reference")


def loop_channel_decay(*tensors: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence with one decay per channel, token by token."""
    del form
    return channel_decay_recurrent(*tensors)


def loop_retention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma: torch.Tensor, zeta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Retention, token by token."""
    return retention_recurrent(q, k, v, gamma[:, None] * zeta)


def loop_mlstm(*tensors: torch.Tensor, chunk: int) -> tuple[torch.Tensor, tuple]:
    """mLSTM, token by token."""
    del chunk
    return mlstm_recurrent(*tensors)


CASES: list[tuple[str, str, str, Callable]] = [
    ("mamba", "mad.layers.mamba", "selective_scan", loop_mamba),
    (
        "mh-gated-linear-attention",
        "mad.layers.gla",
        "channel_decay_chunked",
        loop_channel_decay,
    ),
    (
        "mh-gated-linear-attention,form=halved",
        "mad.layers.gla",
        "channel_decay_chunked",
        loop_channel_decay,
    ),
    ("mamba2", "mad.layers.mamba2", "chunked_scan", loop_mamba2),
    ("retnet", "mad.layers.retnet", "retention_chunked", loop_retention),
    ("rwkv6-time-mixer", "mad.layers.rwkv", "channel_decay_chunked", loop_channel_decay),
    (
        "rwkv6-time-mixer,form=factored",
        "mad.layers.rwkv",
        "channel_decay_chunked",
        loop_channel_decay,
    ),
    ("rwkv5-time-mixer", "mad.layers.rwkv", "channel_decay_chunked", loop_channel_decay),
    ("mlstm", "mad.layers.mlstm", "mlstm_chunked", loop_mlstm),
]


def step_seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    begin = time.process_time()
    layer(x).sum().backward()
    return time.process_time() - begin


def main() -> int:
    """Print and write the table; the exit status is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, missed = [], []
    for text, module, name, loop in CASES:
        torch.manual_seed(0)
        layer = parse_layer(text).make(128, options.length)
        x = torch.randn(options.batch, options.length, 128)
        loops, fasts = [], []
        step_seconds(layer, x)  # warm
        for _ in range(options.repeats):
            fasts += [step_seconds(layer, x), step_seconds(layer, x)]
            with patch(f"{module}.{name}", loop):
                loops.append(step_seconds(layer, x))
        ratio = min(loops) / min(fasts)
        rows.append(
            {
                "layer": text,
                "batch": options.batch,
                "length": options.length,
                "loop_ms": round(1e3 * min(loops), 1),
                "fast_ms": round(1e3 * min(fasts), 1),
                "ratio": round(ratio, 2),
            }
        )
        if ratio < GOALS.get(text, 0.0):
            missed.append(text)
    print(to_markdown(rows))
    write_csv(options.out, rows)
    published = options.batch == 32 and options.length == 128
    return int(published and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
