"""The alternation itself: LR steps and Q steps on one matrix in its rotated basis.
[CALDERA Alg. 1]

Every sub-step is measured with the true H and recorded; the best iterate among those in which all
components exist is kept, because rounded factors and shaped Hessians make single steps go up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.factors import (
    FactorRounding,
    LowRank,
    QuantisedFactor,
    factor_book,
    fit_low_rank,
    quantise_factor,
)
from lplr_q.activation_aware.initial import odlri_start, srr_split
from lplr_q.activation_aware.prepared import PreparedHessian
from lplr_q.activation_aware.refine import refinable, sweep_left, sweep_right
from lplr_q.activation_aware.remainder import CodedQ, Remainder
from lplr_q.activation_aware.shaping import Q_HESSIANS, blind_hessian, covered_directions
from lplr_q.bits import FactorBits, factor_pair
from lplr_q.linalg.ldl import cholesky_, unit_lower
from lplr_q.linalg.ldlq import (
    CodebookBlocks,
    corner_inverses,
    guarded_sweep,
    ldlq,
    weighted_loss,
)
from lplr_q.linalg.randsvd import RandomisedSVD
from lplr_q.linalg.regression import cholesky_whitening, closed_form
from lplr_q.linalg.rows import Rows, row_chunks, squared_norm
from lplr_q.linalg.scales import Scale, row_scales, scaled_rows

SCALE_GRID = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)


@dataclass(frozen=True)
class QRounding:
    """How Q is rounded."""

    blocks: CodebookBlocks
    sweeps: int = 2
    feedback: bool = True
    multiplier: float = 1.0
    """Factor on the codebook's input scale."""
    search: bool = False
    """Choose the multiplier from ``SCALE_GRID`` by the loss of a pass without sweeps."""
    scale_width: int = 0
    """Columns of a row per scale; 0: one scale for the matrix."""


class Rounded(NamedTuple):
    """What a Q step leaves."""

    codes: list[Tensor]
    scale: Scale
    loss: float
    """tr(E H E^T) of the target less Q."""


def quantise_q(
    target: Rows,
    hessian: Float[Tensor, "n n"],
    lower: Float[Tensor, "n n"] | None,
    rounding: QRounding,
) -> Rounded:
    """The Q step: LDLQ on target / rms, then guarded sweeps until the relative gain is below
    1e-4.

    Rows do not depend on each other, so a few are done at a time and only the codes of all are
    held.
    """
    found = first_pass(target, hessian, lower, rounding)
    return found if lower is None else more_sweeps(target, hessian, rounding, found)


def first_pass(
    target: Rows,
    hessian: Float[Tensor, "n n"],
    lower: Float[Tensor, "n n"] | None,
    rounding: QRounding,
) -> Rounded:
    """LDLQ alone."""
    blocks, (m, n) = rounding.blocks, target.shape
    feedback = torch.eye(n).to(hessian) if lower is None else lower
    rms = max(math.sqrt(squared_norm(target) / (m * n)), 1e-30)

    def stored(part: Rows, multiplier: float) -> Scale:
        if rounding.scale_width:
            return row_scales(part, rounding.scale_width, multiplier)
        return float(torch.tensor(rms / multiplier, dtype=torch.float32))

    multiplier = rounding.multiplier
    if rounding.search:
        some = _sampled_rows(target, 128)
        losses = []
        for factor in SCALE_GRID:
            scale = stored(some, factor * multiplier)
            part, own = scaled_rows(some, slice(None), scale, blocks)
            _, points = ldlq(part, feedback, own)
            points = points * scale if isinstance(scale, float) else points
            losses.append(weighted_loss(some - points, hessian))
        multiplier *= SCALE_GRID[losses.index(min(losses))]
    scale = stored(target, multiplier)
    whole: list[Tensor] = []
    loss = 0.0
    for rows in row_chunks(m):
        unit, own = scaled_rows(target, rows, scale, blocks)
        codes, points = ldlq(unit, feedback, own, code_dtype=blocks.code_dtype)
        whole = whole or [c.new_empty(m, *c.shape[1:]) for c in codes]
        _put(whole, codes, rows)
        unit -= points
        del codes, points
        loss += weighted_loss(unit, hessian)
    return Rounded(whole, scale, in_full(loss, scale))


def more_sweeps(
    target: Rows,
    hessian: Float[Tensor, "n n"],
    rounding: QRounding,
    found: Rounded,
) -> Rounded:
    """Guarded sweeps over the codes, in place, until one gains less than 1e-4 of the loss."""
    codes, scale, loss = found
    for _ in range(rounding.sweeps):
        before, loss = loss, swept(target, scale, hessian, rounding.blocks, codes)
        if before - loss < 1e-4 * before:
            break
    return Rounded(codes, scale, loss)


def _put(whole: list[Tensor], codes: list[Tensor], rows: slice) -> None:
    """The codes of some rows to their place among those of all."""
    for goal, part in zip(whole, codes, strict=True):
        goal[rows] = part


def swept(
    target: Rows,
    scale: Scale,
    hessian: Float[Tensor, "n n"],
    blocks: CodebookBlocks,
    codes: list[Tensor],
) -> float:
    """One guarded sweep over ``codes``, in place; the loss it leaves."""
    loss, inverses = 0.0, corner_inverses(hessian, blocks.bounds)
    for rows in row_chunks(target.shape[0]):
        unit, own = scaled_rows(target, rows, scale, blocks)
        before = [c[rows] for c in codes]
        points = own.decode(before)
        after, points = guarded_sweep(unit, hessian, own, before, points, inverses=inverses)
        _put(codes, after, rows)
        unit -= points
        del before, after, points
        loss += weighted_loss(unit, hessian)
    return in_full(loss, scale)


def in_full(loss: float, scale: Scale) -> float:
    """The loss of W from that of what was rounded, which is W / scale where W has one scale."""
    return loss * scale**2 if isinstance(scale, float) else loss


def _sampled_rows(target: Rows, count: int) -> Tensor:
    """At most ``count`` rows in groups of 16 neighbours, spread evenly."""
    m = target.shape[0]
    if m <= count:
        return target[:]
    starts = torch.linspace(0, m - 16, count // 16).long().tolist()
    return torch.cat([target[start : start + 16] for start in starts])


@dataclass(frozen=True)
class Problem:
    """One matrix in units of a power of two, rotated if ``prepared`` is, and how to compress it."""

    target: Float[Tensor, "m n"]
    prepared: PreparedHessian
    rounding: QRounding | None
    rank: int = 0
    factor_bits: FactorBits = 4
    factor_codebook: str = "lloyd-max"
    inner_iterations: int = 5
    activation_aware_lr: bool = True
    randomised_svd: bool | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Iterate:
    """One state: codes and scales only."""

    codes: tuple[Tensor, ...] = ()
    scale: Scale = 0.0
    low_rank: LowRank | None = None

    def remainder(self, problem: Problem, *, q: bool = True, lr: bool = True) -> Remainder:
        """W - Q - L R; without ``q`` W - L R, without ``lr`` W - Q."""
        coded = None
        if q and self.codes and problem.rounding is not None:
            coded = CodedQ(problem.rounding.blocks, self.codes, self.scale)
        return Remainder(problem.target, coded, self.low_rank if lr else None)


@dataclass
class Alternation:
    """A run of the alternation, which can be continued."""

    problem: Problem
    steps: tuple[str, ...]
    init: str
    q_hessian: str
    state: Iterate = field(default_factory=Iterate)
    best: Iterate | None = None
    best_error: float = math.inf
    history: list[dict] = field(default_factory=list)
    svd: RandomisedSVD | None = None

    def __post_init__(self) -> None:
        problem = self.problem
        hessian = problem.prepared.single()
        self.total = max(weighted_loss(problem.target, hessian), 1e-300)
        svd = RandomisedSVD()
        wanted = problem.randomised_svd
        if wanted is True or (wanted == "auto" and svd.worth(*problem.target.shape, problem.rank)):
            self.svd = svd

    def round(self, turn: int) -> None:
        """One update of every component."""
        for component in self.steps:
            self.update(component, turn)
        if turn == 1 and self.init == "srr" and len(self.steps) == 2:
            self._repair()

    def update(self, component: str, turn: int) -> None:
        """One sub-step, recorded."""
        loss = None
        if component == "LR":
            low = self._low_rank(turn)
            self.state = replace(self.state, low_rank=low)
            loss = low.loss if self.problem.activation_aware_lr else None  # else that of H = I
        else:
            codes, scale, loss = self._rounded()
            self._set_q(codes, scale)
        complete = len(self.history) + 1 >= len(self.steps)
        self._record(component, turn, complete=complete, loss=loss)

    def _set_q(self, codes: list[Tensor], scale: Scale) -> None:
        self.state = replace(self.state, codes=tuple(codes), scale=scale)

    def _record(
        self, component: str, turn: int, *, complete: bool, loss: float | None = None
    ) -> None:
        """Note the error of the state, from ``loss`` where it is known; keep the best state."""
        if loss is None:
            loss = self._without().loss(self.problem.prepared.single())
        error = math.sqrt(max(loss, 0.0) / self.total)
        self.history.append({"round": turn, "component": component, "error": error})
        low = self.state.low_rank
        whole = low is None or len(low.left.codes) == self.problem.rank
        if complete and whole and error < self.best_error:
            self.best, self.best_error = self.state, error

    def _low_rank(self, turn: int) -> LowRank:
        problem, rank, start = self.problem, self.problem.rank, None
        target = self._without(lr=False)
        if turn == 1 and self.init == "odlri":
            start = odlri_start(target.whole(), problem.prepared, rank)
        if turn == 1 and self.init == "srr" and problem.rounding is not None:
            rank = max(1, srr_split(problem.target, problem.prepared, rank))
        return self._fit(target, rank, start)

    def _without(self, *, q: bool = True, lr: bool = True) -> Remainder:
        """W - Q - L R of the state, or W less one of them."""
        return self.state.remainder(self.problem, q=q, lr=lr)

    def _fit(
        self, target: Remainder, rank: int, start: tuple[Tensor, Tensor] | None = None
    ) -> LowRank:
        problem, lower = self.problem, None
        if problem.activation_aware_lr:
            hessian, whitening = problem.prepared.single(), problem.prepared.whitening()
            l_bits, r_bits = factor_pair(problem.factor_bits)
            if (l_bits, r_bits) != (16, 16):
                width = 1 if r_bits == 16 else factor_book(problem.factor_codebook, r_bits).dim
                lower = partial(problem.prepared.lower_for, width)
        else:
            hessian = torch.eye(target.shape[1]).to(problem.target)
            whitening = cholesky_whitening(hessian)
        return fit_low_rank(
            target,
            hessian,
            whitening,
            rank=rank,
            rounding=FactorRounding(problem.factor_bits, problem.factor_codebook, lower),
            inner_iterations=problem.inner_iterations,
            svd=self.svd,
            start=start,
        )

    def refine(self, turn: int) -> None:
        """One guarded sweep each over the codes of L, R and Q, from the best iterate on."""
        assert self.best is not None
        self.state = self.best
        low, rounding = self.state.low_rank, self.problem.rounding
        hessian = self.problem.prepared.single()
        if low is not None and refinable(low):
            residual = self._without(lr=False).whole()
            low = sweep_right(residual, hessian, sweep_left(residual, hessian, low))
            del residual
            self.state = replace(self.state, low_rank=low)
            self._record("LR", turn, complete=True)
        if rounding is not None and self.state.codes:
            scale, codes = self.state.scale, [c.clone() for c in self.state.codes]
            loss = swept(self._without(q=False), scale, hessian, rounding.blocks, codes)
            self._set_q(codes, scale)
            self._record("Q", turn, complete=True, loss=loss)

    def _repair(self) -> None:
        """SRR: the components left over fit W - Q - L R; the first ones stay as they are."""
        low, rank = self.state.low_rank, self.problem.rank
        assert low is not None
        spare = rank - len(low.left.codes)
        if spare:
            more = self._fit(self._without(), spare)
            joined = LowRank(
                _joined(low.left, more.left), _joined(low.right, more.right), more.loss
            )
            self.state = replace(self.state, low_rank=joined)
            self._record("LR", 1, complete=True)

    def _rounded(self) -> tuple[list[Tensor], Scale, float | None]:
        """Codes and scale of Q, and the loss where it was rounded under H itself."""
        problem = self.problem
        rounding, prepared = problem.rounding, problem.prepared
        assert rounding is not None
        residual = self._without(q=False)
        block = rounding.blocks.codebook.dim
        if not rounding.feedback:
            return quantise_q(residual, prepared.single(), None, rounding)
        directions = self._blind_directions()
        if directions is None:
            hessian = prepared.single()
            found = first_pass(residual, hessian, prepared.lower_for(block), rounding)
            prepared.lower.clear()  # the sweeps do not need it
            return more_sweeps(residual, hessian, rounding, found)
        prepared.lower.clear()
        codes, scale, _ = quantise_q(residual, *self._shaped(directions, block), rounding)
        return codes, scale, None

    def _shaped(self, directions: Float[Tensor, "n r"], block: int) -> tuple[Tensor, Tensor]:
        """The Hessian that is blind to these directions and its M, in float32."""
        prepared = self.problem.prepared
        shaped = partial(blind_hessian, prepared.matrix, prepared.whitening(), directions)
        lower = unit_lower(cholesky_(shaped(), shaped), block)
        return shaped(torch.float32), lower  # made anew: both at once would not fit

    def _blind_directions(self) -> Float[Tensor, "n r"] | None:
        """Directions Q need not look at, or None for the plain Hessian."""
        low, whitening = self.state.low_rank, self.problem.prepared.whitening()
        if self.q_hessian == "downdate" and low is not None:
            return covered_directions(low.right.decode(), whitening)
        if self.q_hessian == "projq" and self.problem.rank:
            residual = self._without(lr=False)
            _, right, _ = closed_form(residual, whitening, self.problem.rank, svd=self.svd)
            return covered_directions(right, whitening)
        return None


def _joined(first: QuantisedFactor, second: QuantisedFactor) -> QuantisedFactor:
    """Components of both."""
    if first.bits != 16 and len(first.scales) != len(first.codes):
        both = torch.cat([first.decode(), second.decode()])  # one scale for the whole factor
        return quantise_factor(both, first.bits, first.codebook)
    return replace(
        first,
        codes=torch.cat([first.codes, second.codes]),
        scales=torch.cat([first.scales, second.scales]),
    )


def _stalled(errors: list[float]) -> bool:
    """Less than 0.1 % gained over the last three rounds."""
    return len(errors) > 3 and errors[-1] > errors[-4] * (1 - 1e-3)


def run_alternation(
    problem: Problem,
    *,
    rounds: int,
    init: str = "lr_first",
    q_hessian: str = "plain",
    order: Sequence[str] = ("LR", "Q"),
    refinements: int = 0,
) -> Alternation:
    """Up to ``rounds`` rounds; ``auto`` settings are decided by measurement in the first one.

    ``refinements`` joint sweeps follow; they stop when one gains less than 1e-4 of the error.
    """
    wanted = {"LR": problem.rank > 0, "Q": problem.rounding is not None}
    steps = tuple(c for c in order if wanted[c])
    both = len(steps) == 2

    def begun(init: str, q_hessian: str) -> Alternation:
        sequence = ("Q", "LR") if init == "q_first" and both else steps
        if init in ("odlri", "srr") and both:
            sequence = ("LR", "Q")
        run = Alternation(problem, sequence, init, q_hessian)
        run.round(1)
        return run

    first = "plain" if q_hessian == "auto" else q_hessian
    run = min(
        (
            begun(name, first)
            for name in (("lr_first", "odlri") if init == "auto" and both else (init,))
        ),
        key=lambda r: r.best_error,
    )
    if not both:
        return run
    if q_hessian == "auto":
        run = min((begun(run.init, name) for name in Q_HESSIANS), key=lambda r: r.best_error)
    turn = _more_rounds(run, rounds)
    if 16 in factor_pair(problem.factor_bits) and run.steps[-1] == "Q":
        run.update("LR", turn + 1)  # exact factors repair Q's last error; rounded ones would not
    for extra in range(1, refinements + 1):
        before = run.best_error
        run.refine(turn + extra)
        if before - run.best_error < 1e-4 * before:
            break
    return run


def _more_rounds(run: Alternation, rounds: int) -> int:
    """Rounds 2 .. ``rounds``, or until they stop paying; the number of the last one."""
    at_round_end = [run.best_error]
    for turn in range(2, rounds + 1):
        run.round(turn)
        at_round_end.append(run.best_error)
        if _stalled(at_round_end):
            return turn
    return rounds
