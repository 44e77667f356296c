"""Rounds on the residual, and Q + L R without activations.   [arXiv 2310.11028; 2405.18886 Alg. 1]

iterative LPLR   A_0 = A,  (L_k, R_k) = LPLR(A_k),  A_{k+1} = A_k - L_k R_k
LPLR-Q           Q <- q(A - L R),  L R <- LPLR(A - Q), in turn: the activation-aware
                 alternation with H = I
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.decompose import Decomposition, decompose, prepare_hessian
from lplr_q.bits import FactorBits
from lplr_q.data_agnostic.compressed import (
    CompressedMatrix,
    Term,
    check_matrix,
    check_rank,
    fit_affine,
)
from lplr_q.data_agnostic.lplr import compress_lplr, right_for
from workbench.errors import ConfigError


def alternate(
    matrix: Float[Tensor, "n d"], term: Term, iterations: int, bits: int, bits_right: int
) -> Term:
    """The best pair met while L = Q(A R^+) and R = Q'(L^+ A) are refitted in turn."""
    best, loss = term, _loss(matrix, term)
    for _ in range(iterations):
        left = right_for(matrix.T, term.right.transpose(), bits).transpose()
        term = Term(left, right_for(matrix, left, bits_right))
        now = _loss(matrix, term)
        if now < loss:
            best, loss = term, now
    return best


def _loss(matrix: Tensor, term: Term) -> float:
    return float((matrix - term.product(matrix.dtype)).square().sum())


def compress_iterative(
    matrix: Float[Tensor, "n d"],
    *,
    rank: int,
    bits: int = 8,
    bits_right: int | None = None,
    rounds: int = 2,
    inner_iterations: int = 2,
    sketch: str = "gaussian",
    power_iterations: int = 0,
    affine: bool = False,
    generator: torch.Generator,
) -> CompressedMatrix:
    """LPLR in ``rounds`` rounds, each on what the earlier ones left.

    ``rank`` is the total; every round takes an equal part of it and has grids of its own, so later
    rounds resolve finer values. ``inner_iterations`` refits of L and R follow each sketch. A round
    that would raise the error is left out. ``history`` holds the error after each round.
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    if not 1 <= rounds <= rank:
        raise ConfigError(f"rounds={rounds} for rank {rank}; every round needs a component")
    bits_right = bits if bits_right is None else bits_right
    residual, terms, history = matrix, [], []
    size = max(float(torch.linalg.vector_norm(matrix)), 1e-300)
    edges = [rank * k // rounds for k in range(rounds + 1)]
    for low, high in pairwise(edges):
        first = compress_lplr(
            residual,
            rank=high - low,
            bits=bits,
            bits_right=bits_right,
            sketch=sketch,
            power_iterations=power_iterations,
            generator=generator,
        ).terms[0]
        term = alternate(residual, first, inner_iterations, bits, bits_right)
        rest = residual - term.product(matrix.dtype)
        error = float(torch.linalg.vector_norm(rest)) / size
        if terms and error >= history[-1]:
            continue
        residual = rest
        terms.append(term)
        history.append(error)
    shape = (matrix.shape[0], matrix.shape[1])
    made = CompressedMatrix("iterative", shape, tuple(terms), None, history)
    return fit_affine(matrix, made) if affine else made


def compress_lplr_q(
    matrix: Float[Tensor, "n d"],
    *,
    rank: int,
    q_bits: int = 2,
    codebook: str = "lloyd-max",
    factor_bits: FactorBits = 4,
    rounds: int = 3,
    inner_iterations: int = 5,
    rotated: bool = True,
    generator: torch.Generator,
) -> Decomposition:
    """A ~ Q + L R with every direction of the input equally important (H = I).

    Without correlations there is no error to feed back: Q is plain rounding to the codebook.
    ``rotated`` spreads outliers by random Hadamard transforms on both sides. ``history`` of the
    result alternates LR and Q.
    """
    check_matrix(matrix)
    if not math.isfinite(float(matrix.float().square().sum())):
        raise ConfigError("the entries overflow float32; scale the matrix down first")
    n = matrix.shape[1]
    identity = torch.eye(n, dtype=torch.float64, device=matrix.device)
    prepared = prepare_hessian(
        identity, n, generator=generator if rotated else None, regularised=True
    )
    return decompose(
        matrix.float(),
        prepared,
        codebook=codebook,
        q_bits=q_bits,
        rank=rank,
        factor_bits=factor_bits,
        rounds=rounds,
        inner_iterations=inner_iterations,
        sweeps=0,
        feedback=False,
        generator=generator,
    )
