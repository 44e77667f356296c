"""Block LDL factorisation of a Hessian, and its regularisation.   [QuIP# §4.1]

H = M blkdiag(D_1 .. D_B) M^T,   M unit lower block triangular.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import DataError


@dataclass(frozen=True)
class BlockLDL:
    """``lower`` is M, ``diagonal[k]`` is D_k, ``bounds[k]`` the columns of block k."""

    lower: Float[Tensor, "n n"]
    diagonal: list[Tensor]
    bounds: list[tuple[int, int]]


def block_bounds(n: int, block: int) -> list[tuple[int, int]]:
    """Column ranges of width ``block``; the last one is narrower when block does not divide n.

    >>> block_bounds(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [(low, min(low + block, n)) for low in range(0, n, block)]


def cholesky(
    hessian: Float[Tensor, "n n"], *, what: str = "Hessian", single: bool | None = None
) -> Float[Tensor, "n n"]:
    """Lower Cholesky factor: in float64, or with ``single`` in float32 first and in float64 where
    that fails.

    ``single`` None means on CUDA, for a float32 matrix.

    Raises:
        DataError: not positive definite; names the smallest eigenvalue.
    """
    if hessian.is_cuda and hessian.dtype == torch.float32 if single is None else single:
        factor, info = torch.linalg.cholesky_ex(hessian.float())
        if not int(info) and bool(torch.isfinite(factor).all()):
            return factor
    matrix = hessian.double()
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        smallest = float(torch.linalg.eigvalsh(matrix)[0])
        raise DataError(
            f"{what} ({matrix.shape[0]} wide) is not positive definite: smallest eigenvalue "
            f"{smallest:.3g}; raise sigma_reg or use more calibration tokens"
        )
    return factor


def cholesky_(
    hessian: Float[Tensor, "n n"], again: Callable[[], Float[Tensor, "n n"]]
) -> Float[Tensor, "n n"]:
    """:func:`cholesky` of a float64 matrix in the memory of the matrix; ``again`` gives the matrix
    once more where that fails."""
    factor = hessian.mT  # by columns, as the library wants it: no copy
    info = torch.empty(0, dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return cholesky(again(), single=False) if int(info) else factor


def unit_lower(factor: Float[Tensor, "n n"], block: int) -> Float[Tensor, "n n"]:
    """M of :func:`block_ldl`, float32, from the Cholesky factor."""
    lower = torch.zeros(factor.shape, dtype=torch.float32, device=factor.device)
    if block == 1:
        for goal, part in zip(lower.split(256), factor.split(256), strict=True):
            goal.copy_(part / factor.diagonal())
        return lower
    for low, high in block_bounds(len(factor), block):
        lower[low:, low:high] = torch.linalg.solve_triangular(
            factor[low:high, low:high].double(),
            factor[low:, low:high].double(),
            upper=False,
            left=False,
        )
    return lower


def block_ldl(hessian: Float[Tensor, "n n"], block: int) -> BlockLDL:
    """H = M blkdiag(D) M^T from the Cholesky factor C: M_:k = C_:k C_kk^-1, D_k = C_kk C_kk^T."""
    factor = cholesky(hessian)
    bounds = block_bounds(factor.shape[0], block)
    lower = torch.zeros_like(factor)
    diagonal = []
    for low, high in bounds:
        corner = factor[low:high, low:high]
        lower[low:, low:high] = torch.linalg.solve_triangular(
            corner, factor[low:, low:high], upper=False, left=False
        )
        diagonal.append(corner @ corner.T)
    return BlockLDL(lower, diagonal, bounds)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise DataError naming the first non-finite entry and how many there are."""
    parts = tensor.split(512) if tensor.ndim else (tensor,)
    if all(bool(torch.isfinite(part).all()) for part in parts):
        return
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"{name} has {int(bad.sum())} non-finite entries, the first at {first}; "
            "check the calibration text and the weights"
        )


def regularise(
    hessian: Float[Tensor, "n n"],
    *,
    sigma: float = 1e-2,
    name: str = "Hessian",
    overwrite: bool = False,
) -> Float[Tensor, "n n"]:
    """H / mean(diag H) + sigma I, symmetric, dead channels (H_jj = 0) set to 1; float64.

    ``overwrite`` puts the result where H was, if that is float64.

    Raises:
        DataError: not square, non-finite, negative diagonal, or asymmetric by more than 1e-2
            (above 1e-5 there is a warning).
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] < 1:
        raise DataError(f"{name} has shape {tuple(hessian.shape)}; expected a square matrix")
    require_finite(name, hessian)
    h = hessian.double() if overwrite else hessian.to(torch.float64, copy=True)
    pairs = zip(h.split(512), h.T.split(512), strict=True)
    apart = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    asymmetry = apart / float(h.norm().clamp_min(1e-300))
    if asymmetry > 1e-2:
        raise DataError(f"{name} is not symmetric: |H - H^T| / |H| = {asymmetry:.3g}")
    if asymmetry > 1e-5:
        warnings.warn(
            f"{name}: |H - H^T| / |H| = {asymmetry:.3g}; (H + H^T) / 2 is used", stacklevel=2
        )
    symmetrise_(h)
    diagonal = h.diagonal()
    if float(diagonal.min()) < 0:
        raise DataError(f"{name} has a negative diagonal entry at {int(diagonal.argmin())}")
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    h /= mean
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(sigma)
    return h


def symmetrise_(h: Float[Tensor, "n n"]) -> None:
    """(H + H^T) / 2 in place."""
    n, step = len(h), 256
    for low in range(0, n, step):
        high = min(low + step, n)
        mean = (h[low:high, low:] + h[low:, low:high].T) / 2
        h[low:high, low:] = mean
        h[low:, low:high] = mean.T
