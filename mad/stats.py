"""Intervals and comparisons of benchmark scores: what is resampled, and what is held fixed.

The settings of a task are a fixed design: they are averaged, not resampled. What is random is the
test split and, where there are several, the seed: rows are drawn again within a setting, seeds
within a sweep point. The answers of a row depend on one another, so a row is drawn as a whole. The
selected sweep point is held fixed: the optimism of selection lies outside of the interval, and the
difference between the two ways of selecting is printed instead.
[Efron & Tibshirani 1993, ch. 8; percentile intervals ch. 13]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from workbench.errors import DataError

DRAWS = 1000
"""Resamples of a bootstrap."""


class TestRows(NamedTuple):
    """Per row of a test split: how many answers were right, how many were asked for."""

    __test__ = False

    correct: Int[np.ndarray, " rows"]
    scored: Int[np.ndarray, " rows"]


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def percentile_interval(draws: Float[np.ndarray, " draws"], level: float = 0.95) -> Interval:
    """The central `level` of resampled values."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def resample_accuracy(
    seeds: Sequence[TestRows], rng: np.random.Generator, draws: int = DRAWS
) -> Float[np.ndarray, " draws"]:
    """Resampled accuracy of one sweep point of one setting: seeds, then rows within each.

    Accuracy is Σ correct / Σ scored over the rows drawn, averaged over the seeds drawn. Two models
    with as many seeds and rows meet the same draws when given equal generators: differences of
    their resamples are then a paired bootstrap.
    """
    if not seeds or any(len(c) != len(s) or not len(c) for c, s in seeds):
        raise DataError("resampling needs at least one seed with at least one row in each")
    tables = []
    for one in seeds:
        correct, scored = np.asarray(one.correct, float), np.asarray(one.scored, float)
        values = np.empty(draws)
        for i in range(draws):  # one draw at a time: a row of indices, not a table of them
            index = rng.integers(len(correct), size=len(correct))
            asked = scored[index].sum()
            values[i] = correct[index].sum() / asked if asked else math.nan
        tables.append(values)
    table = np.stack(tables)  # (seeds, draws)
    if len(seeds) == 1:
        return table[0]
    chosen = rng.integers(len(seeds), size=(len(seeds), draws))
    return np.take_along_axis(table, chosen, axis=0).mean(axis=0)


@dataclass(frozen=True)
class Score:
    """A mean over settings or tasks with its resamples."""

    value: float
    draws: Float[np.ndarray, " draws"]

    @property
    def interval(self) -> Interval:
        """95 % percentile interval, widened to hold the value itself."""
        low, high = percentile_interval(self.draws)
        return Interval(min(low, self.value), max(high, self.value))


def mean_score(parts: Sequence[Score]) -> Score:
    """The unweighted mean of independent parts, with intervals from the mean of their resamples."""
    if not parts:
        raise DataError("the mean of no score")
    value = math.fsum(part.value for part in parts) / len(parts)
    return Score(value, np.mean([part.draws for part in parts], axis=0))


class Difference(NamedTuple):
    """Score of one model minus that of another on the same rows."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided bootstrap probability of a difference at least this far from zero."""


def paired_difference(one: Score, other: Score) -> Difference:
    """Paired bootstrap: both scores must come from the same resamples of the same rows.

    p = 2 · min(share of resampled differences ≤ 0, share ≥ 0), at least 1 / (draws + 1).
    """
    if one.draws.shape != other.draws.shape:
        raise DataError(
            f"{len(one.draws)} and {len(other.draws)} resamples cannot be paired; "
            "draw both with the same generator"
        )
    draws = one.draws - other.draws
    low, high = percentile_interval(draws)
    n = len(draws)
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    value = one.value - other.value
    p = min(1.0, max(2 * int(tail) / n, 1 / (n + 1)))
    return Difference(value, min(low, value), max(high, value), p)


def sweep_sensitivity(accuracies: Sequence[float]) -> float:
    """Largest minus median accuracy over the points of a sweep: what tuning is worth.

    >>> round(sweep_sensitivity([0.2, 0.5, 0.9]), 2)
    0.4
    """
    return float(np.max(accuracies) - np.median(accuracies))


def rows_to_reach(
    curve: Sequence[Mapping[str, float]], level: float, rows_per_step: int
) -> int | None:
    """Training rows seen when validation accuracy first reaches `level`; None if it never does.

    >>> rows_to_reach([{"step": 10, "accuracy": 0.4}, {"step": 20, "accuracy": 0.97}], 0.95, 64)
    1280
    """
    for point in curve:
        if point["accuracy"] >= level:
            return int(point["step"]) * rows_per_step
    return None


def area_under_curve(curve: Sequence[Mapping[str, float]]) -> float:
    """Mean validation accuracy over the steps of training (trapezoids, from 0 at step 0).

    >>> area_under_curve([{"step": 1, "accuracy": 1.0}])
    0.5
    """
    steps = np.array([0.0, *(point["step"] for point in curve)])
    values = np.array([0.0, *(point["accuracy"] for point in curve)])
    return float(np.trapezoid(values, steps) / steps[-1])
