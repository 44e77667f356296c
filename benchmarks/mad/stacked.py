"""Seconds of a stacked training step beside the same replicas one after the other, in one process.

    python benchmarks/mad/stacked.py [--replicas 1 6 24] [--csv benchmarks/mad/stacked.csv]
    python benchmarks/mad/stacked.py --device cuda --width 128 --batch 128 --length 128

R trainings that differ in learning rate and seed, once as one stack (`mad.stacked`), once one after
the other with torch's own modules and optimiser as in `mad.train`, in turns. Seconds of a step of
all R (CPU seconds on a CPU, else by the clock), best of five. Goals on a GPU: 4 x at R = 6, 10 x at
R = 24. On a CPU no gain is expected and none is asked for.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mad.protocols import build_optimizer
from mad.stacked import Replicas
from mad.tasks.task import IGNORE
from mad.train import Experiment
from workbench.optim import clip
from workbench.tables import to_markdown, write_csv

GOALS = {6: 4.0, 24: 10.0}


class Solo:
    """One training as `mad.train` runs it, on the rows of a replica."""

    def __init__(self, experiment: Experiment, device: torch.device) -> None:
        self.source = Replicas([experiment], device, torch.float32)
        self.model = self.source.template
        self.optimizer = build_optimizer(
            self.model, "adamw", lr=experiment.lr, weight_decay=0.0, protocol=experiment.protocol
        )

    def train_step(self, step: int) -> None:
        """Forward, backward, clip, update; a look at the loss, as a run takes it."""
        ids, targets = (part[0] for part in self.source.batch(step))
        logits = self.model(ids).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.long().flatten(), ignore_index=IGNORE)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip(self.model.parameters(), 1.0)
        assert math.isfinite(float(loss.detach()))
        assert math.isfinite(float(norm))
        self.optimizer.step()


def seconds(trainings: Sequence[Replicas | Solo], step: int, device: torch.device) -> float:
    """Seconds of one step of every training."""
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    begin = clock()
    for training in trainings:
        training.train_step(step)
    if cuda:
        torch.cuda.synchronize()
    return clock() - begin


def main() -> int:
    """Print the table; the exit status is 1 when a goal is missed on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 6, 24])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", nargs="+", default=["mh-attention", "swiglu"] * 2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows, missed = [], False
    for count in options.replicas:
        experiments = [
            Experiment(
                layers=tuple(options.layers),
                seq_len=options.length,
                num_train_examples=20 * options.batch,
                num_test_examples=8,
                dim=options.width,
                batch_size=options.batch,
                lr=1e-4 * (1 + r % 6),
                seed=r // 6,
            )
            for r in range(count)
        ]
        together = [Replicas(experiments, device, torch.float32)]
        apart = [Solo(one, device) for one in experiments]
        taken = [
            (seconds(together, step, device), seconds(apart, step, device)) for step in range(1, 9)
        ][3:]
        stacked, sequential = (min(column) for column in zip(*taken, strict=True))
        ratio = sequential / stacked
        missed = missed or ratio < GOALS.get(count, 0.0)
        rows.append(
            {
                "replicas": count,
                "device": options.device,
                "sequential_ms": round(1e3 * sequential, 1),
                "stacked_ms": round(1e3 * stacked, 1),
                "ratio": round(ratio, 2),
            }
        )
    print(to_markdown(rows))
    if options.csv:
        write_csv(options.csv, rows)
    return int(device.type == "cuda" and missed)


if __name__ == "__main__":
    raise SystemExit(main())
