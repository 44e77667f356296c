"""Joint refinement: guarded coordinate descent over the codes of L, R and Q in turn.

With two of the three held fixed the loss is a quadratic in the third, so a code is changed only
where that lowers the loss itself. Unlike another round, which rounds from scratch, this can only
gain.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.factors import (
    LowRank,
    QuantisedFactor,
    ascending_levels,
    factor_book,
    fit_left,
)
from lplr_q.linalg.ldlq import CodebookBlocks, guarded_sweep
from lplr_q.linalg.rows import row_chunks


def _ridge(normal: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """Small enough to change nothing, and positive even where the factors vanish."""
    size = 1e-6 * float(normal.diagonal().mean()) + 1e-30
    return size * torch.eye(len(normal)).to(normal)


def sweep_left(
    target: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"], low: LowRank
) -> LowRank:
    """New codes of L where they lower tr((L - L*) R H R^T (L - L*)^T), L* the best L for R; the
    same ones where they cannot be swept."""
    if not sweepable(low.left):
        return low
    right = low.right.decode()
    scale = low.left.scales.view(torch.bfloat16).float()
    blocks = CodebookBlocks(factor_book(low.left.codebook, low.left.bits), len(scale))
    normal = (right @ hessian @ right.T) * scale * scale[:, None]
    codes, _ = guarded_sweep(
        fit_left(target, hessian, right) / scale,
        normal + _ridge(normal),
        blocks,
        [component[:, None] for component in low.left.codes],
        low.left.decode().T / scale,
    )
    return replace(low, left=replace(low.left, codes=torch.cat(codes, dim=1).T.contiguous()))


def sweep_right(
    target: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"], low: LowRank
) -> LowRank:
    """New codes of R, one input (column of R, all components) at a time.

    Column j aims at R_j + (L^T L)^-1 (L^T E H)_j / H_jj and is taken if
    H_jj d^T (L^T L) d - 2 d^T (L^T E H)_j < 0. The steps run on NumPy views, see
    :mod:`lplr_q.linalg.scalar_ldlq`. Codes that cannot be swept stay as they are.
    """
    if not sweepable(low.right):
        return low
    left, right = low.left.decode().T, low.right.decode()
    normal = left.T @ left
    inverse = torch.linalg.inv(normal + _ridge(normal))
    levels = ascending_levels(factor_book(low.right.codebook, low.right.bits))
    assert levels is not None
    pulled = sum(left[c].T @ (target[c] - left[c] @ right) for c in row_chunks(len(target)))
    gradient = (pulled @ hessian).T.contiguous()
    arrays = (normal, inverse, low.right.scales.view(torch.bfloat16).float(), levels, hessian)
    chosen = _descend(
        right.T.contiguous().cpu().numpy(),
        gradient.cpu().numpy(),
        low.right.codes.T.contiguous().cpu().numpy(),
        *(array.cpu().numpy() for array in arrays),
    )
    codes = torch.from_numpy(chosen).T.contiguous().to(low.right.codes.device)
    return replace(low, right=replace(low.right, codes=codes))


def _descend(
    rows: np.ndarray,
    gradient: np.ndarray,
    codes: np.ndarray,
    normal: np.ndarray,
    inverse: np.ndarray,
    scale: np.ndarray,
    levels: np.ndarray,
    hessian: np.ndarray,
) -> np.ndarray:
    """The steps of :func:`sweep_right` on R^T, (L^T E H)^T and the codes of R^T."""
    rows, codes, bounds = rows.copy(), codes.copy(), (levels[1:] + levels[:-1]) / 2
    for j in range(len(rows) - 1, -1, -1):
        aim = rows[j] + (inverse @ gradient[j]) / hessian[j, j]
        new = np.searchsorted(bounds, aim / scale)
        points = levels[new] * scale
        delta = points - rows[j]
        pull = normal @ delta
        if float(delta @ (hessian[j, j] * pull - 2 * gradient[j])) < 0:
            rows[j], codes[j] = points, new
            gradient -= hessian[j][:, None] * pull
    return codes


def sweepable(factor: QuantisedFactor) -> bool:
    """Whether the codes are scalar, with a scale per component."""
    if factor.bits == 16:
        return False
    return ascending_levels(factor_book(factor.codebook, factor.bits)) is not None


def refinable(low: LowRank) -> bool:
    """Whether there is anything to sweep in L or R."""
    return sweepable(low.left) or sweepable(low.right)
