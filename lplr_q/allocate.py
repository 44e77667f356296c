"""Which codebook, bits and rank each sublayer gets when the whole model has one budget.

    minimise sum_l w_l e_l^2(codebook, B_Q, r)   subject to   sum_l bits_l <= target sum_l m_l n_l

The error of every choice is foretold (:mod:`lplr_q.prediction`); ``w_l`` says what an error there
does to the model's output (:mod:`lplr_q.sensitivity`). The multiple-choice knapsack is solved by
bisection of the Lagrange multiplier and a greedy fill [Sinha & Zoltners 1979]; the best setting
that gives all sublayers the same codebook and bits is among the candidates, so the result is never
worse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lplr_q.bits import FactorBits
from lplr_q.prediction import FIELDS, Choice, Survey, choices_for, fit_probes, predict
from workbench import storage
from workbench.errors import ConfigError, DataError

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


def build_item(
    name: str,
    found: Survey,
    *,
    target: float,
    sensitivity: float | None = None,
    codebooks: Sequence[str] = ("e8p",),
    factor_bits: FactorBits = 4,
) -> Item:
    """Candidates of one sublayer with predicted errors.

    ``sensitivity`` is the model's loss per unit of tr(E H E^T) (H divided by its mean diagonal);
    None counts every sublayer's e^2 alike.
    """
    m, n = found.spectrum.shape
    options = choices_for(
        m,
        n,
        codebooks=codebooks,
        factor_bits=factor_bits,
        target=target,
        rotated=found.rotated,
    )
    fits = {
        codebook: fit_probes(
            found.spectrum, {c: e for c, e in found.measured.items() if c.codebook == codebook}
        )
        for codebook in codebooks
    }
    known = {dataclasses.replace(c, error2=0.0): e for c, e in found.measured.items()}
    choices = tuple(
        dataclasses.replace(
            c,
            error2=known.get(
                dataclasses.replace(c, error2=0.0), predict(found.spectrum, c, fits[c.codebook])
            ),
        )
        for c in options
    )
    importance = 1.0 if sensitivity is None else sensitivity * found.spectrum.energy
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
        for field in FIELDS:
            kind = str if field == "codebook" else int
            value = entry[field]
            pair = field == "factor_bits" and isinstance(value, list) and len(value) == 2
            for one in value if pair else [value]:
                if isinstance(one, kind) and not isinstance(one, bool):
                    continue
                raise DataError(f"{path}: {name}.{field} is {entry[field]!r}, no {kind.__name__}")
        if entry["rank"] < 0 or entry["q_bits"] < 0:
            raise DataError(f"{path}: {name} has a negative rank or width: {entry}")
    return modules
