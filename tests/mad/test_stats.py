"""Intervals: closed forms, coverage, pairing; the small measures of a learning curve."""

import numpy as np
import pytest

from mad.stats import (
    Score,
    TestRows,
    area_under_curve,
    mean_score,
    paired_difference,
    percentile_interval,
    resample_accuracy,
    rows_to_reach,
    sweep_sensitivity,
)
from workbench.errors import DataError


def rows(correct, scored=None) -> TestRows:
    correct = np.asarray(correct)
    return TestRows(correct, np.ones_like(correct) if scored is None else np.asarray(scored))


def test_the_spread_of_resamples_is_the_binomial_one():
    n, p = 400, 0.3
    table = rows([1] * int(n * p) + [0] * int(n * (1 - p)))
    draws = resample_accuracy([table], np.random.default_rng(0), draws=4000)
    assert draws.mean() == pytest.approx(p, abs=0.003)
    assert draws.std() == pytest.approx((p * (1 - p) / n) ** 0.5, rel=0.06)


def test_a_row_is_drawn_as_a_whole():
    """20 rows of 50 equal answers are worth 20 answers, not 1000."""
    table = rows([50] * 10 + [0] * 10, [50] * 20)
    draws = resample_accuracy([table], np.random.default_rng(0), draws=4000)
    assert draws.std() == pytest.approx((0.25 / 20) ** 0.5, rel=0.06)


def test_rows_with_more_answers_weigh_more():
    table = rows([9, 0], [9, 1])
    draws = resample_accuracy([table], np.random.default_rng(0), draws=2000)
    assert set(np.round(np.unique(draws), 6)) == {0.0, 0.9, 1.0}


def test_seeds_are_drawn_too():
    good, bad = rows([1] * 50), rows([0] * 50)
    draws = resample_accuracy([good, bad], np.random.default_rng(0), draws=4000)
    assert set(np.unique(draws)) == {0.0, 0.5, 1.0}
    assert (draws == 0.5).mean() == pytest.approx(0.5, abs=0.03)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        ability = rng.beta(6, 4, size=150)  # rows differ: .6 on average, answers within dependent
        table = rows(rng.binomial(4, ability), [4] * 150)
        low, high = percentile_interval(resample_accuracy([table], rng, draws=300))
        hits += low <= 0.6 <= high
    assert 0.91 <= hits / 300 <= 0.985


def test_a_mean_of_independent_scores_is_narrower():
    rng = np.random.default_rng(0)
    parts = [Score(0.5, rng.normal(0.5, 0.1, 4000)) for _ in range(4)]
    one, four = parts[0].interval, mean_score(parts).interval
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.06)
    assert mean_score(parts).value == 0.5


def test_pairing_removes_what_two_models_share():
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.4
    one, other = rows(~hard), rows(~hard & (rng.random(500) > 0.03))

    def score(table, seed):
        value = table.correct.mean()
        return Score(value, resample_accuracy([table], np.random.default_rng(seed)))

    paired = paired_difference(score(one, 7), score(other, 7))
    unpaired = paired_difference(score(one, 7), score(other, 8))
    assert paired.low > 0
    assert paired.p < 0.05
    assert unpaired.low < 0 < unpaired.high
    assert paired.value == pytest.approx(unpaired.value)
    same = paired_difference(score(one, 7), score(one, 7))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_scores_of_unequal_draws_cannot_be_paired():
    with pytest.raises(DataError, match="10 and 20 resamples"):
        paired_difference(Score(0.5, np.zeros(10)), Score(0.5, np.zeros(20)))
    with pytest.raises(DataError, match="at least one"):
        resample_accuracy([], np.random.default_rng(0))


def test_measures_of_a_curve():
    curve = [{"step": 100, "accuracy": 0.5}, {"step": 200, "accuracy": 0.96}]
    assert rows_to_reach(curve, 0.95, 64) == 200 * 64
    assert rows_to_reach(curve, 0.97, 64) is None
    assert area_under_curve(curve) == pytest.approx((0.25 * 100 + 0.73 * 100) / 200)
    assert sweep_sensitivity([0.1, 0.2, 0.9, 0.9, 0.9, 1.0]) == pytest.approx(0.1)
