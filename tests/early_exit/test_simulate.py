"""The simulated curve: end points, monotone depth, intervals that cover, calibration by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from early_exit.adapters.base import Costs
from early_exit.simulate import (
    Evidence,
    bootstrap_ratio,
    calibration_error,
    curve,
    fixed_rows,
    gate_quality,
    oracle_row,
    pruning_rows,
    threshold_for_speedup,
    threshold_grid,
)
from workbench.errors import ConfigError, DataError
from workbench.seeding import Streams

COSTS = Costs(layers=8, block=1000, fill=100, vocabulary=500, gate=10, context=2.0, mixer=0.0)


def evidence(scores, agree, **changes) -> Evidence:
    scores = np.asarray(scores, dtype=float)
    n = len(scores)
    return Evidence(
        layers=8,
        exits=(1, 3, 5),
        scores=scores,
        agree=np.asarray(agree, dtype=bool),
        document=np.arange(n) // 4,
        position=np.arange(n) % 4,
        **changes,
    )


def test_the_first_exit_over_its_threshold_is_taken():
    given_ = evidence([[0.2, 0.9, 0.9], [0.6, 0.1, 0.1], [0.1, 0.1, 0.5]], np.eye(3))
    assert given_.leave(0.5).tolist() == [1, 0, 3]  # strictly greater: .5 is not enough
    assert given_.leave((0.7, 1.0, 0.4)).tolist() == [2, 3, 2]  # 1 disables an exit
    index = given_.leave(0.5)
    assert given_.depth(index).tolist() == [4, 2, 8]
    assert given_.correct(index).tolist() == [False, False, True]


tokens = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=tokens)
def test_depth_grows_with_the_threshold_and_ends_at_the_first_exit_and_at_l(data, n):
    scores = data.draw(hnp.arrays(float, (n, 3), elements=st.floats(0, 1)))
    agree = data.draw(hnp.arrays(bool, (n, 3)))
    given_ = evidence(scores, agree)
    rows = curve(given_, threshold_grid(scores, 20), COSTS, 8, Streams(0)("b"))
    depth = [row["mean_blocks"] for row in rows]
    assert depth == sorted(depth)
    assert depth[0] == 2
    assert depth[-1] == 8
    assert rows[-1]["agreement"] == 1.0
    for row in rows:
        assert row["speedup_blocks"] >= row["speedup_arithmetic_propagate"] - 1e-9
        assert row["low"] - 1e-9 <= row["agreement"] <= row["high"] + 1e-9
    assert oracle_row(given_, Streams(0)("o"))["agreement"] == 1.0


def test_counts_of_a_simulated_decode():
    given_ = evidence([[0.9, 0, 0], [0, 0.9, 0], [0, 0, 0]], np.ones((3, 3)))
    index = given_.leave(0.5)
    fill = given_.tally(index)
    assert (fill.latency_blocks, fill.blocks, fill.fills) == (14, 14, 10)
    assert (fill.gates, fill.vocabularies, fill.context) == (1 + 2 + 3, 3, 2 * 1 + 4 * 2 + 8 * 3)
    defer = given_.tally(index, "defer")
    assert (defer.latency_blocks, defer.blocks, defer.fills) == (14, 24, 0)
    looks = evidence(given_.scores, given_.agree, criterion="maxprob", emission="affine")
    looked = looks.tally(index)
    assert (looked.gates, looked.vocabularies, looked.translations) == (0, 1 + 2 + 4, 1 + 2 + 3)
    last = evidence(given_.scores, given_.agree, emission="last_block")
    assert last.depth(index).tolist() == [3, 5, 8]


def test_a_threshold_for_a_speed_up_is_the_most_careful_that_reaches_it():
    scores = np.linspace(0.01, 0.99, 40)[:, None] * np.ones(3)
    given_ = evidence(scores, np.ones((40, 3)))
    grid = threshold_grid(scores, 40)
    threshold = threshold_for_speedup(given_, 2.0, grid)
    reached = 8 / given_.depth(given_.leave(threshold)).mean()
    more_careful = min(t for t in grid if t > threshold)
    assert reached >= 2.0 > 8 / given_.depth(given_.leave(more_careful)).mean()
    with pytest.raises(ConfigError, match=r"out of reach: leaving at block 1 .* gives 4"):
        threshold_for_speedup(given_, 5.0, grid)


def test_the_bootstrap_interval_covers_the_ratio():
    """Documents of correlated tokens; 200 trials at 95 % fail fewer than 88 % with p < 1e-4."""
    streams, inside, truth = Streams(3), 0, 0.7
    for trial in range(200):
        rng = streams("trial", index=trial)
        sizes = rng.integers(5, 30, size=60).astype(float)
        share = rng.beta(7, 3, size=60)  # mean .7, whatever the size
        low, high = bootstrap_ratio(sizes * share, sizes, rng)
        inside += low <= truth <= high
    assert inside >= 0.86 * 200


def test_calibration_error_by_hand():
    scores = np.array([0.1, 0.1, 0.9, 0.9])
    assert calibration_error(scores, np.array([0, 0, 1, 1], bool)) == pytest.approx(0.1)
    assert calibration_error(scores, np.array([1, 1, 0, 0], bool)) == pytest.approx(0.9)
    quality = gate_quality(scores, np.array([0, 0, 1, 1], bool), 0.5)
    assert quality["auroc"] == 1.0
    assert quality["f1"] == 1.0
    assert quality["brier"] == pytest.approx(0.01)
    assert gate_quality(scores, np.ones(4, bool), 0.5)["auroc"] is None


def test_baselines_have_their_own_depths():
    given_ = evidence(np.zeros((8, 3)), np.tile([True, False, True], (8, 1)))
    fixed = fixed_rows(given_, Streams(0)("f"))
    assert [row["mean_blocks"] for row in fixed] == [2, 4, 6]
    assert [row["agreement"] for row in fixed] == [1, 0, 1]
    hits = np.array([[0.0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 3, 3, 3, 4]])
    rows = pruning_rows(hits, np.array([4.0, 4.0]), 8, Streams(0)("p"))
    assert [row["mean_blocks"] for row in rows] == [2, 3, 4, 5, 6, 7]
    assert [row["agreement"] for row in rows] == [0, 0.25, 0.5, 0.625, 0.625, 0.625]


def test_no_scores_no_sweep():
    with pytest.raises(DataError, match="--test-tokens"):
        threshold_grid(np.zeros((0, 2)))
