"""Ratios of the fast forms to the plain ones, measured in one process on one thread.

    python benchmarks/lplr_q/ldlq.py
    python benchmarks/lplr_q/ldlq.py --size 256 --width 512 --transform 1024     # a quick look

* lazy-batched LDLQ against one full-width product per block;
* the E8P encoder by classes against scoring all 256 patterns;
* a Q step (LDLQ, at most two guarded sweeps, stop rule) against the published form (plain LDLQ and
  ten plain sweeps, each block re-rounded whether or not that helps): time and error;
* an outer round with rank n / 16 (warm-started randomised SVD, factors of H kept) against one that
  decomposes H and the residual anew;
* scalar LDLQ of the factors on NumPy views against the general form;
* the Hadamard transform in stages against a dense product.

Both forms of a pair are timed alternately; the ratio of the smallest CPU times is printed and
written beside this file, with both errors where they differ.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lplr_q.activation_aware.alternation import Alternation, Problem, QRounding, quantise_q
from lplr_q.activation_aware.factors import FactorRounding, ascending_levels, fit_low_rank
from lplr_q.activation_aware.prepared import PreparedHessian, prepare_hessian
from lplr_q.codebooks.base import make_codebook
from lplr_q.codebooks.e8p import encode_e8p, reference_encode_e8p
from lplr_q.linalg.hadamard import (
    dense_hadamard,
    hadamard_transform,
    random_signs,
    rotate_weight,
)
from lplr_q.linalg.ldl import block_ldl
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, reference_ldlq, weighted_loss
from lplr_q.linalg.regression import eigen_whitening
from lplr_q.linalg.scalar_ldlq import scalar_ldlq
from lplr_q.reference_problem import reference_problem
from workbench.tables import write_csv

Pair = tuple[Callable, Callable]


class PlainBlocks(CodebookBlocks):
    """The same blocks with the plain encoder."""

    def quantise(self, target, block):
        codes = reference_encode_e8p((target * self.scale).float())[:, None]
        return codes, self.codebook.decode(codes).to(target.dtype) / self.scale


def reference_q_step(unit, lower, hessian, blocks, *, sweeps: int = 10):
    """LDLQ with one full-width product per block, then ``sweeps`` plain sweeps.

    A plain sweep sets every block to the rounding of Q_k + (W - Q) H_:k H_kk^-1, nearest in the
    Euclidean sense, whether or not the loss falls.
    """
    _, points = reference_ldlq(unit, lower, blocks)
    for _ in range(sweeps):
        for k in range(len(blocks.bounds) - 1, -1, -1):
            low, high = blocks.bounds[k]
            gradient = (unit - points) @ hessian[:, low:high]
            aim = points[:, low:high] + gradient @ torch.linalg.inv(hessian[low:high, low:high])
            points[:, low:high] = blocks.quantise(aim, k)[1]
    return points


def rotated_problem(size: int) -> tuple[torch.Tensor, PreparedHessian]:
    """The reference weight in units of its rms and rotated, and its Hessian."""
    weight, hessian = reference_problem(n=size)
    generator = torch.Generator().manual_seed(0)
    prepared = prepare_hessian(hessian, size, generator=generator, regularised=True)
    assert prepared.signs_in is not None
    rotated = rotate_weight(weight, random_signs(size, generator), prepared.signs_in)
    return rotated / rotated.square().mean().sqrt(), prepared


def ldlq_pairs(size: int) -> dict[str, Pair]:
    """Plain and fast forms of rounding, on an n x n problem."""
    unit, prepared = rotated_problem(size)
    lower, hessian = prepared.lower_for(8), prepared.single()
    book = make_codebook("e8p", 2)
    blocks, plain = CodebookBlocks(book, size), PlainBlocks(book, size)
    scalar = make_codebook("lloyd-max", 4)
    levels, factor, by_one = ascending_levels(scalar), unit[: size // 16], prepared.lower_for(1)
    assert levels is not None
    vectors = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) * 1.03
    return {
        "LDLQ pass, lazy feedback": (
            lambda: reference_ldlq(unit, lower, blocks),
            lambda: ldlq(unit, lower, blocks),
        ),
        "LDLQ pass, lazy feedback and fast encoder": (
            lambda: reference_ldlq(unit, lower, plain),
            lambda: ldlq(unit, lower, blocks),
        ),
        "E8P encode, 20 000 vectors": (
            lambda: reference_encode_e8p(vectors),
            lambda: encode_e8p(vectors),
        ),
        f"LDLQ of a factor, rank {size // 16}": (
            lambda: ldlq(factor, by_one, CodebookBlocks(scalar, size)),
            lambda: scalar_ldlq(factor, by_one, levels),
        ),
        "Q step with refinement": (
            lambda: reference_q_step(unit, lower, hessian, plain),
            lambda: quantise_q(unit, hessian, lower, QRounding(blocks)),
        ),
    }


def q_step_errors(size: int) -> tuple[float, float]:
    """e of the published form and of ours."""
    unit, prepared = rotated_problem(size)
    lower, hessian = prepared.lower_for(8), prepared.single()
    blocks = CodebookBlocks(make_codebook("e8p", 2), size)
    plain = reference_q_step(unit, lower, hessian, blocks)
    codes, scale, _ = quantise_q(unit, hessian, lower, QRounding(blocks))
    ours = blocks.decode(codes) * scale
    total = weighted_loss(unit, hessian)
    return tuple(math.sqrt(weighted_loss(unit - q, hessian) / total) for q in (plain, ours))  # type: ignore[return-value]


def round_pair(width: int) -> tuple[Pair, tuple[float, float]]:
    """One outer round, second of a run, with everything anew and with what is kept; the errors."""
    unit, prepared = rotated_problem(width)
    rank, hessian = width // 16, prepared.single()
    rounding = QRounding(CodebookBlocks(make_codebook("e8p", 2), width), sweeps=0)
    by_one = prepared.lower_for(1)
    factors = FactorRounding(4, "lloyd-max", lambda: by_one)
    problem = Problem(unit, prepared, rounding, rank=rank)
    run = Alternation(problem, ("LR", "Q"), "lr_first", "plain")
    run.round(1)
    first, subspace = run.state, None if run.svd is None else run.svd.subspace
    total, errors = weighted_loss(unit, hessian), {}

    def anew() -> None:
        whitening = eigen_whitening(hessian)
        left = first.remainder(problem, lr=False).whole()
        low = fit_low_rank(left, hessian, whitening, rank=rank, rounding=factors)
        lower = block_ldl(prepared.matrix, 8).lower.float()
        codes, scale, _ = quantise_q(unit - low.product(), hessian, lower, rounding)
        q = rounding.blocks.decode(codes) * scale
        errors["anew"] = math.sqrt(weighted_loss(unit - q - low.product(), hessian) / total)

    def kept() -> None:
        run.state = first
        if run.svd is not None:
            run.svd.subspace = subspace
        run.round(2)
        errors["kept"] = run.history[-1]["error"]

    anew()
    kept()
    return (anew, kept), (errors["anew"], errors["kept"])


def smallest(pair: Pair, repeats: int) -> tuple[float, float]:
    """Smallest CPU seconds of both, run alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, found in zip(pair, times, strict=True):
            begin = time.process_time()
            function()
            found.append(time.process_time() - begin)
    return min(times[0]), min(times[1])


def hadamard_pairs(transform: int) -> dict[str, Pair]:
    """Dense product and stages on a square matrix, into memory that exists and into new memory."""
    x = torch.randn(transform, transform, generator=torch.Generator().manual_seed(0))
    theta, out = dense_hadamard(transform, torch.float32), torch.empty_like(x)
    name = f"Hadamard, n = {transform}, {transform} rows"
    return {
        name: (lambda: torch.mm(x, theta.T, out=out), lambda: hadamard_transform(x, out=out)),
        f"{name}, result in new memory": (lambda: x @ theta.T, lambda: hadamard_transform(x)),
    }


def main(repeats: int, size: int, width: int, transform: int, output: Path) -> None:
    """Time every pair, print and write the ratios."""
    torch.set_num_threads(1)
    errors: dict[str, tuple[float, float]] = {"Q step with refinement": q_step_errors(size)}
    pairs = {**ldlq_pairs(size), **hadamard_pairs(transform)}
    name = f"outer round, n = {width}, rank {width // 16}"
    pairs[name], errors[name] = round_pair(width)
    rows = []
    for item, pair in pairs.items():
        slow, fast = smallest(pair, repeats)
        plain_error, fast_error = errors.get(item, (math.nan, math.nan))
        rows.append(
            {
                "item": item,
                "plain_seconds": slow,
                "fast_seconds": fast,
                "ratio": slow / fast,
                "plain_error": "" if math.isnan(plain_error) else plain_error,
                "fast_error": "" if math.isnan(fast_error) else fast_error,
            }
        )
        note = "" if math.isnan(plain_error) else f"   e {plain_error:.4f} -> {fast_error:.4f}"
        print(f"{item:50s} {slow:8.4f} s {fast:8.4f} s  {slow / fast:6.1f} x{note}", flush=True)
    write_csv(output, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--transform", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(
        arguments.repeats,
        arguments.size,
        arguments.width,
        arguments.transform,
        arguments.output,
    )
