"""Region search against trying everything, exact ranks, bands, reasons, distance quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdm.calibrate import (
    REASONS,
    Region,
    admit,
    dkw_epsilon,
    region_search,
    region_search_reference,
    tail_rank,
)
from sdm.cdf import distance_quantile, per_class_sorted


@pytest.mark.parametrize(
    ("alpha", "n", "rank"), [(0.9, 10, 1), (0.8, 5, 1), (0.95, 20, 1), (0.94, 50, 3), (0.95, 19, 0)]
)
def test_ranks_are_exact(alpha, n, rank):
    assert tail_rank(alpha, n) == rank


def test_the_float_trap_is_real():
    assert math.floor((1 - 0.9) * 10) == 0  # what tail_rank avoids


@pytest.mark.parametrize(("n", "epsilon"), [(100, 0.135810), (1000, 0.042947), (0, 1.0)])
def test_width_of_the_band(n, epsilon):
    assert float(dkw_epsilon(torch.tensor([n]), 0.95)) == pytest.approx(epsilon, abs=1e-6)


POINTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]),
        st.sampled_from([0.1, 0.5, 0.69, 0.7, 0.85, 0.9, 0.95, 1.0]),
        st.integers(0, 2),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(POINTS, st.sampled_from([0.5, 0.7, 0.8, 0.9, 0.95]), st.sampled_from([2, 3]))
def test_the_sweep_equals_trying_every_threshold(points, alpha, n_classes):
    points = [(r, p, min(y, n_classes - 1)) for r, p, y in points]
    rho, p, y = (
        torch.tensor([row[i] for row in points], dtype=dtype)
        for i, dtype in enumerate((torch.float64, torch.float64, torch.long))
    )
    fast = region_search(rho, p, y, n_classes=n_classes, target_accuracy=alpha)
    slow = region_search_reference(rho, p, y, n_classes=n_classes, target_accuracy=alpha)
    assert (fast.minimum, fast.thresholds, fast.kept) == (slow.minimum, slow.thresholds, slow.kept)
    assert fast.exists or fast.message


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_the_sweep_equals_trying_every_threshold_on_random_numbers(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 120))
    rho = torch.from_numpy(rng.gamma(2.0, 3.0, n))
    p = torch.from_numpy(rng.beta(4, 1, n))
    y = torch.from_numpy(rng.integers(0, 2, n))
    fast = region_search(rho, p, y, n_classes=2, target_accuracy=0.7)
    slow = region_search_reference(rho, p, y, n_classes=2, target_accuracy=0.7)
    assert (fast.minimum, fast.thresholds) == (slow.minimum, slow.thresholds)


def test_the_message_names_the_class_and_a_target_that_would_do():
    rho = torch.full((40,), 5.0).double()
    y = torch.tensor([0] * 20 + [1] * 20)
    p = torch.tensor([0.99] * 20 + [0.8] * 20).double()
    region = region_search(rho, p, y, n_classes=2, target_accuracy=0.95)
    assert not region.exists
    assert "class 1 blocks" in region.message
    assert "0.800" in region.message
    assert region_search(rho, p, y, n_classes=2, target_accuracy=0.8).exists


def test_an_empty_class_and_no_candidate_are_told():
    p, y = torch.ones(3).double(), torch.zeros(3).long()
    one = region_search(torch.full((3,), 2.0).double(), p, y, n_classes=2, target_accuracy=0.9)
    assert "class 1 has no calibration point" in one.message
    none = region_search(torch.zeros(3).double(), p, y, n_classes=1, target_accuracy=0.9)
    assert "every calibration point is out of distribution" in none.message


def test_the_conformal_rank_is_the_stricter_one():
    rng = np.random.default_rng(1)
    rho = torch.from_numpy(rng.integers(1, 6, 400).astype(float))
    p = torch.from_numpy(np.clip(rng.beta(3, 1, 400) + 0.1 * (rho.numpy() > 3), 0, 1))
    y = torch.from_numpy(rng.integers(0, 2, 400))
    plain = region_search(rho, p, y, n_classes=2, target_accuracy=0.6)
    strict = region_search(rho, p, y, n_classes=2, target_accuracy=0.6, finite_sample=True)
    assert plain.exists
    assert strict.minimum >= plain.minimum
    # ⌊0.1 · (9 + 1)⌋ = 1, the first order statistic; with 8 points there is none
    for n, there in ((9, True), (8, False)):
        ones = torch.ones(n).double()
        zero = torch.zeros(n).long()
        found = region_search(
            ones, ones, zero, n_classes=1, target_accuracy=0.9, finite_sample=True
        )
        assert found.exists is there


def test_each_reason_is_given_for_its_cause():
    region = Region(0.9, 4.0, (0.8, 0.7))
    cases = {
        "q0": (0, 0.5, 0.0, (0.9, 0.1), 0),
        "d0": (9, 0.0, 3.0, (0.5, 0.5), 0),
        "flip": (9, 0.5, 5.0, (0.4, 0.6), 0),
        "below_qmin": (9, 0.5, 3.9, (0.9, 0.1), 0),
        "below_psi": (9, 0.5, 5.0, (0.75, 0.25), 0),
        "admitted": (9, 0.5, 4.0, (0.8, 0.2), 0),
    }
    for reason, (q, d, rescaled, p, predicted) in cases.items():
        code = admit(
            torch.tensor([float(q)]), torch.tensor([d]), torch.tensor([rescaled]),
            torch.tensor([p]).double(), torch.tensor([predicted]), region,
        )  # fmt: skip
        assert REASONS[int(code)] == reason
    loose = Region(0.9, 4.0, (0.3, 0.3))
    both = (torch.tensor([9.0]), torch.tensor([0.5]), torch.tensor([5.0]))
    code = admit(*both, torch.tensor([[0.6, 0.4]]).double(), torch.tensor([0]), loose)
    assert REASONS[int(code)] == "not_singleton"
    nothing = Region(0.9, math.inf, ())
    code = admit(*both, torch.tensor([[0.6, 0.4]]).double(), torch.tensor([0]), nothing)
    assert REASONS[int(code)] == "no_region"


def test_distance_quantile_takes_the_worst_class_and_saturates():
    values = torch.tensor([1.0, 2, 3, 4, 2, 4]).double()
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    arrays = per_class_sorted(values, labels, 2)
    asked = torch.tensor([0.0, 2.0, 2.5, 9.0]).double()
    assert distance_quantile(asked, arrays).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.0])
    kept = per_class_sorted(values, labels, 2, keep=labels == 0)
    assert distance_quantile(asked, kept).tolist() == [0.0] * 4  # an empty class


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=20), st.lists(st.floats(0, 12), min_size=2))
def test_the_quantile_never_grows_with_distance(known, asked):
    labels = torch.tensor([i % 2 for i in range(len(known))])
    arrays = per_class_sorted(torch.tensor(known).double(), labels, 2)
    d = distance_quantile(torch.tensor(sorted(asked)).double(), arrays)
    assert bool((d[1:] <= d[:-1]).all())
    assert bool(((d >= 0) & (d <= 1)).all())
