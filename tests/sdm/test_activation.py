"""The activation against closed forms, its gradient, and its invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdm.activation import SOFTMAX_SIMILARITY, rescaled_similarity, sdm, sdm_loss

MANY = settings(max_examples=40, deadline=None)


def one(logits, q, d):
    values = (torch.tensor([v], dtype=torch.float64) for v in (q, d))
    return sdm(torch.tensor([logits], dtype=torch.float64), *values)[0]


@pytest.mark.parametrize(
    ("logits", "q", "d", "expected"),
    [
        ((2.0, -1.0), 0.0, 1.0, (0.888889, 0.111111)),
        ((2.0, -1.0), 8.0, 0.5, (0.969347, 0.030653)),
        ((1.0, 0.0, -1.0), 98.0, 0.25, (0.706101, 0.223289, 0.070610)),
        ((2.0, -1.0), SOFTMAX_SIMILARITY, 1.0, (0.952574, 0.047426)),
    ],
)
def test_closed_forms_of_the_activation(logits, q, d, expected):
    assert one(logits, q, d).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("q", "d", "label", "expected"),
    [(0.0, 1.0, 0, 0.169925), (0.0, 1.0, 1, 3.169925), (8.0, 0.5, 0, 0.013521),
     (8.0, 0.5, 1, 1.513521)],
)  # fmt: skip
def test_closed_forms_of_the_loss(q, d, label, expected):
    loss = sdm_loss(
        torch.tensor([[2.0, -1.0]]).double(), torch.tensor([label]), torch.tensor([q]).double(),
        torch.tensor([d]).double(),
    )  # fmt: skip
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("q", "p", "expected"), [(20.0, 0.5, 4.690416), (8.0, 0.969347, 8.0)])
def test_closed_forms_of_the_rescaled_similarity(q, p, expected):
    value = rescaled_similarity(torch.tensor([q]).double(), torch.tensor([p]).double())
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("margin", [3.0, 5.0, 40.0])
def test_a_confident_mistake_keeps_its_gradient(margin):
    logits = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = sdm_loss(logits, torch.tensor([1]), torch.tensor([1000.0]), torch.tensor([1.0]))
    loss.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([1.0, -1.0], abs=1e-3)


def test_gradient_agrees_with_finite_differences():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    q, d = torch.tensor([0.0, 1, 7, 300]).double(), torch.tensor([1.0, 0.3, 0.01, 0.9]).double()
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda z: sdm_loss(z, labels, q, d), (logits,))


LOGITS = st.lists(st.floats(-30, 30, allow_nan=False), min_size=2, max_size=5)


@MANY
@given(LOGITS, st.integers(0, 3000), st.floats(0, 1), st.floats(-20, 20))
def test_it_is_a_distribution_that_ignores_a_shift_of_the_logits(logits, q, d, shift):
    p = one(logits, q, d)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    moved = one([z + shift for z in logits], q, d)
    assert torch.allclose(p, moved, atol=1e-9)


@MANY
@given(LOGITS, st.integers(0, 3000))
def test_it_is_uniform_at_distance_quantile_zero(logits, q):
    assert one(logits, q, 0.0).tolist() == pytest.approx([1 / len(logits)] * len(logits))


@MANY
@given(LOGITS, st.integers(0, 2000), st.integers(1, 1000), st.floats(0.05, 1), st.floats(0.05, 1))
def test_the_top_class_gains_with_similarity_and_distance_quantile(logits, q, more, d, factor):
    top = int(torch.tensor(logits).argmax())
    p = float(one(logits, q, d)[top])
    assert float(one(logits, q + more, d)[top]) >= p - 1e-12
    assert float(one(logits, q, d * factor)[top]) <= p + 1e-12
    assert p == float(one(logits, q, d).max())


def test_softmax_similarity_makes_the_base_e():
    assert math.isclose(2 + SOFTMAX_SIMILARITY, math.e)
