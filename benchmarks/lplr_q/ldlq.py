"""Ratios of the fast forms to the plain ones, measured in one process on one thread.

    python benchmarks/lplr_q/linalg/ldlq.py

Lazy-batched LDLQ against one full-width product per block, the class search of the E8P encoder
against scoring all 256 patterns, and the fast Hadamard transform against a dense product. Both
forms of a pair are timed alternately; the ratio of the smallest CPU times is printed and written
beside this file.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lplr_q.codebooks.base import make_codebook
from lplr_q.codebooks.e8p import encode_e8p, reference_encode_e8p
from lplr_q.linalg.hadamard import dense_hadamard, hadamard_transform
from lplr_q.linalg.ldl import block_ldl
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, reference_ldlq
from lplr_q.reference_problem import reference_problem
from workbench.tables import write_csv


class PlainBlocks(CodebookBlocks):
    """The same blocks with the plain encoder."""

    def quantise(self, target, block):
        codes = reference_encode_e8p((target * self.scale).float())[:, None]
        return codes, self.codebook.decode(codes).to(target.dtype) / self.scale


def smallest(first: Callable, second: Callable, repeats: int) -> tuple[float, float]:
    """Smallest CPU seconds of both, run alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, found in zip((first, second), times, strict=True):
            begin = time.process_time()
            function()
            found.append(time.process_time() - begin)
    return min(times[0]), min(times[1])


def main(repeats: int, size: int, output: Path) -> None:
    torch.set_num_threads(1)
    weight, hessian = reference_problem(n=size)
    weight = weight / weight.square().mean().sqrt()
    lower = block_ldl(hessian, 8).lower.float()
    codebook = make_codebook("e8p", 2)
    blocks, plain = CodebookBlocks(codebook, size), PlainBlocks(codebook, size)
    vectors = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) * 1.03
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    theta = dense_hadamard(4096, torch.float32)
    pairs = {
        "LDLQ pass, lazy feedback": (
            lambda: reference_ldlq(weight, lower, blocks),
            lambda: ldlq(weight, lower, blocks),
        ),
        "LDLQ pass, lazy feedback and fast encoder": (
            lambda: reference_ldlq(weight, lower, plain),
            lambda: ldlq(weight, lower, blocks),
        ),
        "E8P encode, 20 000 vectors": (
            lambda: reference_encode_e8p(vectors),
            lambda: encode_e8p(vectors),
        ),
        "Hadamard, n = 4096, 256 rows": (lambda: x @ theta.T, lambda: hadamard_transform(x)),
    }
    rows = []
    for name, (reference, fast) in pairs.items():
        slow_seconds, fast_seconds = smallest(reference, fast, repeats)
        rows.append(
            {
                "item": name,
                "plain_seconds": slow_seconds,
                "fast_seconds": fast_seconds,
                "ratio": slow_seconds / fast_seconds,
            }
        )
        print(f"{name:45s} {slow_seconds:8.4f} s {fast_seconds:8.4f} s  {rows[-1]['ratio']:6.1f} x")
    write_csv(output, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.repeats, arguments.size, arguments.output)
