"""What every codebook loses on Gaussian weights, and what finding and reading its codes costs.

    python benchmarks/lplr_q/codebooks.py

Per codebook and width: squared error per weight on unit Gaussians at the codebook's own scale,
beside the bound 4^-bits; relative error e of LDLQ on the reference problem after rotation, without
and with two guarded sweeps; CPU seconds per 100 000 weights of encoding in torch and, where there
is one, in C (forms timed in turn, the smallest counts), and of decoding. For E8P and trellises
also the plain form the fast one is tested against. Figures are written beside this file.
"""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from lplr_q import native
from lplr_q.codebooks.base import make_codebook
from lplr_q.codebooks.e8p import reference_encode_e8p
from lplr_q.codebooks.trellis import reference_circle
from lplr_q.linalg.hadamard import random_signs, rotate_hessian, rotate_weight
from lplr_q.linalg.ldl import block_ldl
from lplr_q.linalg.ldlq import CodebookBlocks, guarded_sweep, ldlq, weighted_loss
from lplr_q.reference_problem import reference_problem
from workbench.tables import write_csv

BOOKS = [
    *(("lloyd-max", bits) for bits in (2, 3, 4)),
    *(("e8p", bits) for bits in (2, 3, 4)),
    *((f"tcq-8-{kind}", 2) for kind in ("random", "3inst", "1mad-16x16", "1mad")),
    ("tcq-8", 2),
    *((f"tcq-10-{kind}", 2) for kind in ("1mad-16x16", "1mad")),
    *(("tcq", bits) for bits in (1, 2, 3, 4)),
    ("tcq-12", 2),
]
MULTIPLIER = {"lloyd-max": 1.0, "tcq": 1.0, "tcq-8": 1.0}
"""Of the input scale inside of LDLQ, 0.95 for the others."""


@contextmanager
def without_c():
    """In it the codebooks run in torch, whether C was compiled or not."""
    before = os.environ.get("FIVEFOLD_NATIVE")
    os.environ["FIVEFOLD_NATIVE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FIVEFOLD_NATIVE"]
        else:
            os.environ["FIVEFOLD_NATIVE"] = before


def seconds(function: Callable, repeats: int) -> float:
    """Smallest CPU seconds."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        function()
        best = min(best, time.process_time() - begin)
    return best


def in_torch(book, x):
    """Codes of x by the torch form of the encoder."""
    with without_c():
        return book.encode(x)


def plain(book, x):
    """The readable encoder, on as little as it needs to be timed."""
    if book.name == "e8p":
        few = x[:2000]
        return few.numel(), lambda: reference_encode_e8p(few)
    if hasattr(book, "window"):
        from lplr_q.codebooks.tcq import trellis_table

        few = x.reshape(-1)[:24].clone()
        table = trellis_table(book.window, book.kind, int(book.bits))
        return few.numel(), lambda: reference_circle(few, table, int(book.bits))
    return 0, None


def on_reference(book, problem) -> list[float]:
    """e after LDLQ and after two sweeps."""
    weight, hessian, total = problem
    blocks = CodebookBlocks(book, weight.shape[1], multiplier=MULTIPLIER.get(book.name, 0.95))
    codes, points = ldlq(weight, block_ldl(hessian, book.dim).lower, blocks)
    errors = [(weighted_loss(weight - points, hessian) / total) ** 0.5]
    for _ in range(2):
        codes, points = guarded_sweep(weight, hessian, blocks, codes, points)
    return [*errors, (weighted_loss(weight - points, hessian) / total) ** 0.5]


def rotated_reference():
    """(weight of unit rms, Hessian, loss of zero) of the reference problem, both sides rotated."""
    weight, hessian = reference_problem()
    generator = torch.Generator().manual_seed(0)
    signs_in, signs_out = random_signs(512, generator), random_signs(512, generator)
    weight = rotate_weight(weight, signs_out, signs_in)
    weight = weight / weight.square().mean().sqrt()
    hessian = rotate_hessian(hessian.double(), signs_in).float()
    return weight, hessian, weighted_loss(weight, hessian)


def measure(name: str, bits: int, problem, weights: int, repeats: int) -> dict:
    """Gaussian error, error on the reference problem and times per weight of one codebook."""
    book = make_codebook(name, bits)
    high = getattr(book, "rows", 1) * 16
    shape = (high, weights // high // book.dim, book.dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean().sqrt()
    scaled = x * book.opt_scale
    codes = book.encode(scaled)
    mse = float((book.decode(codes) / book.opt_scale - x).square().mean())
    after, swept = on_reference(book, problem)
    per = 1e5 / x.numel()
    count, slow = plain(book, scaled.reshape(-1, book.dim) if name == "e8p" else scaled)
    compiled = name != "lloyd-max" and native.library() is not None
    return {
        "codebook": name,
        "bits": bits,
        "mse": mse,
        "mse_over_bound": mse * 4.0**bits,
        "e_ldlq": after,
        "e_two_sweeps": swept,
        "plain_seconds": seconds(slow, 1) * 1e5 / count if slow else "",
        "torch_seconds": seconds(lambda: in_torch(book, scaled), repeats) * per,
        "c_seconds": seconds(lambda: book.encode(scaled), repeats) * per if compiled else "",
        "decode_seconds": seconds(lambda: book.decode(codes), repeats) * per,
    }


def main(weights: int, repeats: int, output: Path) -> None:
    """Measure all codebooks, print and write the table."""
    torch.set_num_threads(1)
    print(native.status())
    problem = rotated_reference()
    print(
        "codebook           bits    mse  x bound  e ldlq  e +2 sweeps   "
        "us/weight: plain   torch       C  decode"
    )
    rows = []
    for name, bits in BOOKS:
        row = measure(name, bits, problem, weights, repeats)
        rows.append(row)
        times = [row[k] for k in ("plain_seconds", "torch_seconds", "c_seconds", "decode_seconds")]
        shown = " ".join(f"{10 * t:7.3f}" if t != "" else "      -" for t in times)
        print(
            f"{name:18s} {bits:4d} {row['mse']:.4f} {row['mse_over_bound']:8.3f} "
            f"{row['e_ldlq']:7.4f} {row['e_two_sweeps']:12.4f} {'':11s}{shown}"
        )
    write_csv(output, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.weights, arguments.repeats, arguments.output)
