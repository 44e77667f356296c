"""Which codebook, bits and rank each sublayer gets when the whole model has one budget.

    minimise sum_l w_l e_l^2(codebook, B_Q, r)   subject to   sum_l bits_l <= target sum_l m_l n_l

The error of every choice is predicted from the singular values of W C (H = C C^T) and corrected
by at most three real decompositions per sublayer; ``w_l`` says what an error there does to the
model's output (:mod:`lplr_q.sensitivity`). The multiple-choice knapsack is solved by bisection of
the Lagrange multiplier and a greedy fill [Sinha & Zoltners 1979]; the best setting that gives all
sublayers the same codebook and bits is among the candidates, so the result is never worse.

Prediction. Rounding A = W - L R with codebook distortion ``mse`` and feedback leaves

    e^2 = a mse |A|_F^2 / (m n) m tr(D) / tr(W H W^T)
    |A|_F^2 = sum_{i>r} p_i + kappa sum_{i<=r} p_i

with D the block diagonal of LDL and p_i the power of the i-th component of the rank-constrained
regression; ``a`` (sweeps, overload by feedback) and ``kappa`` (rounded factors) are fitted. Where
a rank helps more than its power says, since what is left is rounded better, the fit is a factor
exp(-gamma f) with f the share of the power that L R takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.decompose import PreparedHessian
from lplr_q.bits import layer_bits, rank_for_budget
from lplr_q.codebooks.base import make_codebook
from workbench import storage
from workbench.errors import ConfigError, DataError

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
WIDTHS = (1, 2, 3, 4)
FIELDS = {"codebook": str, "q_bits": int, "rank": int, "factor_bits": int}


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix, the bits it takes, and its predicted squared relative error."""

    codebook: str
    q_bits: int
    rank: int
    factor_bits: int
    bits: int = 0
    error2: float = float("nan")

    def entry(self) -> dict[str, Any]:
        """As written to an allocation file."""
        return {name: getattr(self, name) for name in FIELDS}


# ---------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Spectrum:
    """What the prediction needs to know of one sublayer."""

    shape: tuple[int, int]
    tail: Float[Tensor, " k"]
    """Share of tr(W H W^T) that rank r leaves, for r = 0, 1, ..."""
    power: Float[Tensor, " k"]
    """|W - L_r R_r|_F^2 for r = 0, 1, ..."""
    noise: dict[int, float]
    """tr(D) / (n tr(W H W^T)) by block width: e^2 per unit of distortion and power."""
    energy: float
    """tr(W H W^T), H divided by its mean diagonal."""


def spectrum(
    weight: Float[Tensor, "m n"], prepared: PreparedHessian, *, blocks: Iterable[int] = (1, 8, 16)
) -> Spectrum:
    """Singular values of W C, the power of each component, and tr(D) of the LDL factorisations.

    W C and the rotated pair have the same singular values, so W itself may be rotated or not; the
    power of component i is S_i^2 |Z_i^T C^-1|^2, and tr(D) = sum |C_kk|^2 over diagonal blocks.
    """
    from lplr_q.linalg.hadamard import rotate_weight

    m, n = weight.shape
    own = weight.detach().double()
    if prepared.signs_in is not None:  # the basis of C; the output side changes no singular value
        own = rotate_weight(own, torch.ones(m, dtype=torch.int8), prepared.signs_in)
    factor = prepared.factor.double()
    _, values, z = torch.linalg.svd(own @ factor, full_matrices=False)
    rows = torch.linalg.solve_triangular(factor, z, upper=False, left=False)
    energy = max(float(values.square().sum()), 1e-300)
    power = values.square() * rows.square().sum(1)
    noise = {}
    for block in sorted(set(blocks)):
        trace = sum(
            float(factor[low : low + block, low : low + block].square().sum())
            for low in range(0, n, block)
        )
        noise[block] = trace / (n * energy)
    return Spectrum((m, n), _left(values.square()) / energy, _left(power), noise, energy)


def _left(parts: Float[Tensor, " k"]) -> Float[Tensor, " k1"]:
    """What is left after the first r parts, for r = 0 .. k."""
    return torch.cat([parts.flip(0).cumsum(0).flip(0), parts.new_zeros(1)])


@lru_cache(maxsize=64)
def distortion(codebook: str, bits: int, *, vectors: int = 4096) -> float:
    """Mean squared error of the codebook for unit Gaussian weights (sampled, seed 0)."""
    book = make_codebook(codebook, bits)
    rows = 16 * max(1, vectors // 16)
    x = torch.randn(rows, book.dim, generator=torch.Generator().manual_seed(0))
    points = book.decode(book.encode(x * book.opt_scale)) / book.opt_scale
    return float((x - points).square().mean())


@dataclass(frozen=True)
class Fit:
    """The corrections of a sublayer: one per width of Q, two for what a rank brings."""

    scale: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    """a by (codebook, bits), where it was measured."""
    kappa: float = 0.05
    """Noise of the rounded factors per unit of the power they take."""
    gamma: float = 0.0
    """Error that L R saves beyond its power."""

    def of(self, codebook: str, bits: int) -> float:
        """a at this width: measured, else interpolated in bits, else of the other codebooks."""
        own = {b: a for (c, b), a in self.scale.items() if c == codebook}
        own = own or {b: a for (_, b), a in self.scale.items()}
        if not own:
            return 1.0
        low = max((b for b in own if b <= bits), default=min(own))
        high = min((b for b in own if b >= bits), default=max(own))
        if low == high:
            return own[low]
        share = (bits - low) / (high - low)
        return own[low] ** (1 - share) * own[high] ** share


def predict(spectrum: Spectrum, choice: Choice, fit: Fit | None = None) -> float:
    """e^2 of a choice (module docstring); never above what zeroing the matrix would leave."""
    fit = fit or Fit()
    rank = min(choice.rank, len(spectrum.power) - 1)
    kappa = 0.0 if choice.factor_bits == 16 else fit.kappa
    left = float(spectrum.power[rank])
    left += kappa * (float(spectrum.power[0]) - left)
    if not choice.q_bits:
        gone = 1 - float(spectrum.tail[rank])
        return min(1.0, float(spectrum.tail[rank]) + kappa * gone)
    book = make_codebook(choice.codebook, choice.q_bits)
    noise = spectrum.noise[book.dim]
    taken = 1 - float(spectrum.power[rank]) / max(float(spectrum.power[0]), 1e-300)
    a = fit.of(choice.codebook, choice.q_bits) * math.exp(-fit.gamma * taken)
    return min(1.0, a * distortion(choice.codebook, choice.q_bits) * left * noise)


def probes(choices: Sequence[Choice], limit: int = 3) -> list[Choice]:
    """At most ``limit`` choices to measure: narrowest Q alone, the same with the middle rank,
    widest Q alone."""
    if limit < 1 or not choices:
        return []
    plain = sorted((c for c in choices if c.q_bits and not c.rank), key=lambda c: c.q_bits)
    if not plain:
        return [min(choices, key=lambda c: c.bits)][:limit]
    low, high = plain[0], plain[-1]
    same = (c for c in choices if (c.codebook, c.q_bits) == (low.codebook, low.q_bits) and c.rank)
    ranked = sorted(same, key=lambda c: c.rank)
    wanted = [low, *ranked[len(ranked) // 2 : len(ranked) // 2 + 1], high]
    return list(dict.fromkeys(wanted))[:limit]


def fit_probes(spectrum: Spectrum, measured: Mapping[Choice, float]) -> Fit:
    """The corrections that reproduce the measured e^2 of the probes.

    Choices without rank give ``a``; one with a rank then gives ``kappa`` where it leaves more
    error than exact factors would, and ``gamma`` where it leaves less.
    """
    scale: dict[tuple[str, int], float] = {}
    for choice, error2 in measured.items():
        if choice.q_bits and not choice.rank:
            plain = predict(spectrum, choice, Fit(kappa=0.0))
            scale[choice.codebook, choice.q_bits] = max(error2, 1e-30) / max(plain, 1e-30)
    fit = Fit(scale)
    for choice, error2 in measured.items():
        if not (choice.q_bits and choice.rank):
            continue
        exact = predict(spectrum, choice, Fit(scale, 0.0))
        rounded = predict(spectrum, choice, Fit(scale, 1.0))
        taken = 1 - float(spectrum.power[choice.rank]) / max(float(spectrum.power[0]), 1e-300)
        if error2 < exact and taken > 0:
            fit = Fit(scale, 0.0, math.log(exact / max(error2, 1e-30)) / taken)
        elif rounded > exact:
            fit = Fit(scale, min(1.0, (error2 - exact) / (rounded - exact)))
    return fit


# ---------------------------------------------------------------- the choices


def available_widths(codebook: str, widths: Iterable[int] = WIDTHS) -> list[int]:
    """Bits of Q this codebook has.

    Raises:
        ConfigError: unknown codebook, or none of ``widths``.
    """
    found, problem = [], None
    for bits in widths:
        try:
            make_codebook(codebook, bits)
        except ConfigError as error:
            problem = error
        else:
            found.append(bits)
    if not found:
        raise problem or ConfigError(f"no widths asked of codebook {codebook}")
    return found


def choices_for(
    m: int,
    n: int,
    *,
    codebooks: Sequence[str] = ("e8p",),
    factor_bits: int = 4,
    ranks: Iterable[int] = RANKS,
    target: float | None = None,
    rotated: bool = True,
    limit: float = 8.0,
) -> list[Choice]:
    """All candidates of an m x n matrix up to ``limit`` bits per weight.

    With ``target``, also the rank that fills it at each width: the uniform setting's choice.
    """
    found: list[Choice] = []
    for codebook in codebooks:
        for q_bits in available_widths(codebook):
            wanted = {r for r in ranks if r <= min(m, n) // 2}
            if target is not None:
                wanted.add(_filling(m, n, target, codebook, q_bits, factor_bits, rotated))
            for rank in sorted(wanted - {-1}):
                bits = layer_bits(
                    m,
                    n,
                    codebook=codebook,
                    q_bits=q_bits,
                    rank=rank,
                    factor_bits=factor_bits,
                    rotated=rotated,
                ).total
                if bits <= limit * m * n:
                    found.append(Choice(codebook, q_bits, rank, factor_bits, bits))
    return found


def _filling(
    m: int, n: int, target: float, codebook: str, q_bits: int, factor_bits: int, rotated: bool
) -> int:
    """Largest rank within the target, -1 when Q alone exceeds it."""
    return rank_for_budget(
        m,
        n,
        target,
        codebook=codebook,
        q_bits=q_bits,
        factor_bits=factor_bits,
        rotated=rotated,
    )


# ---------------------------------------------------------------- the knapsack


@dataclass(frozen=True)
class Item:
    """One sublayer in the knapsack."""

    name: str
    weights: int
    """m n."""
    importance: float
    """w_l: what a unit of e^2 here costs the model."""
    choices: tuple[Choice, ...]

    def cost(self, choice: Choice) -> float:
        """w_l e^2."""
        return self.importance * choice.error2


@dataclass(frozen=True)
class Allocation:
    """The chosen setting of every sublayer."""

    target_bpw: float
    modules: dict[str, Choice]
    weights: dict[str, int]
    importance: dict[str, float]
    uniform_cost: float = float("nan")
    """Sum of w_l e^2 of the best uniform setting within the same budget (nan: none fits)."""

    @property
    def bits_per_weight(self) -> float:
        """Bits spent, overheads included, over all weights."""
        return sum(c.bits for c in self.modules.values()) / sum(self.weights.values())

    @property
    def cost(self) -> float:
        """Sum of w_l e^2."""
        return sum(self.importance[n] * c.error2 for n, c in self.modules.items())

    def to_tree(self) -> dict[str, Any]:
        """As written to JSON: ``modules`` is what compression reads, the rest says why."""
        return {
            "target_bpw": self.target_bpw,
            "bits_per_weight": self.bits_per_weight,
            "cost": self.cost,
            "uniform_cost": self.uniform_cost if self.uniform_cost == self.uniform_cost else None,
            "modules": {name: choice.entry() for name, choice in self.modules.items()},
            "predicted": {
                name: {
                    "error": choice.error2**0.5,
                    "bits_per_weight": choice.bits / self.weights[name],
                    "importance": self.importance[name],
                }
                for name, choice in self.modules.items()
            },
        }


def _frontier(item: Item) -> list[Choice]:
    """Choices that no cheaper one beats, by rising bits and falling error."""
    kept: list[Choice] = []
    for choice in sorted(item.choices, key=lambda c: (c.bits, c.error2)):
        if not kept or choice.error2 < kept[-1].error2:
            kept.append(choice)
    return kept


def uniform_settings(items: Sequence[Item], target: float) -> list[dict[str, Choice]]:
    """Per (codebook, q_bits, factor_bits): every sublayer's largest rank within ``target``."""
    kinds = dict.fromkeys(
        (c.codebook, c.q_bits, c.factor_bits) for item in items for c in item.choices
    )
    found = []
    for kind in kinds:
        own = {}
        for item in items:
            fitting = [
                c
                for c in item.choices
                if (c.codebook, c.q_bits, c.factor_bits) == kind
                and c.bits <= target * item.weights + 1e-6
            ]
            if fitting:
                own[item.name] = max(fitting, key=lambda c: c.rank)
        if len(own) == len(items):
            found.append(own)
    return found


def allocate(items: Sequence[Item], target: float) -> Allocation:
    """The cheapest combination within ``target`` bits per weight, never worse than a uniform one.

    Each multiplier lambda picks per sublayer the choice with least w e^2 + lambda bits; the
    largest spending within the budget is found by bisection, then the most useful upgrades that
    still fit are taken, one after the other. The same fill starts from the best uniform setting.

    Raises:
        ConfigError: no sublayers, or even the smallest choices exceed the budget.
    """
    if not items:
        raise ConfigError("nothing to allocate: no sublayer was given")
    frontiers = {item.name: _frontier(item) for item in items}
    weights = sum(item.weights for item in items)
    budget = target * weights + 1e-6
    least = sum(f[0].bits for f in frontiers.values())
    if least > budget:
        raise ConfigError(
            f"{target:g} bits per weight: the smallest choices of all sublayers take "
            f"{least / weights:.3f}; raise the target or offer narrower codebooks"
        )
    starts = [_lagrangian(items, frontiers, budget)]
    uniform = uniform_settings(items, target)
    best_uniform = min((_cost(items, u) for u in uniform), default=float("nan"))
    starts += sorted(uniform, key=lambda u: _cost(items, u))[:1]
    filled = [_fill(items, frontiers, start, budget) for start in starts]
    chosen = min(filled, key=lambda found: _cost(items, found))
    return Allocation(
        target,
        {item.name: chosen[item.name] for item in items},
        {item.name: item.weights for item in items},
        {item.name: item.importance for item in items},
        best_uniform,
    )


def _cost(items: Sequence[Item], chosen: Mapping[str, Choice]) -> float:
    return sum(item.cost(chosen[item.name]) for item in items)


def _lagrangian(
    items: Sequence[Item], frontiers: Mapping[str, list[Choice]], budget: float
) -> dict[str, Choice]:
    """Bisection on the price of a bit; the cheapest price whose spending fits."""

    def pick(price: float) -> dict[str, Choice]:
        return {
            item.name: min(frontiers[item.name], key=lambda c: item.cost(c) + price * c.bits)
            for item in items
        }

    def spent(chosen: Mapping[str, Choice]) -> int:
        return sum(c.bits for c in chosen.values())

    low, high = 0.0, 1e-30
    if spent(pick(low)) <= budget:
        return pick(low)
    while spent(pick(high)) > budget:
        low, high = high, high * 16
        if high > 1e30:  # prices beyond any importance: the smallest choices
            return {name: frontier[0] for name, frontier in frontiers.items()}
    for _ in range(100):
        middle = (low * high) ** 0.5 if low > 0 else high / 2
        if spent(pick(middle)) > budget:
            low = middle
        else:
            high = middle
    return pick(high)


def _fill(
    items: Sequence[Item],
    frontiers: Mapping[str, list[Choice]],
    start: Mapping[str, Choice],
    budget: float,
) -> dict[str, Choice]:
    """Upgrades by gain per bit while one fits."""
    chosen = dict(start)
    left = budget - sum(c.bits for c in chosen.values())
    while True:
        best: tuple[float, str, Choice] | None = None
        for item in items:
            now = chosen[item.name]
            for choice in frontiers[item.name]:
                more = choice.bits - now.bits
                gain = item.cost(now) - item.cost(choice)
                if gain <= 0 or more > left:
                    continue
                rate = gain / max(more, 1e-9)
                if best is None or rate > best[0]:
                    best = (rate, item.name, choice)
        if best is None:
            return chosen
        left -= best[2].bits - chosen[best[1]].bits
        chosen[best[1]] = best[2]


# ---------------------------------------------------------------- from matrices to an allocation


def build_item(
    name: str,
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    *,
    target: float,
    sensitivity: float | None = None,
    codebooks: Sequence[str] = ("e8p",),
    factor_bits: int = 4,
    measure: Callable[[Choice], float] | None = None,
    limit: int = 3,
) -> Item:
    """Candidates of one sublayer with predicted errors.

    ``measure(choice)`` returns e of a real decomposition and is called at most ``limit`` times.
    ``sensitivity`` is the model's loss per unit of tr(E H E^T) (H divided by its mean diagonal);
    None counts every sublayer's e^2 alike.
    """
    m, n = weight.shape
    options = choices_for(
        m,
        n,
        codebooks=codebooks,
        factor_bits=factor_bits,
        target=target,
        rotated=prepared.signs_in is not None,
    )
    dims = {make_codebook(c.codebook, c.q_bits).dim for c in options if c.q_bits}
    known = spectrum(weight, prepared, blocks=dims)
    measured = {} if measure is None else {c: measure(c) ** 2 for c in probes(options, limit)}
    fit = fit_probes(known, measured)
    choices = tuple(
        dataclasses.replace(c, error2=measured.get(c, predict(known, c, fit))) for c in options
    )
    importance = 1.0 if sensitivity is None else sensitivity * known.energy
    return Item(name, m * n, importance, choices)


def read_allocation(path: Path | str) -> dict[str, dict[str, Any]]:
    """The ``modules`` part of an allocation file, checked.

    Raises:
        DataError: no such file, or entries of another form.
    """
    tree = storage.read_json(Path(path))
    modules = tree.get("modules") if isinstance(tree, dict) else None
    if not isinstance(modules, dict) or not modules:
        raise DataError(f"{path}: no 'modules' table; expected an allocation as lplr_q.run writes")
    for name, entry in modules.items():
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise DataError(f"{path}: {name} holds {entry!r}; expected {', '.join(FIELDS)}")
        for field, kind in FIELDS.items():
            if not isinstance(entry[field], kind) or isinstance(entry[field], bool):
                raise DataError(f"{path}: {name}.{field} is {entry[field]!r}, no {kind.__name__}")
        if entry["rank"] < 0 or entry["q_bits"] < 0:
            raise DataError(f"{path}: {name} has a negative rank or width: {entry}")
    return modules
