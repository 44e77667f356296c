"""Muon in batched float32 beside torch.optim.Muon, on the matrices of micro-mistral.

    python benchmarks/backbones/bench_muon.py

Prints seconds per step of both in one process (medians of alternating repeats) and their ratio.
"""

import statistics
import time

import torch

from workbench.backbones.muon import Muon
from workbench.backbones.recipes import MICRO_MISTRAL
from workbench.backbones.training import build_model

REPEATS = 5


def main() -> None:
    """One step of each on the matrices of micro-mistral."""
    torch.set_num_threads(1)
    model = build_model(MICRO_MISTRAL)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "proj" in n]
    generator = torch.Generator().manual_seed(0)
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator)
    contenders = {"ours, float32, batched": Muon(matrices, lr=0.0)}
    if hasattr(torch.optim, "Muon"):
        contenders["torch.optim.Muon"] = torch.optim.Muon(matrices, lr=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(REPEATS + 1):
        for name, optimiser in contenders.items():
            began = time.process_time()
            optimiser.step()
            if repeat:  # the first is warm-up
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("optimiser,cpu_seconds_per_step,ratio_to_ours")
    for name, median in medians.items():
        print(f"{name},{median:.4f},{median / next(iter(medians.values())):.1f}")


if __name__ == "__main__":
    main()
