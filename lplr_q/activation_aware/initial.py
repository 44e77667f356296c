"""Where the alternation starts: the first L R, before any Q.

``lr_first``  the rank-r optimum for W.
``q_first``   L R = 0.
``odlri``     the rank-r optimum for W seen through its outlier channels only: the k channels with
              the largest H_jj, k = max(r, n / 100); L and R meet the outliers, Q need not.
              [ODLRI]
``srr``       the first k components preserve W, the other r - k repair W - Q; k minimises
              rho_k(W C) rho_{r-k}(noise), rho_k(A)^2 = sum_{i>k} S_i^2 / sum S_i^2.   [SRR]
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.factors import fit_right
from lplr_q.activation_aware.prepared import PreparedHessian
from lplr_q.linalg.hadamard import rotate_rows
from lplr_q.linalg.ldl import cholesky
from lplr_q.linalg.regression import cholesky_whitening, rank_constrained_regression

INITS = ("lr_first", "q_first", "odlri", "srr")


def outlier_channels(prepared: PreparedHessian, rank: int) -> Float[Tensor, "k n"]:
    """Unit vectors of the outlier channels, in the basis of ``prepared``."""
    n = prepared.matrix.shape[0]
    energy = prepared.matrix.diagonal() if prepared.channels is None else prepared.channels
    count = min(n, max(rank, n // 100))
    chosen = energy.argsort(descending=True, stable=True)[:count].sort().values
    rows = torch.zeros(count, n, dtype=torch.float32, device=prepared.matrix.device)
    rows[torch.arange(count), chosen] = 1.0
    if prepared.signs_in is None:
        return rows
    return rotate_rows(rows, prepared.signs_in, prepared.rotation)


def odlri_start(
    target: Float[Tensor, "m n"], prepared: PreparedHessian, rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """L and R that fit W best on its outlier channels at rank r.

    The restricted problem leaves R free on all other channels; there R = L^+ W, which is also its
    optimum for this L on the outlier channels themselves.
    """
    rows = outlier_channels(prepared, rank)
    hessian = rows.double() @ prepared.matrix.double() @ rows.double().T
    whitening = cholesky_whitening(cholesky((hessian + hessian.T) / 2))
    left, _, _ = rank_constrained_regression(target @ rows.T, whitening, rank)
    return left, fit_right(target, left)


def tail_ratios(values: Float[Tensor, " k"]) -> Float[Tensor, " k+1"]:
    """rho_0 .. rho_k of singular values in descending order."""
    square = values.double().square()
    tails = torch.cat([square.flip(0).cumsum(0).flip(0), square.new_zeros(1)])
    return (tails / tails[0].clamp_min(1e-300)).sqrt().to(values.dtype)


def srr_split(target: Float[Tensor, "m n"], prepared: PreparedHessian, rank: int) -> int:
    """The number k of components that preserve W.

    Rounding with feedback leaves, seen through C, white noise times the pivots of H: the noise is
    drawn so, from a generator of its own.
    """
    whitening = prepared.whitening()
    weight_tail = tail_ratios(torch.linalg.svdvals(target @ whitening.forward))
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(*target.shape, generator=generator).to(target)
    noise_tail = tail_ratios(torch.linalg.svdvals(white * whitening.forward.diagonal()))
    scores = [float(weight_tail[k] * noise_tail[rank - k]) for k in range(rank + 1)]
    best = min(range(rank + 1), key=scores.__getitem__)
    return best if math.isfinite(scores[best]) else rank
