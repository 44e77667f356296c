"""Quantised factors: least squares in turn for L and R, each rounded.   [CALDERA §3, LPLRFactorize]

    L <- q( A H R^T (R H R^T)^-1 )        R <- q( (L^T L)^-1 L^T A )

Each component (column of L, row of R) has its own bfloat16 scale; entries are Lloyd-Max codes. At
16 bits the factors are plain bfloat16 without scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from lplr_q.codebooks.scalar import LloydMaxCodebook
from lplr_q.linalg.ldlq import weighted_loss
from lplr_q.linalg.regression import Whitening, rank_constrained_regression
from workbench.errors import ConfigError

FACTOR_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class QuantisedFactor:
    """Codes of a (components, length) matrix and one scale per component (none at 16 bits)."""

    codes: Int64[Tensor, "r length"]
    scales: Int16[Tensor, " r"]
    """Bit patterns of the bfloat16 scales; empty at 16 bits."""
    bits: int

    def decode(self) -> Float[Tensor, "r length"]:
        """The factor, float32."""
        return decode_factor(self.codes, self.scales, self.bits)


def decode_factor(
    codes: Int64[Tensor, "r length"], scales: Int16[Tensor, "..."], bits: int
) -> Float[Tensor, "r length"]:
    """Levels times scale per component; at 16 bits the codes are bfloat16 bit patterns."""
    if bits == 16:
        return codes.to(torch.int16).view(torch.bfloat16).float()
    levels = LloydMaxCodebook(bits).decode(codes[..., None])[..., 0]
    return levels * scales.view(torch.bfloat16).float()[:, None]


def quantise_factor(factor: Float[Tensor, "r length"], bits: int) -> QuantisedFactor:
    """Round each row with its rms as scale; the scale is rounded before the codes are chosen."""
    if bits not in FACTOR_BITS:
        choices = ", ".join(map(str, FACTOR_BITS))
        raise ConfigError(f"factors cannot have {bits} bits; choose from {choices}")
    if bits == 16:
        codes = factor.to(torch.bfloat16).view(torch.int16).long()
        return QuantisedFactor(codes, torch.empty(0, dtype=torch.int16), bits)
    scale = factor.float().square().mean(1).sqrt().clamp_min(1e-30).to(torch.bfloat16)
    codes = LloydMaxCodebook(bits).encode((factor / scale.to(factor.dtype)[:, None])[..., None])
    return QuantisedFactor(codes[..., 0], scale.view(torch.int16), bits)


@dataclass(frozen=True)
class LowRank:
    """L (stored transposed) and R with the loss they leave."""

    left: QuantisedFactor
    right: QuantisedFactor
    loss: float

    def product(self) -> Float[Tensor, "m n"]:
        """L R from the codes, float32."""
        return self.left.decode().T @ self.right.decode()


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """normal^-1 right with a small ridge; pseudo-inverse when it is nearly singular."""
    normal, wide = normal.double(), right.double()
    ridge = 1e-6 * normal.diagonal().mean().clamp_min(1e-300)
    shifted = normal + ridge * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    pivots = factor.diagonal().square()
    if int(info) or float(pivots.min()) < 1e-7 * float(pivots.max()):
        return (torch.linalg.pinv(shifted, hermitian=True) @ wide).to(right.dtype)
    return torch.cholesky_solve(wide, factor).to(right.dtype)


def fit_left(
    target: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"], right: Float[Tensor, "r n"]
) -> Float[Tensor, "m r"]:
    """A H R^T (R H R^T)^-1: the best L for a given R."""
    weighted = right @ hessian
    return _solve(weighted @ right.T, weighted @ target.T).T


def fit_right(target: Float[Tensor, "m n"], left: Float[Tensor, "m r"]) -> Float[Tensor, "r n"]:
    """(L^T L)^-1 L^T A: the best R for a given L; with invertible H the weighting cancels."""
    return _solve(left.T @ left, left.T @ target)


def fit_low_rank(
    target: Float[Tensor, "m n"],
    hessian: Float[Tensor, "n n"],
    whitening: Whitening,
    *,
    rank: int,
    bits: int = 4,
    inner_iterations: int = 5,
) -> LowRank:
    """The best pair met while alternating rounded least squares from the closed-form optimum."""
    left, right, _ = rank_constrained_regression(target, whitening, rank)
    best: LowRank | None = None

    def consider(l_codes: QuantisedFactor, r_codes: QuantisedFactor) -> None:
        nonlocal best
        product = (l_codes.decode().T @ r_codes.decode()).to(target.dtype)
        loss = weighted_loss(target - product, hessian)
        if best is None or loss < best.loss:
            best = LowRank(l_codes, r_codes, loss)

    l_codes, r_codes = quantise_factor(left.T, bits), quantise_factor(right, bits)
    consider(l_codes, r_codes)
    for step in range(inner_iterations):
        if step:
            left = fit_left(target, hessian, r_codes.decode().to(target.dtype))
            l_codes = quantise_factor(left.T, bits)
            consider(l_codes, r_codes)
        right = fit_right(target, l_codes.decode().T.to(target.dtype))
        r_codes = quantise_factor(right, bits)
        consider(l_codes, r_codes)
    assert best is not None
    return best
