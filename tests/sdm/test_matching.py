"""Counting against sorting and walking, with ties, duplicates and self-exclusion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdm.matching import Match, Support, match, match_reference
from workbench.errors import DataError

MANY = settings(max_examples=60, deadline=None)


def support(points, labels, predictions) -> Support:
    return Support(
        torch.tensor(points, dtype=torch.float64), torch.tensor(labels), torch.tensor(predictions)
    )


def same(a: Match, b: Match) -> None:
    assert a.similarity.tolist() == b.similarity.tolist()
    assert a.distance.tolist() == pytest.approx(b.distance.tolist(), rel=1e-12)


def test_the_prefix_ends_at_the_first_disagreement():
    known = support([[1.0], [2], [3], [4], [5]], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0])
    found = match(known, torch.tensor([[0.0], [0.0], [4.1]]).double(), torch.tensor([0, 1, 1]))
    assert found.similarity.tolist() == [3, 0, 1]
    assert found.distance.tolist() == pytest.approx([1.0, 1.0, 0.1])
    assert found.nearest.tolist() == [0, 0, 3]


def test_a_wrongly_predicted_neighbour_ends_the_prefix():
    known = support([[1.0], [2], [3]], [0, 1, 0], [0, 0, 0])
    found = match(known, torch.zeros(1, 1).double(), torch.tensor([0]))
    assert found.similarity.tolist() == [1]


def test_a_tie_with_a_disagreeing_point_does_not_count():
    known = support([[1.0], [-1.0], [3.0]], [0, 1, 0], [0, 1, 0])
    assert match(known, torch.zeros(1, 1).double(), torch.tensor([0])).similarity.tolist() == [0]


def test_all_agreeing_points_count_where_none_disagrees_and_the_cap_holds():
    known = support([[1.0], [2.0], [3.0]], [1, 1, 1], [1, 1, 1])
    query = torch.zeros(1, 1).double()
    assert match(known, query, torch.tensor([1])).similarity.tolist() == [3]
    assert match(known, query, torch.tensor([1]), max_similarity=2).similarity.tolist() == [2]


def test_self_exclusion_goes_by_position_so_a_duplicate_still_counts():
    known = support([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]], [0, 0, 1], [0, 0, 1])
    found = match(known, known.points, known.predictions, self_index=torch.arange(3))
    assert found.distance.tolist() == [0.0, 0.0, 5.0]
    assert found.nearest.tolist() == [1, 0, 0]
    assert found.similarity.tolist() == [1, 1, 0]


def test_duplicates_far_from_the_origin_are_at_distance_exactly_zero():
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(200, 64)) * 3 + 500)
    known = Support(points, torch.zeros(200).long(), torch.zeros(200).long())
    found = match(known, points, torch.zeros(200).long())
    assert found.distance.eq(0).all()
    assert found.nearest.tolist() == list(range(200))


# Coordinates on a coarse grid make ties and duplicates common.
GRID = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=2, max_size=14)


@MANY
@given(GRID, st.randoms(use_true_random=False), st.booleans(), st.integers(1, 5))
def test_counting_equals_walking(points, random, leave_out, block):
    n = len(points)
    labels = [random.randrange(3) for _ in range(n)]
    predictions = [random.choice((label, random.randrange(3))) for label in labels]
    known = support([[float(a), float(b)] for a, b in points], labels, predictions)
    queries, chosen = known.points, known.predictions
    own = torch.arange(n) if leave_out else None
    fast = match(known, queries, chosen, self_index=own, block=block)
    same(fast, match_reference(known, queries, chosen, self_index=own))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    points, queries = (
        torch.from_numpy(rng.normal(size=(40, 6))),
        torch.from_numpy(rng.normal(size=(15, 6))),
    )
    labels, predictions = (torch.from_numpy(rng.integers(0, 2, 40)) for _ in range(2))
    asked = torch.from_numpy(rng.integers(0, 2, 15))
    known = Support(points, labels, predictions)
    found = match(known, queries, asked)
    order = torch.from_numpy(rng.permutation(40))
    permuted = Support(points[order], labels[order], predictions[order])
    same(found, match(permuted, queries, asked))
    turn = torch.linalg.qr(torch.from_numpy(rng.normal(size=(6, 6)))).Q
    turned = match(Support(points @ turn + 3, labels, predictions), queries @ turn + 3, asked)
    assert found.similarity.tolist() == turned.similarity.tolist()
    back = match(known, queries.flip(0), asked.flip(0))
    assert found.similarity.tolist() == back.similarity.flip(0).tolist()
    agreeing = [int(((labels == predictions) & (predictions == y)).sum()) for y in asked.tolist()]
    assert all(q <= n for q, n in zip(found.similarity.tolist(), agreeing, strict=True))
    nearest = found.nearest
    bad = (labels != predictions)[nearest] | (predictions[nearest] != asked)
    assert found.similarity[bad].eq(0).all()
    assert found.similarity[~bad].gt(0).all()


def test_a_label_that_is_no_class_agrees_with_nothing():
    known = support([[1.0], [2.0]], [-99, 0], [0, 0])
    assert match(known, torch.zeros(1, 1).double(), torch.tensor([0])).similarity.tolist() == [0]


def test_no_queries_give_empty_answers():
    known = support([[1.0], [2.0]], [0, 0], [0, 0])
    found = match(known, torch.empty(0, 1).double(), torch.empty(0, dtype=torch.long))
    assert len(found.similarity) == len(found.distance) == len(found.nearest) == 0


def test_bad_input_is_named():
    with pytest.raises(DataError, match="at least 2"):
        support([[1.0]], [0], [0])
    with pytest.raises(DataError, match="coordinates"):
        match(support([[1.0], [2.0]], [0, 0], [0, 0]), torch.zeros(1, 2), torch.tensor([0]))
