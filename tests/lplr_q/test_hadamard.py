import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.linalg.hadamard import (
    dense_hadamard,
    hadamard_plan,
    hadamard_transform,
    paley_matrix,
    random_signs,
    rotate_hessian,
    rotate_rows,
    rotate_weight,
    unrotate_rows,
    unrotate_weight,
)
from workbench.errors import ConfigError

HADAMARD_WIDTHS = [2, 12, 20, 28, 36, 44, 52, 60, 76, 84, 100, 108, 140, 148, 180, 284, 344, 420]
HADAMARD_WIDTHS += [464, 924]


@pytest.mark.parametrize("n", HADAMARD_WIDTHS)
def test_entries_and_orthogonality(n):
    theta = dense_hadamard(n)
    assert hadamard_plan(n).is_hadamard
    torch.testing.assert_close(theta @ theta.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(theta.abs(), torch.full_like(theta, n**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 5, 7, 9, 10, 13, 31, 172, 188])
def test_fallback_is_orthogonal_and_flat(n):
    theta = dense_hadamard(n)
    torch.testing.assert_close(theta @ theta.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    assert theta.abs().max() <= math.sqrt(2 / n) + 1e-12 or n == 1


@pytest.mark.parametrize(
    ("n", "kind", "order"),
    [
        (64, "sylvester", 1),
        (320, "paley", 20),
        (344, "paley", 344),  # needs the field of 7^3 elements
        (5760, "paley", 180),
        (4864, "paley", 76),
        (5632, "paley", 44),
        (9728, "paley", 76),
        (18944, "paley", 148),
        (11008, "paley", 344),
        (29568, "paley", 924),
        (13696, "hartley", 13696),
        (27392, "hartley", 27392),
    ],
)
def test_construction_of_common_model_widths(n, kind, order):
    plan = hadamard_plan(n)
    assert (plan.kind, plan.order) == (kind, order)
    assert plan.butterfly * plan.order == n


@pytest.mark.parametrize("n", [8, 12, 40, 172, 160, 344])
def test_fast_equals_dense_and_inverse_undoes_it(n):
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    y = hadamard_transform(x)
    torch.testing.assert_close(y, x @ dense_hadamard(n).T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x, rtol=0, atol=1e-12)
    assert torch.equal(x, kept)


def test_butterflies_are_the_kronecker_product_written_out():
    small = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    expected = torch.kron(small, torch.kron(small, paley_matrix(12).double())) / math.sqrt(48)
    torch.testing.assert_close(dense_hadamard(48), expected, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_rotation_keeps_the_weighted_loss(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    x = torch.randn(n, n + 2, dtype=torch.float64, generator=generator)
    hessian = x @ x.T
    signs_out, signs_in = random_signs(m, generator), random_signs(n, generator)
    rotated = rotate_weight(weight, signs_out, signs_in)
    turned = rotate_hessian(hessian, signs_in)
    before = torch.trace(weight @ hessian @ weight.T)
    torch.testing.assert_close(torch.trace(rotated @ turned @ rotated.T), before)
    torch.testing.assert_close(unrotate_weight(rotated, signs_out, signs_in), weight)
    rows = unrotate_rows(rotate_rows(weight, signs_in), signs_in)
    torch.testing.assert_close(rows, weight)


def test_half_precision_keeps_its_type_and_gradients_flow():
    x = torch.randn(3, 12, dtype=torch.bfloat16, requires_grad=True)
    y = hadamard_transform(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_outliers_are_spread():
    x = torch.zeros(128)
    x[3] = 1.0
    assert float(hadamard_transform(x).abs().max()) == pytest.approx(128**-0.5, rel=1e-5)


def test_impossible_orders_are_refused():
    with pytest.raises(ConfigError, match="92"):
        paley_matrix(92)  # a Hadamard matrix exists, but not by Paley
    with pytest.raises(ConfigError, match="at least 1"):
        hadamard_plan(0)
