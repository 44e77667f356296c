import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.linalg import hadamard
from lplr_q.linalg.hadamard import (
    dense_hadamard,
    hadamard_plan,
    hadamard_transform,
    paley_matrix,
    radices,
    random_signs,
    require_hadamard,
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


@pytest.mark.parametrize("width", [1, 2, 8, 32, 64, 1024, 2048, 4096])
def test_stages_multiply_to_the_width(width):
    found = radices(width)
    assert math.prod(found) == width
    assert all(r <= 32 for r in found)


@pytest.mark.parametrize("n", [64, 96, 1024, 12 * 256])
def test_stages_are_the_butterflies(n):
    plan = hadamard_plan(n)
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x.view(3, plan.butterfly, plan.order)
    if plan.order > 1:
        y = y @ paley_matrix(plan.order).double().T
    expected = hadamard._butterflies(y, plan.butterfly).reshape(3, n) / math.sqrt(n)
    torch.testing.assert_close(hadamard_transform(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [20, 64, 344, 31])
def test_rows_in_groups_and_given_memory(n, monkeypatch):
    x = torch.randn(2, 7, n, generator=torch.Generator().manual_seed(0))
    whole = hadamard_transform(x)
    monkeypatch.setattr(hadamard, "CHUNK", 4 * n)
    torch.testing.assert_close(hadamard_transform(x), whole, rtol=0, atol=1e-5)
    out = torch.empty_like(x)
    assert hadamard_transform(x, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
    half = torch.empty(2, 7, n, dtype=torch.bfloat16)
    torch.testing.assert_close(
        hadamard_transform(x.bfloat16(), out=half).float(), whole, atol=0.05, rtol=0
    )
    strided = torch.randn(n, 9, generator=torch.Generator().manual_seed(1)).T
    torch.testing.assert_close(
        hadamard_transform(strided), hadamard_transform(strided.contiguous()), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("n", [64, 48])
def test_gradient_is_the_transpose(n):
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, n, dtype=torch.float64)
    (found,) = torch.autograd.grad(hadamard_transform(x), x, g)
    torch.testing.assert_close(found, g @ dense_hadamard(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [64, 48])
def test_fused_kernel_takes_the_power_of_two_part(n):
    """A stand-in with the interface of fast_hadamard_transform: x, scale -> H x * scale."""
    calls = []

    def kernel(x, scale):
        calls.append(x.shape)
        width = x.shape[-1]
        assert x.is_contiguous()
        return x @ hadamard._butterflies(torch.eye(width)[..., None], width)[..., 0] * scale

    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
    plan = hadamard_plan(n)
    for inverse in (False, True):
        found = hadamard._fused_stages(x, plan, kernel, inverse=inverse)
        torch.testing.assert_close(found, hadamard_transform(x, inverse=inverse))
    assert calls == [(5, n) if plan.order == 1 else (5, plan.order, plan.butterfly)] * 2


def test_one_graph_under_compile():
    """Both constructions, twice in one graph, with a gradient."""

    def there_and_back(x):
        wide = torch.cat([hadamard_transform(x), x[..., :16]], dim=-1)
        return hadamard_transform(hadamard_transform(wide), inverse=True)[..., :48]

    x = torch.randn(3, 48, requires_grad=True)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), there_and_back(x)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_strict_widths():
    require_hadamard(320)
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 13696"):
        require_hadamard(13696)


@pytest.mark.parametrize("order", [172, 344, 688])
def test_multiples_of_172(order):
    """172 itself has no Paley matrix (it is kept as a fallback); its doubles do."""
    x = torch.randn(2, order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    back = hadamard_transform(hadamard_transform(x), inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    assert hadamard_plan(order).is_hadamard == (order != 172)


def test_impossible_orders_are_refused():
    with pytest.raises(ConfigError, match="92"):
        paley_matrix(92)  # a Hadamard matrix exists, but not by Paley
    with pytest.raises(ConfigError, match="at least 1"):
        hadamard_plan(0)
