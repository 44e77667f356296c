"""The fits of `mad.scale`: power laws, IsoFLOP parabolas, correlations, foretold perplexities.

A run is a row with `architecture`, `perplexity` and any of `flops`, `parameters`, `tokens`,
`state_floats`, `mad_score`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mad.stats import Interval, percentile_interval
from workbench.errors import DataError
from workbench.tables import read_csv

NUMBERS = ("flops", "parameters", "tokens", "state_floats", "mad_score", "perplexity")
"""Columns that hold numbers; all but `perplexity` may be missing."""
POSITIVE = tuple(name for name in NUMBERS if name != "mad_score")
TOLERANCE = 0.1
"""Runs whose FLOPs differ by less than this share belong to one IsoFLOP group."""
Vector = Float[np.ndarray, " n"]
Row = Mapping[str, Any]


def read_runs(path: Path, token_scale: float = 6.0) -> list[dict[str, Any]]:
    """The runs of a CSV, checked; `flops` is filled in from parameters and tokens where it lacks.

    Raises:
        DataError: a column is missing, or a cell is no usable number (file:line:column).
    """
    rows = read_csv(path)
    if not rows:
        raise DataError(f"{path}: no runs; expected a header line and at least one row below it")
    for name in ("architecture", "perplexity"):
        if name not in rows[0]:
            found = ", ".join(rows[0])
            raise DataError(f"{path}:1: no column {name!r}; found {found}. Add it to the header")
    usable = [name for name in NUMBERS[:-1] if name in rows[0]]
    if not usable:
        raise DataError(
            f"{path}:1: nothing to fit perplexity against; add a column "
            "flops, parameters with tokens, state_floats or mad_score"
        )
    for line, row in enumerate(rows, 2):
        if row["architecture"] is None:
            raise DataError(f"{path}:{line}:architecture: empty; expected a name")
        row["architecture"] = str(row["architecture"])
        for name in NUMBERS:
            value = row.get(name)
            if value is None and name != "perplexity":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is None or not number or not math.isfinite(value):
                raise DataError(f"{path}:{line}:{name}: found {value!r}, expected a finite number")
            if name in POSITIVE and value <= 0:
                raise DataError(f"{path}:{line}:{name}: found {value}, expected more than 0")
            if name == "mad_score" and not 0 <= value <= 1:
                raise DataError(
                    f"{path}:{line}:{name}: found {value}, expected a fraction between 0 and 1"
                )
        if row.get("flops") is None and row.get("parameters") and row.get("tokens"):
            row["flops"] = token_scale * row["parameters"] * row["tokens"]
    return rows


def column_pairs(rows: Sequence[Row], name: str) -> tuple[Vector, Vector]:
    """A column and the perplexity, where the column is filled."""
    kept = [row for row in rows if row.get(name) is not None]
    return (
        np.array([row[name] for row in kept], float),
        np.array([row["perplexity"] for row in kept], float),
    )


class Line(NamedTuple):
    """y = offset + slope · x with percentile intervals of a bootstrap over the points."""

    offset: float
    slope: float
    offset_interval: Interval
    slope_interval: Interval
    n: int


def least_squares(x: Vector, y: Vector) -> tuple[float, float]:
    """Offset and slope of y = offset + slope · x.

    >>> least_squares(np.array([0.0, 1.0]), np.array([1.0, 3.0]))
    (1.0, 2.0)
    """
    centre = x - x.mean()
    slope = float(centre @ (y - y.mean()) / (centre @ centre))
    return float(y.mean() - slope * x.mean()), slope


def resamples(n: int, draws: int, rng: np.random.Generator, x: Vector) -> list[np.ndarray]:
    """Indices drawn again with replacement; draws with a single x define no line and are left out.

    [Efron & Tibshirani 1993, ch. 9.5: the pairs are resampled]
    """
    indices = rng.integers(n, size=(draws, n))
    return [index for index in indices if np.ptp(x[index]) > 0]


def fit_line(
    x: Vector, y: Vector, rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> Line | None:
    """Least squares with intervals; None for fewer than three different x."""
    if len(np.unique(x)) < 3:
        return None
    offset, slope = least_squares(x, y)
    fits = np.array([least_squares(x[i], y[i]) for i in resamples(len(x), draws, rng, x)])
    return Line(
        offset,
        slope,
        percentile_interval(fits[:, 0], level),
        percentile_interval(fits[:, 1], level),
        len(x),
    )


class Optimum(NamedTuple):
    """Minimum of an IsoFLOP parabola."""

    flops: float
    parameters: float
    perplexity: float
    n: int


def isoflop_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs of about equal FLOPs, rising: a group ends `TOLERANCE` above its smallest member."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["flops"]):
        if groups and row["flops"] <= groups[-1][0]["flops"] * (1 + TOLERANCE):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def parabola_minimum(group: Sequence[Row]) -> Optimum | None:
    """The minimum of log P over log N; None where there is none among the runs' sizes."""
    sized = [row for row in group if row.get("parameters")]
    x = np.log([row["parameters"] for row in sized])
    if len(np.unique(x)) < 3:
        return None
    y = np.log([row["perplexity"] for row in sized])
    centre = x.mean()
    curvature, slope, offset = np.polyfit(x - centre, y, 2)
    if curvature <= 0:
        return None
    best = -slope / (2 * curvature)
    if not x.min() <= best + centre <= x.max():
        return None
    flops = math.exp(np.mean(np.log([row["flops"] for row in sized])))
    lowest = float(offset - slope**2 / (4 * curvature))
    return Optimum(flops, math.exp(best + centre), math.exp(lowest), len(sized))


def frontier(rows: Sequence[Row]) -> tuple[list[Optimum], bool]:
    """Perplexity by FLOPs of one architecture, and whether parabolas gave it.

    Either every point is the minimum of a parabola, or every point is the best run of its group.
    """
    groups = isoflop_groups([row for row in rows if row.get("flops")])
    minima = [found for group in groups if (found := parabola_minimum(group))]
    if len(minima) >= 3:
        return minima, True
    best = [min(group, key=lambda row: row["perplexity"]) for group in groups]
    return [
        Optimum(row["flops"], row.get("parameters") or math.nan, row["perplexity"], len(group))
        for row, group in zip(best, groups, strict=True)
    ], False


def correlations(
    x: Vector, y: Vector, rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> list[dict[str, Any]]:
    """Spearman, Kendall (τ_b), Pearson: value, bootstrap interval, range with one point left out.

    Where the correlation of all points is ±1 every resample has it too and the interval has no
    width: five points cannot tell how far below the truth may lie, so p of the permutation test
    (2/n! for a perfect order) stands beside it.
    """
    from scipy.stats import kendalltau, pearsonr, spearmanr

    kinds = {"Spearman": spearmanr, "Kendall": kendalltau, "Pearson": pearsonr}
    drawn = [i for i in resamples(len(x), draws, rng, x) if np.ptp(y[i]) > 0]
    rows = []
    for name, function in kinds.items():
        values = np.array([function(x[i], y[i])[0] for i in drawn])
        left_out = [
            float(function(np.delete(x, i), np.delete(y, i))[0])
            for i in range(len(x))
            if np.ptp(np.delete(x, i)) > 0 and np.ptp(np.delete(y, i)) > 0
        ]
        low, high = percentile_interval(np.clip(values, -1, 1), level)
        rows.append(
            {
                "coefficient": name,
                "value": float(function(x, y)[0]),
                "low": low,
                "high": high,
                "left_out_lowest": min(left_out),
                "left_out_highest": max(left_out),
                "p_permutation": permutation_p(x, y, function, rng),
                "n": len(x),
            }
        )
    return rows


def permutation_p(x: Vector, y: Vector, function: Any, rng: np.random.Generator) -> float:
    """Two-sided p: share of orders of y with at least this correlation, all of them up to n = 6."""
    from itertools import permutations

    seen = abs(function(x, y)[0]) - 1e-12
    if len(y) <= 6:
        orders = [list(order) for order in permutations(range(len(y)))]
        return sum(abs(function(x, y[order])[0]) >= seen for order in orders) / len(orders)
    draws = 1000
    more = sum(abs(function(x, rng.permutation(y))[0]) >= seen for _ in range(draws))
    return (more + 1) / (draws + 1)


class Prediction(NamedTuple):
    """A foretold perplexity with its prediction interval."""

    score: float
    perplexity: float
    low: float
    high: float
    extrapolated: bool


def predict(x: Vector, y: Vector, score: float, level: float = 0.95) -> Prediction:
    """Perplexity of one more model at `score`, by the straight line through the others.

    The interval is Student's for a new observation, n − 2 degrees of freedom:
    ŷ ± t s √(1 + 1/n + (score − x̄)²/Σ(x − x̄)²)    [Draper & Smith 1998, ch. 3.1]
    """
    from scipy.stats import t

    n = len(x)
    offset, slope = least_squares(x, y)
    residual = y - offset - slope * x
    spread = math.sqrt(float(residual @ residual) / (n - 2))
    centre = x - x.mean()
    lever = math.sqrt(1 + 1 / n + (score - x.mean()) ** 2 / float(centre @ centre))
    half = float(t.ppf((1 + level) / 2, n - 2)) * spread * lever
    value = offset + slope * score
    outside = not x.min() <= score <= x.max()
    return Prediction(score, value, value - half, value + half, outside)
