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
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8, Int16
from torch import Tensor

from lplr_q.activation_aware.alternation import (
    Alternation,
    Iterate,
    Problem,
    QRounding,
    run_alternation,
)
from lplr_q.activation_aware.factors import QuantisedFactor, factor_book
from lplr_q.activation_aware.initial import INITS
from lplr_q.activation_aware.prepared import PreparedHessian, prepare_hessian, rescaling
from lplr_q.activation_aware.shaping import Q_HESSIANS
from lplr_q.bits import FactorBits, LayerBits, factor_pair, layer_bits, one_or_two
from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.hadamard import (
    random_signs,
    rotate_weight_,
    rotation_plan,
    unrotate_rows,
    unrotate_weight,
)
from lplr_q.linalg.ldl import require_finite
from lplr_q.linalg.ldlq import CodebookBlocks, weighted_loss
from lplr_q.linalg.rows import squared_norm
from lplr_q.linalg.scales import RowScales, Scale, scale_width, scaled_points
from workbench.errors import ConfigError, DataError

__all__ = [
    "Decomposition",
    "PreparedHessian",
    "check_settings",
    "decompose",
    "fitting_rank",
    "prepare_hessian",
    "quip_sharp",
    "rotation_kind",
]


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
    rescale: Int16[Tensor, " n"] | None = None
    """Bit patterns of the bfloat16 d; the layer divides its input by d."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of :func:`decompose`, with what ``auto`` chose."""
    rotation: str = "had"
    """The family of Theta where there are signs."""
    q_scales: RowScales | None = None
    """In place of ``q_scale``: one per row, or per row and group of columns."""

    @property
    def rank(self) -> int:
        """Number of components of L R."""
        return 0 if self.left is None else self.left.codes.shape[0]

    @property
    def q_group(self) -> int:
        """Columns per scale of Q; -1 a row, 0 the matrix."""
        if self.q_scales is None:
            return 0
        return -1 if self.q_scales.patterns.shape[1] == 1 else self.q_scales.width

    def q_matrix(self) -> Float[Tensor, "m n"]:
        """Q in the rotated basis, from codes."""
        if not self.q_codes:
            return torch.zeros(self.shape)
        blocks = CodebookBlocks(make_codebook(self.codebook, self.q_bits), self.shape[1])
        return scaled_points(blocks.decode(self.q_codes), self._scale(), slice(None))

    def _scale(self) -> Scale:
        return self.q_scale if self.q_scales is None else self.q_scales

    def rotated(self) -> Float[Tensor, "m n"]:
        """Q + L R in the rotated basis, from codes."""
        return torch.cat([part for _, part in self.decoded()])

    def decoded(self) -> Iterator[tuple[slice, Float[Tensor, "k n"]]]:
        """:meth:`rotated`, a few rows at a time."""
        m, n = self.shape
        blocks = factors = None
        if self.q_codes:
            blocks = CodebookBlocks(make_codebook(self.codebook, self.q_bits), n)
        if self.left is not None and self.right is not None:
            factors = self.left.decode().T, self.right.decode()
        for low in range(0, m, 128):  # whole tiles of every codebook
            rows = slice(low, min(low + 128, m))
            part: Tensor = torch.zeros(rows.stop - low, n)
            if blocks is not None:
                points = blocks.decode([codes[rows] for codes in self.q_codes])
                part = scaled_points(points, self._scale(), rows)
            if factors is not None:
                part = part.to(factors[0].device) + factors[0][rows] @ factors[1]
            yield rows, part

    def dequantize(self) -> Float[Tensor, "m n"]:
        """The matrix in its own basis, from codes."""
        total = self.rotated()
        if self.signs_out is not None and self.signs_in is not None:
            total = unrotate_weight(total, self.signs_out, self.signs_in, self.rotation)
        if self.rescale is not None:
            total = total / self.rescale.view(torch.bfloat16).float()
        return total


def fitting_rank(rank: int, shape: tuple[int, int], *, name: str = "matrix") -> int:
    """``rank``, or min(m, n) with a warning when one rank for all matrices exceeds this one's."""
    largest = min(shape)
    if rank > largest:
        warnings.warn(
            f"rank={rank} exceeds min{shape} of {name}; {largest} is used there", stacklevel=2
        )
    return min(rank, largest)


def check_settings(
    *,
    shape: tuple[int, int],
    q_bits: int,
    rank: int,
    rounds: int,
    init: str = "lr_first",
    q_hessian: str = "plain",
    update_order: Sequence[str] = ("LR", "Q"),
    inner_iterations: int = 5,
    sweeps: int = 2,
    refinements: int = 1,
    scale_multiplier: float = 1.0,
) -> None:
    """Raise ConfigError for settings that would decompose nothing or cannot exist."""
    m, n = shape
    order = tuple(update_order)
    if not order or len(set(order)) < len(order) or set(order) - {"LR", "Q"}:
        raise ConfigError(
            f"update_order={list(order)}: name LR and Q, each at most once and one at least"
        )
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: nothing would be decomposed; use at least 1")
    if rank < 0 or rank > min(m, n):
        raise ConfigError(f"rank={rank} does not fit a {m}x{n} matrix; use 0 to {min(m, n)}")
    if q_bits == 0 and rank == 0:
        raise ConfigError("q_bits=0 and rank=0: nothing is left of the matrix; raise one of them")
    for option, count in (
        ("inner_iterations", inner_iterations),
        ("sweeps", sweeps),
        ("refinements", refinements),
    ):
        if count < 0:
            raise ConfigError(f"{option}={count}; use 0 or more")
    if not 0 < scale_multiplier < math.inf:
        raise ConfigError(f"scale_multiplier={scale_multiplier}; use a positive number, near 1")
    for option, given, choices in (
        ("init", init, (*INITS, "auto")),
        ("q_hessian", q_hessian, (*Q_HESSIANS, "auto")),
    ):
        if given not in choices:
            raise ConfigError(f"{option}={given!r}; choose from {', '.join(choices)}")


def decompose(  # noqa: PLR0913 - one keyword per option of the method
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    *,
    codebook: str = "e8p",
    q_bits: int = 2,
    rank: int = 0,
    factor_bits: FactorBits = 4,
    factor_codebook: str = "lloyd-max",
    rounds: int = 3,
    inner_iterations: int = 5,
    sweeps: int = 2,
    refinements: int = 1,
    init: str = "lr_first",
    q_hessian: str = "plain",
    update_order: Sequence[str] = ("LR", "Q"),
    feedback: bool = True,
    activation_aware_lr: bool = True,
    randomised_svd: bool | Literal["auto"] = "auto",
    scale_search: bool = False,
    scale_multiplier: float = 1.0,
    compute_q: bool = True,
    compute_lr: bool = True,
    rescale: bool = False,
    q_group: int = 0,
    generator: torch.Generator | None = None,
    overwrite: bool = False,
) -> Decomposition:
    """Compress one matrix; the best state after every component has been updated once is returned.

    Args:
        weight: the matrix; never changed without ``overwrite``.
        prepared: from :func:`prepare_hessian`; whether it was rotated decides whether W is.
        codebook: name in ``CODEBOOKS``; ``q_bits`` = 0 leaves Q out.
        rank: components of L R; 0 leaves them out.
        factor_bits: bits per entry of L and R, or a pair: of L, of R; 16 = bfloat16.
        factor_codebook: codebook of L and R (``lloyd-max``, ``uniform``, ``e8p``, ...).
        rounds: outer rounds T; stops early when three rounds gain less than 0.1 %.
        inner_iterations: least-squares steps of each factor within one LR step.
        sweeps: guarded sweeps after each pass of LDLQ.
        refinements: joint guarded sweeps over L, R and Q at the end (when there are both).
        init: ``lr_first``, ``q_first``, ``odlri``, ``srr``, or ``auto``: one round of lr_first and
            of odlri, the better one continues.
        q_hessian: ``plain``, ``downdate``, ``projq``, or ``auto``: each tried for one round.
        update_order: components of one round; ``init="q_first"`` puts Q first.
        feedback: False rounds Q without looking at H.
        activation_aware_lr: False fits L R by plain singular vectors, as if H = I.
        randomised_svd: ``auto`` where the rank is small enough to pay; checked to 1e-3 of the loss.
        scale_search: search the scale of Q on a grid of 7 points, 0.8 .. 1.1, by the true loss.
        scale_multiplier: factor on the codebook's own input scale.
        compute_q, compute_lr: False leaves the component out.
        rescale: balance input channels and weight columns by d (``Decomposition.rescale``).
        q_group: scales of Q: 0 one for the matrix, -1 one per row, else one per row and so many
            columns (a multiple of the codebook's ``dim``).
        generator: of the output-side signs; needed when ``prepared`` is rotated.
        overwrite: work in the memory of ``weight``, which is lost, if it is float32.

    Raises:
        ConfigError: nothing to do, unknown codebook or bits, rank out of range.
        DataError: non-finite weight, shapes that do not fit.
    """
    apart = ("weight", "prepared", "generator", "overwrite")
    settings = {k: v for k, v in locals().items() if k not in apart}
    settings["update_order"] = list(update_order)
    if weight.ndim != 2 or not weight.numel():
        raise DataError(f"weight of shape {tuple(weight.shape)}; expected a matrix with entries")
    if not isinstance(factor_bits, int):
        settings["factor_bits"] = list(factor_bits)
    m, n = weight.shape
    order = tuple(update_order)
    q_bits = q_bits if compute_q and ("Q" in order or not order) else 0
    rank = rank if compute_lr and ("LR" in order or not order) else 0
    check_settings(
        shape=(m, n),
        q_bits=q_bits,
        rank=rank,
        rounds=rounds,
        init=init,
        q_hessian=q_hessian,
        update_order=order,
        inner_iterations=inner_iterations,
        sweeps=sweeps,
        refinements=refinements,
        scale_multiplier=scale_multiplier,
    )
    factor_bits = one_or_two(factor_bits)
    for bits in {*factor_pair(factor_bits)} - {16} if rank else ():
        factor_book(factor_codebook, bits)
    require_finite("weight", weight)
    if prepared.matrix.shape[0] != n:
        raise DataError(f"Hessian of width {prepared.matrix.shape[0]} for {n} inputs")
    rounding = None
    if q_bits:
        book = make_codebook(codebook, q_bits)
        rounding = QRounding(
            CodebookBlocks(book, n),
            scale_width=scale_width(q_group, n, book.dim),
            sweeps=sweeps,
            feedback=feedback,
            multiplier=scale_multiplier,
            search=scale_search,
        )
    target = weight.detach().to(torch.float32, copy=not overwrite).contiguous()
    patterns = None
    if rescale:
        patterns, target, prepared = rescaling(target, prepared, overwrite=True)
    rms = math.sqrt(squared_norm(target) / target.numel())
    power = 2.0 ** round(math.log2(rms)) if rms > 0 else 1.0
    target /= power
    signs_out = None
    if prepared.signs_in is not None:
        if generator is None:
            raise ConfigError("the Hessian is rotated: a generator for the output signs is needed")
        signs_out = random_signs(m, generator)
        rotate_weight_(target, signs_out, prepared.signs_in, prepared.rotation)
    problem = Problem(
        target=target,
        prepared=prepared,
        rounding=rounding,
        rank=rank,
        factor_bits=factor_bits,
        factor_codebook=factor_codebook,
        inner_iterations=inner_iterations,
        activation_aware_lr=activation_aware_lr,
        randomised_svd=randomised_svd,
    )
    done = run_alternation(
        problem,
        rounds=rounds,
        init=init,
        q_hessian=q_hessian,
        order=order,
        refinements=refinements if feedback and activation_aware_lr else 0,
    )
    draft = Decomposition(
        shape=(m, n),
        codebook=codebook,
        q_bits=q_bits,
        q_codes=[],
        q_scale=0.0,
        left=None,
        right=None,
        signs_out=signs_out,
        signs_in=prepared.signs_in,
        rescale=patterns,
        rotation=prepared.rotation,
        settings=settings | {"init": done.init, "q_hessian": done.q_hessian},
    )
    assert done.best is not None
    return _measured(_filled(draft, done, power), target, power, prepared)


def quip_sharp(
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    *,
    q_bits: int = 2,
    sweeps: int = 10,
    scale_multiplier: float | None = None,
    generator: torch.Generator | None = None,
    overwrite: bool = False,
) -> Decomposition:
    """The baseline without L R: RHT, LDLQ on E8P, guarded sweeps, one pass.   [QuIP# without
    fine-tuning]

    The input scale is 0.9 times the codebook's at 2 bits, as published; the residual codebooks of
    3 and 4 bits keep theirs.
    """
    if scale_multiplier is None:
        scale_multiplier = 0.9 if q_bits == 2 else 1.0
    return decompose(
        weight,
        prepared,
        codebook="e8p",
        q_bits=q_bits,
        rank=0,
        rounds=1,
        sweeps=sweeps,
        refinements=0,
        scale_multiplier=scale_multiplier,
        generator=generator,
        overwrite=overwrite,
    )


def _rescaled(factor: QuantisedFactor, power: float) -> QuantisedFactor:
    """The factor times a power of two: exact for bfloat16 scales and entries."""
    stored = factor.codes.to(torch.int16) if factor.bits == 16 else factor.scales
    moved = (stored.view(torch.bfloat16) * power).view(torch.int16)
    if factor.bits == 16:
        return replace(factor, codes=moved.long())
    return replace(factor, scales=moved)


def _filled(draft: Decomposition, done: Alternation, power: float) -> Decomposition:
    """Codes and scales of the best iterate, with the power of two put back."""
    best: Iterate | None = done.best
    assert best is not None
    low = best.low_rank
    several = best.scale if isinstance(best.scale, RowScales) else None
    return replace(
        draft,
        q_codes=list(best.codes),
        q_scale=best.scale * power if isinstance(best.scale, float) else 1.0,
        q_scales=None if several is None else several.times(power),
        left=None if low is None else _rescaled(low.left, power),
        right=None if low is None else low.right,
        history=done.history,
    )


def _measured(
    draft: Decomposition, target: Float[Tensor, "m n"], power: float, prepared: PreparedHessian
) -> Decomposition:
    """Errors measured anew from codes alone, against ``target`` times ``power``, and the bits."""
    hessian = prepared.matrix
    loss = total = square = whole = 0.0
    for rows, ours in draft.decoded():
        wide = target[rows].double() * power
        difference = wide - ours
        loss += weighted_loss(difference, hessian)
        total += weighted_loss(wide, hessian)
        square += float(_own_inputs(difference, draft).square().sum())
        whole += float(_own_inputs(wide, draft).square().sum())
    left, right = draft.left, draft.right
    return replace(
        draft,
        error=math.sqrt(loss / max(total, 1e-300)),
        frobenius=math.sqrt(square / max(whole, 1e-300)),
        bits=layer_bits(
            *draft.shape,
            codebook=draft.codebook,
            q_bits=draft.q_bits,
            rank=draft.rank,
            factor_bits=16 if left is None or right is None else (left.bits, right.bits),
            rotated=draft.signs_out is not None,
            factor_codebook=left.codebook if left is not None else "lloyd-max",
            rescaled=draft.rescale is not None,
            q_group=draft.q_group,
        ),
    )


def _own_inputs(rows: Float[Tensor, "k n"], draft: Decomposition) -> Float[Tensor, "k n"]:
    """Rows in the basis and scale of the inputs; a rotation alone leaves norms as they are."""
    if draft.rescale is None:
        return rows
    if draft.signs_in is not None:
        rows = unrotate_rows(rows, draft.signs_in, draft.rotation)
    return rows / draft.rescale.view(torch.bfloat16).to(rows.dtype)


def rotation_kind(width: int, rotation: str = "had") -> str:
    """Name of the construction used for this width, for the metadata."""
    plan = rotation_plan(width, rotation)
    return plan.kind if plan.order == 1 else f"{plan.kind}-{plan.order}"
