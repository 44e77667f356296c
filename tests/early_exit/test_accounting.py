"""Hand-computed totals, the published formula, and the bounds of the two published backbones."""

from __future__ import annotations

import math

import pytest

from early_exit.accounting import Tally, block_bound, dynamax_speedup
from early_exit.adapters.base import Costs
from workbench.errors import ConfigError


def test_the_published_formula_and_what_it_hides():
    assert dynamax_speedup([15] * 10, 10, 32, "attention") == pytest.approx(2.13333, abs=1e-5)
    assert block_bound(32, 15, "last_block") == pytest.approx(1.88235, abs=1e-5)
    assert dynamax_speedup([31] * 7, 7, 64, "mamba") == 2.0
    assert dynamax_speedup([31] * 7, 7, 64, "mamba", recompute=True) == pytest.approx(
        64 / (64 - 32 + 9 / 26 * 33)
    )
    assert dynamax_speedup([15] * 5, 10, 32, "attention") == pytest.approx(320 / (320 - 85))
    assert dynamax_speedup([0] * 3, 3, 4, "attention") == math.inf  # all four blocks credited
    assert dynamax_speedup([], 3, 4, "attention") == 1.0


@pytest.mark.parametrize(
    ("layers", "layer", "emission", "share", "expected"),
    [
        (32, 15, "last_block", 0.0, 32 / 17),
        (32, 15, "lens", 0.0, 2.0),
        (32, 15, "last_block", 1 / 26, 1.8206),
        (64, 31, "last_block", 0.0, 1.9394),
        (64, 31, "last_block", 0.3877886, 1.4217),
    ],
)
def test_bounds_when_every_token_leaves_at_the_first_exit(layers, layer, emission, share, expected):
    assert block_bound(layers, layer, emission, share) == pytest.approx(expected, abs=2e-4)


def test_a_hand_computed_tally():
    costs = Costs(layers=4, block=100, fill=10, vocabulary=50, gate=2, context=1.0, mixer=5.0)
    tally = Tally(
        tokens=2,
        latency_blocks=6,
        blocks=6,
        context=30,
        fills=2,
        gates=3,
        vocabularies=2,
        translations=1,
        full_context=11,
    )
    executed = 6 * 105 + 30 + 2 * 10 + 3 * 2 + 2 * 50 + 7**2
    full = 2 * (4 * 105 + 50) + 4 * 11
    assert tally.arithmetic(costs, 7) == executed
    assert tally.speedups(costs, 7) == {
        "mean_blocks": 3.0,
        "speedup_blocks": pytest.approx(8 / 6),
        "speedup_work": pytest.approx(8 / 6),
        "speedup_arithmetic": pytest.approx(full / executed),
    }
    assert (tally + tally).fills == 4
    assert costs.kappa == 0.1
    assert costs.block_at(8) == 113


def test_nothing_decoded_is_no_speed_up():
    costs = Costs(4, 100, 10, 50, 2, 1.0, 0.0)
    with pytest.raises(ConfigError, match="no token was decoded"):
        Tally().speedups(costs, 8)
    with pytest.raises(ConfigError, match="no token was decoded"):
        dynamax_speedup([], 0, 4, "mamba")
    with pytest.raises(ConfigError, match="attention and mamba"):
        dynamax_speedup([1], 1, 4, "rwkv")
