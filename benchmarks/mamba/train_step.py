"""Seconds of a training step of transformers' Mamba classes: stock path against the hook.

    OMP_NUM_THREADS=1 python benchmarks/mamba/train_step.py --time 64 256

Both in one process, one after the other, CPU seconds of one thread, best of `--repeats` for ours.
Writes benchmarks/mamba/train_step.csv and prints it.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("USE_HUB_KERNELS", "0")

import torch
from transformers import (  # noqa: TID253  (a script of its own)
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from workbench.mamba import fast_mamba


def build(family: str, width: int, layers: int) -> torch.nn.Module:
    """A random model by transformers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": width, "num_hidden_layers": layers}
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(state_size=16, **sizes)).train()
    own = {"state_size": 64, "head_dim": 32, "num_heads": 2 * width // 32, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(tie_word_embeddings=True, **sizes, **own)).train()


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float, list[torch.Tensor]]:
    """CPU seconds, loss and gradients of one forward and backward pass."""
    model.zero_grad()
    start = time.process_time()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    seconds = time.process_time() - start
    return seconds, loss.item(), [p.grad.clone() for p in model.parameters()]


def measure(family: str, batch: int, length: int, width: int, layers: int, repeats: int) -> dict:
    """Stock against fast: seconds, their ratio, and how far losses and gradients differ."""
    model = build(family, width, layers)
    ids = torch.randint(0, 1024, (batch, length), generator=torch.Generator().manual_seed(1))
    step(model, ids[:, :8])
    stock, stock_loss, stock_gradients = step(model, ids)
    with fast_mamba():
        runs = [step(model, ids) for _ in range(repeats)]
    ours, loss, gradients = min(runs, key=lambda run: run[0])
    error = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(gradients, stock_gradients, strict=True)
    )
    return {
        "family": family,
        "batch": batch,
        "time": length,
        "width": width,
        "layers": layers,
        "stock_cpu_seconds": round(stock, 3),
        "ours_cpu_seconds": round(ours, 4),
        "ratio": round(stock / ours, 2),
        "ours_tokens_per_cpu_second": round(batch * length / ours),
        "loss_difference": f"{abs(loss - stock_loss):.1e}",
        "worst_relative_gradient_error": f"{error:.1e}",
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Measure both families at every length, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", default=["mamba", "mamba2"])
    parser.add_argument("--time", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(family, options.batch, length, options.width, options.layers, options.repeats)
        for family in options.family
        for length in options.time
    ]
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
