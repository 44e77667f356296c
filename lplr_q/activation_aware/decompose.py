"""W ~ Q + L R by alternation, best iterate kept, error measured from the decoded codes.
[CALDERA Alg. 1]

    minimise tr( (W - Q - L R) H (W - Q - L R)^T )                                 (1)

Glossary: ``m`` outputs, ``n`` inputs, ``H`` regularised second moment of the inputs, ``e``
relative error sqrt( tr(E H E^T) / tr(W H W^T) ).

Inside, W is divided by a power of two near its rms (exact) and, with ``rht``, rotated on both
sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from lplr_q.activation_aware.factors import LowRank, QuantisedFactor, fit_low_rank
from lplr_q.bits import LayerBits, layer_bits
from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.hadamard import (
    hadamard_plan,
    random_signs,
    rotate_hessian,
    rotate_weight,
    unrotate_weight,
)
from lplr_q.linalg.ldl import block_ldl, cholesky, regularise, require_finite
from lplr_q.linalg.ldlq import CodebookBlocks, guarded_sweep, ldlq, weighted_loss
from lplr_q.linalg.regression import cholesky_whitening
from workbench.errors import ConfigError, DataError

INITS = ("lr_first", "q_first")


@dataclass(frozen=True)
class Decomposition:
    """Codes, scales and signs of one compressed matrix; nothing else is needed to rebuild it."""

    shape: tuple[int, int]
    codebook: str
    q_bits: int
    """Bits of Q; 0 when there is no Q."""
    q_codes: list[Tensor]
    """One (m, streams) tensor per block of columns; empty when there is no Q."""
    q_scale: float
    left: QuantisedFactor | None
    right: QuantisedFactor | None
    signs_out: Int8[Tensor, " m"] | None
    signs_in: Int8[Tensor, " n"] | None
    error: float = math.nan
    """e of the decoded matrix."""
    frobenius: float = math.nan
    """|E|_F / |W|_F."""
    history: list[dict] = field(default_factory=list)
    """One {"round", "component", "error"} per sub-step."""
    bits: LayerBits | None = None

    @property
    def rank(self) -> int:
        """Number of components of L R."""
        return 0 if self.left is None else self.left.codes.shape[0]

    def q_matrix(self) -> Float[Tensor, "m n"]:
        """Q in the rotated basis, from codes."""
        if not self.q_codes:
            return torch.zeros(self.shape)
        blocks = CodebookBlocks(make_codebook(self.codebook, self.q_bits), self.shape[1])
        return blocks.decode(self.q_codes) * self.q_scale

    def rotated(self) -> Float[Tensor, "m n"]:
        """Q + L R in the rotated basis, from codes."""
        total = self.q_matrix()
        if self.left is not None and self.right is not None:
            total = total + self.left.decode().T @ self.right.decode()
        return total

    def dequantize(self) -> Float[Tensor, "m n"]:
        """The matrix in its own basis, from codes."""
        total = self.rotated()
        if self.signs_out is not None and self.signs_in is not None:
            total = unrotate_weight(total, self.signs_out, self.signs_in)
        return total


@dataclass(frozen=True)
class PreparedHessian:
    """Everything that depends on H alone; shared by sublayers with the same input and by all
    rounds."""

    matrix: Float[Tensor, "n n"]
    lower: dict[int, Tensor]
    factor: Float[Tensor, "n n"]
    signs_in: Int8[Tensor, " n"] | None


def prepare_hessian(
    hessian: Float[Tensor, "n n"] | None,
    n: int,
    *,
    generator: torch.Generator | None,
    sigma: float = 1e-2,
    regularised: bool = False,
) -> PreparedHessian:
    """Regularise, rotate (when a generator for the signs is given) and factor H; None means H =
    I."""
    if hessian is None:
        matrix = torch.eye(n, dtype=torch.float64)
    elif hessian.shape != (n, n):
        raise DataError(f"Hessian of shape {tuple(hessian.shape)} for a weight with {n} inputs")
    else:
        matrix = hessian.double() if regularised else regularise(hessian, sigma=sigma)
    signs = None
    if generator is not None:
        signs = random_signs(n, generator)
        matrix = rotate_hessian(matrix, signs)
        matrix = (matrix + matrix.T) / 2
    return PreparedHessian(matrix, {}, cholesky(matrix), signs)


def _lower(prepared: PreparedHessian, block: int) -> Tensor:
    if block not in prepared.lower:
        prepared.lower[block] = block_ldl(prepared.matrix, block).lower
    return prepared.lower[block]


def quantise_q(
    target: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    blocks: CodebookBlocks,
    *,
    sweeps: int = 2,
    feedback: bool = True,
) -> tuple[list[Tensor], float, Float[Tensor, "m n"]]:
    """The Q step: LDLQ on target / rms, then guarded sweeps until the relative gain is below
    1e-4."""
    # the scale is stored as float32; use the stored value from here on
    scale = float(target.square().mean().sqrt().clamp_min(1e-30).float())
    unit = target / scale
    hessian = prepared.matrix.to(unit.dtype)
    if not feedback:
        identity = torch.eye(target.shape[1], dtype=unit.dtype, device=unit.device)
        codes, points = ldlq(unit, identity, blocks)
        return codes, scale, points * scale
    codes, points = ldlq(unit, _lower(prepared, blocks.codebook.dim), blocks)
    loss = weighted_loss(unit - points, hessian)
    for _ in range(sweeps):
        codes, points = guarded_sweep(unit, hessian, blocks, codes, points)
        before, loss = loss, weighted_loss(unit - points, hessian)
        if before - loss < 1e-4 * before:
            break
    return codes, scale, points * scale


def check_settings(
    *, shape: tuple[int, int], q_bits: int, rank: int, rounds: int, init: str
) -> None:
    """Raise ConfigError for settings that would decompose nothing or cannot exist."""
    m, n = shape
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: nothing would be decomposed; use at least 1")
    if rank < 0 or rank > min(m, n):
        raise ConfigError(f"rank={rank} does not fit a {m}x{n} matrix; use 0 to {min(m, n)}")
    if q_bits == 0 and rank == 0:
        raise ConfigError("q_bits=0 and rank=0: nothing is left of the matrix; raise one of them")
    if init not in INITS:
        raise ConfigError(f"init={init!r}; choose from {', '.join(INITS)}")


def decompose(
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    *,
    codebook: str = "e8p",
    q_bits: int = 2,
    rank: int = 0,
    factor_bits: int = 4,
    rounds: int = 3,
    inner_iterations: int = 5,
    sweeps: int = 2,
    init: str = "lr_first",
    feedback: bool = True,
    generator: torch.Generator | None = None,
) -> Decomposition:
    """Compress one matrix; the best state after every component has been updated once is returned.

    Args:
        weight: the matrix; never changed.
        prepared: from :func:`prepare_hessian`; whether it was rotated decides whether W is.
        codebook: name in ``CODEBOOKS``; ``q_bits`` = 0 leaves Q out.
        rank: components of L R; 0 leaves them out.
        factor_bits: bits per entry of L and R, 16 = bfloat16.
        rounds: outer rounds T; stops early when three rounds gain less than 0.1 %.
        init: which component is updated first.
        feedback: False rounds Q without looking at H.
        generator: of the output-side signs; needed when ``prepared`` is rotated.

    Raises:
        ConfigError: nothing to do, unknown codebook or bits, rank out of range.
        DataError: non-finite weight, shapes that do not fit.
    """
    m, n = weight.shape
    check_settings(shape=(m, n), q_bits=q_bits, rank=rank, rounds=rounds, init=init)
    require_finite("weight", weight)
    if prepared.matrix.shape[0] != n:
        raise DataError(f"Hessian of width {prepared.matrix.shape[0]} for {n} inputs")
    blocks = CodebookBlocks(make_codebook(codebook, q_bits), n) if q_bits else None

    signs_out = None
    target = weight.detach().float()
    if prepared.signs_in is not None:
        if generator is None:
            raise ConfigError("the Hessian is rotated: a generator for the output signs is needed")
        signs_out = random_signs(m, generator)
        target = rotate_weight(target, signs_out, prepared.signs_in)
    rms = float(target.square().mean().sqrt())
    power = 2.0 ** round(math.log2(rms)) if rms > 0 else 1.0
    target = target / power
    hessian = prepared.matrix.to(target.dtype)
    whitening = cholesky_whitening(prepared.factor.to(target.dtype))
    total = max(weighted_loss(target, hessian), 1e-300)

    state = _State()
    best: tuple[float, _State] = (math.inf, state)
    history: list[dict] = []
    steps = [c for c, wanted in (("LR", rank > 0), ("Q", blocks is not None)) if wanted]
    if init == "q_first":
        steps.reverse()
    at_round_end: list[float] = []

    def update(component: str, turn: int) -> None:
        nonlocal state, best
        if component == "LR":
            low_rank = fit_low_rank(
                target - state.q,
                hessian,
                whitening,
                rank=rank,
                bits=factor_bits,
                inner_iterations=inner_iterations,
            )
            state = state.with_low_rank(low_rank)
        else:
            assert blocks is not None
            codes, scale, q = quantise_q(
                target - state.lr, prepared, blocks, sweeps=sweeps, feedback=feedback
            )
            state = state.with_q(codes, scale, q)
        error = math.sqrt(weighted_loss(target - state.q - state.lr, hessian) / total)
        history.append({"round": turn, "component": component, "error": error})
        if len(history) >= len(steps) and error < best[0]:
            best = (error, state)

    for turn in range(1, rounds + 1):
        for component in steps:
            update(component, turn)
        at_round_end.append(best[0])
        if len(steps) < 2 or _stalled(at_round_end):
            break
    if len(steps) == 2 and factor_bits == 16 and steps[-1] == "Q":
        update("LR", rounds + 1)  # exact factors repair Q's last error; rounded ones would not
    return _finish(weight, target, prepared, best[1], history, power, codebook, q_bits, signs_out)


def _stalled(errors: list[float]) -> bool:
    """Less than 0.1 % gained over the last three rounds."""
    return len(errors) > 3 and errors[-1] > errors[-4] * (1 - 1e-3)


@dataclass(frozen=True)
class _State:
    """One iterate, in units of the power of two; q and lr are decoded matrices."""

    q: Tensor | float = 0.0
    lr: Tensor | float = 0.0
    codes: tuple[Tensor, ...] = ()
    scale: float = 0.0
    low_rank: LowRank | None = None

    def with_low_rank(self, low_rank: LowRank) -> _State:
        return _State(self.q, low_rank.product(), self.codes, self.scale, low_rank)

    def with_q(self, codes: list[Tensor], scale: float, q: Tensor) -> _State:
        return _State(q, self.lr, tuple(codes), scale, self.low_rank)


def _rescaled(factor: QuantisedFactor, power: float) -> QuantisedFactor:
    """The factor times a power of two: exact for bfloat16 scales and entries."""
    stored = factor.codes.to(torch.int16) if factor.bits == 16 else factor.scales
    moved = (stored.view(torch.bfloat16) * power).view(torch.int16)
    if factor.bits == 16:
        return QuantisedFactor(moved.long(), factor.scales, 16)
    return QuantisedFactor(factor.codes, moved, factor.bits)


def _finish(
    weight: Tensor,
    target: Tensor,
    prepared: PreparedHessian,
    state: _State,
    history: list[dict],
    power: float,
    codebook: str,
    q_bits: int,
    signs_out: Tensor | None,
) -> Decomposition:
    """Put the power of two back, and measure the error anew from codes alone."""
    m, n = weight.shape
    low = state.low_rank
    draft = Decomposition(
        shape=(m, n),
        codebook=codebook,
        q_bits=q_bits,
        q_codes=list(state.codes),
        q_scale=state.scale * power,
        left=None if low is None else _rescaled(low.left, power),
        right=None if low is None else low.right,
        signs_out=signs_out,
        signs_in=prepared.signs_in,
    )
    hessian = prepared.matrix.double()
    original = target.double() * power
    difference = original - draft.rotated().double()
    scale = max(weighted_loss(original, hessian), 1e-300)
    return replace(
        draft,
        error=math.sqrt(weighted_loss(difference, hessian) / scale),
        frobenius=float(difference.norm() / original.norm().clamp_min(1e-300)),
        history=history,
        bits=layer_bits(
            m,
            n,
            codebook=codebook,
            q_bits=q_bits,
            rank=draft.rank,
            factor_bits=low.left.bits if low is not None else 16,
            rotated=signs_out is not None,
        ),
    )


def rotation_kind(width: int) -> str:
    """Name of the construction used for this width, for the metadata."""
    plan = hadamard_plan(width)
    return plan.kind if plan.order == 1 else f"{plan.kind}-{plan.order}"
