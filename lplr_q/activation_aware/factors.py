"""Quantised factors: least squares in turn for L and R, each rounded.   [CALDERA §3, LPLRFactorize]

    L <- q( A H R^T (R H R^T)^-1 )        R <- q( (L^T L)^-1 L^T A )

Each component (column of L, row of R) has its own bfloat16 scale and Lloyd-Max codes. Codebooks of
several dimensions (``e8p``, ``tcq``) take one scale for the whole factor, as the published code
does. At 16 bits the factors are plain bfloat16 without scales.

Both factors are rounded with feedback, because each has a Hessian: the loss of rounding R by dR is
tr(L^T L dR H dR^T), that of dL is tr(dL (R H R^T) dL^T). Balanced factors keep L^T L nearly
diagonal, so rows of R are rounded one by one under H (LDLQ over the n inputs) and rows of L under
R H R^T (LDLQ over the r components; scalar codebooks only, others run along the outputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from lplr_q.bits import FactorBits, factor_pair
from lplr_q.codebooks.base import Codebook, make_codebook
from lplr_q.linalg.ldl import block_ldl
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, weighted_loss
from lplr_q.linalg.randsvd import RandomisedSVD
from lplr_q.linalg.regression import Whitening, closed_form
from lplr_q.linalg.rows import LazyRows, row_chunks
from lplr_q.linalg.scalar_ldlq import scalar_ldlq
from workbench.errors import ConfigError

FACTOR_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class QuantisedFactor:
    """Codes of a (components, length) matrix and its scales (none at 16 bits)."""

    codes: Int64[Tensor, "r slots"]
    """One code per entry for scalar codebooks and at 16 bits; else the streams of all whole blocks
    of a row, then the scalar codes of the remaining entries."""
    scales: Int16[Tensor, " scales"]
    """Bit patterns of the bfloat16 scales: one per component, or one for the whole factor."""
    bits: int
    codebook: str = "lloyd-max"
    length: int = 0
    """Entries per component; 0 means as many as codes."""

    def decode(self) -> Float[Tensor, "r length"]:
        """The factor, float32."""
        return decode_factor(self.codes, self.scales, self.bits, self.codebook, self.length)


def factor_book(codebook: str, bits: int) -> Codebook:
    """The codebook of factors with ``bits`` per entry.

    Raises:
        ConfigError: no such bits; ``codebook`` is unknown or has no such version.
    """
    if bits not in FACTOR_BITS:
        choices = ", ".join(map(str, FACTOR_BITS))
        raise ConfigError(f"factors cannot have {bits} bits; choose from {choices}")
    return make_codebook(codebook, bits)


def factor_layout(
    rank: int, length: int, *, bits: int, codebook: str = "lloyd-max"
) -> tuple[int, int]:
    """(codes per component, scales of the whole factor) of a (rank, length) factor.

    >>> factor_layout(3, 40, bits=4)
    (40, 3)
    """
    if bits == 16:
        return length, 0
    book = factor_book(codebook, bits)
    whole, tail = divmod(length, book.dim)
    return whole * len(book.streams) + tail, rank if book.dim == 1 else 1


def decode_factor(
    codes: Int64[Tensor, "r slots"],
    scales: Int16[Tensor, "..."],
    bits: int,
    codebook: str = "lloyd-max",
    length: int = 0,
) -> Float[Tensor, "r length"]:
    """Points times scale; at 16 bits the codes are bfloat16 bit patterns."""
    if bits == 16:
        return codes.to(torch.int16).view(torch.bfloat16).float()
    scale = scales.view(torch.bfloat16).float()[:, None]
    book = make_codebook(codebook, bits)
    if book.dim == 1:
        return book.decode(codes[..., None])[..., 0] / book.opt_scale * scale
    blocks = CodebookBlocks(book, length or codes.shape[1])
    whole = (blocks.n // book.dim) * len(book.streams)
    packed = codes[:, :whole].unflatten(1, (-1, len(book.streams))) if whole else None
    return blocks.decode_packed(packed, codes[:, whole:] if blocks.tail else None) * scale


def quantise_factor(
    factor: Float[Tensor, "r length"],
    bits: int,
    codebook: str = "lloyd-max",
    *,
    lower: Float[Tensor, "length length"] | None = None,
) -> QuantisedFactor:
    """Round with the rms (of each row, or of the matrix) as scale; the scale is rounded before the
    codes are chosen. ``lower`` is M of the Hessian along a row and adds its feedback."""
    length = factor.shape[1]
    if bits == 16:
        patterns = factor.to(torch.bfloat16).view(torch.int16).long()
        return QuantisedFactor(patterns, torch.empty(0, dtype=torch.int16), 16, codebook, length)
    book = factor_book(codebook, bits)
    scale = _stored_scale(factor, book)
    unit = factor / scale.view(torch.bfloat16).to(factor.dtype)[:, None]
    blocks = CodebookBlocks(book, length)
    levels = ascending_levels(book)
    if lower is not None and levels is not None and unit.device.type == "cpu":
        codes = scalar_ldlq(unit, lower, levels)
    elif lower is not None:
        codes = torch.cat(ldlq(unit, lower, blocks)[0], dim=1)
    elif book.dim == 1:
        codes = book.encode((unit * book.opt_scale)[..., None])[..., 0]
    else:
        parts = [blocks.quantise(unit[:, a:b], k)[0] for k, (a, b) in enumerate(blocks.bounds)]
        codes = torch.cat(parts, dim=1)
    return QuantisedFactor(codes, scale, bits, codebook, length)


def ascending_levels(book: Codebook) -> Float[Tensor, " levels"] | None:
    """Levels of a scalar codebook in unit-rms units, or None when its codes are not in order."""
    if book.dim > 1 or len(book.streams) != 1:
        return None
    levels = book.decode(torch.arange(2 ** int(book.bits))[:, None])[:, 0] / book.opt_scale
    return levels if bool((levels[1:] > levels[:-1]).all()) else None


def _stored_scale(factor: Tensor, book: Codebook) -> Tensor:
    square = factor.float().square()
    power = square.mean(1) if book.dim == 1 else square.mean()[None]
    return power.sqrt().clamp_min(1e-30).to(torch.bfloat16).view(torch.int16)


def quantise_left(
    left: Float[Tensor, "m r"], bits: int, codebook: str, normal: Float[Tensor, "r r"] | None
) -> QuantisedFactor:
    """L, stored transposed, rounded with the feedback of ``normal`` = R H R^T across components."""
    if normal is None or bits == 16 or factor_book(codebook, bits).dim > 1:
        return quantise_factor(left.T.contiguous(), bits, codebook)
    book = factor_book(codebook, bits)
    stored = _stored_scale(left.T, book)
    scale = stored.view(torch.bfloat16).to(left.dtype)
    scaled = normal.double() * scale.double() * scale.double()[:, None]
    scaled.diagonal().add_(1e-6 * scaled.diagonal().mean() + 1e-30)
    lower = block_ldl(scaled, 1).lower
    codes, _ = ldlq(left / scale, lower, CodebookBlocks(book, left.shape[1]))
    joined = torch.cat(codes, dim=1).T.contiguous()
    return QuantisedFactor(joined, stored, bits, codebook, len(left))


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


def _whole(target: Tensor | LazyRows) -> Float[Tensor, "m n"]:
    return target if isinstance(target, Tensor) else target.whole()


@dataclass(frozen=True)
class FactorRounding:
    """How L and R are rounded."""

    bits: FactorBits = 4
    """Per entry of both, or of L and of R."""
    codebook: str = "lloyd-max"
    lower: Callable[[], Float[Tensor, "n n"]] | None = None
    """Gives M of H in blocks of the width of R's codebook, once the closed form is done and if R
    has codes; None rounds both without feedback."""


def fit_low_rank(
    target: Float[Tensor, "m n"] | LazyRows,
    hessian: Float[Tensor, "n n"],
    whitening: Whitening,
    *,
    rank: int,
    rounding: FactorRounding | None = None,
    inner_iterations: int = 5,
    svd: RandomisedSVD | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> LowRank:
    """The best pair met while alternating rounded least squares.

    Starts from the closed-form optimum, or from ``start`` = (L, R); ``svd`` replaces the exact
    singular value decomposition. The loss of a pair needs no m x n product:
    tr(A H A^T) - 2 tr(L^T A H R^T) + tr(L^T L R H R^T).
    """
    rounding = rounding or FactorRounding()
    (l_bits, r_bits), codebook = factor_pair(rounding.bits), rounding.codebook
    if start is None:
        left, right, constant = closed_form(target, whitening, rank, svd=svd)
        target = _whole(target)  # only now: the closed form takes as much memory
    else:
        (left, right), target = start, _whole(target)
        constant = weighted_loss(target, hessian)
    aware = rounding.lower is not None
    lower = None if rounding.lower is None or r_bits == 16 else rounding.lower()
    best: LowRank | None = None

    def consider(l_codes: QuantisedFactor, r_codes: QuantisedFactor, by_right: _ByRight) -> None:
        nonlocal best
        lt = l_codes.decode().to(target.dtype)
        cross = (lt * by_right.cross).sum(dtype=torch.float64)
        square = ((lt @ lt.T) * by_right.normal).sum(dtype=torch.float64)
        loss = constant - 2 * float(cross) + float(square)
        if loss < 1e-3 * constant:  # too little left for a difference of such sums
            right = r_codes.decode().to(target.dtype)
            loss = sum(
                weighted_loss(target[c] - lt[:, c].T @ right, hessian)
                for c in row_chunks(len(target))
            )
        if best is None or loss < best.loss:
            best = LowRank(l_codes, r_codes, loss)

    r_codes = quantise_factor(right, r_bits, codebook, lower=lower)
    by_right = _by_right(target, hessian, r_codes)
    if start is not None or not inner_iterations:
        consider(quantise_left(left, l_bits, codebook, None), r_codes, by_right)
    for _ in range(inner_iterations):
        left = _solve(by_right.normal, by_right.cross).T
        l_codes = quantise_left(left, l_bits, codebook, by_right.normal if aware else None)
        consider(l_codes, r_codes, by_right)
        right = fit_right(target, l_codes.decode().T.to(target.dtype))
        r_codes = quantise_factor(right, r_bits, codebook, lower=lower)
        by_right = _by_right(target, hessian, r_codes)
        consider(l_codes, r_codes, by_right)
    assert best is not None
    return best


@dataclass(frozen=True)
class _ByRight:
    """What a given R fixes: R H R^T and R H A^T."""

    normal: Float[Tensor, "r r"]
    cross: Float[Tensor, "r m"]


def _by_right(target: Tensor, hessian: Tensor, r_codes: QuantisedFactor) -> _ByRight:
    right = r_codes.decode().to(target.dtype)
    weighted = right @ hessian
    return _ByRight(weighted @ right.T, weighted @ target.T)
