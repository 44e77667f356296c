import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.ldl import block_bounds, block_ldl, cholesky, cholesky_
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, weighted_loss
from workbench.errors import DataError


def correlated(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n + 3, dtype=torch.float64, generator=generator)
    x = x * torch.linspace(2, 0.2, n, dtype=torch.float64)[:, None]
    mixing = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    return mixing @ x @ x.T @ mixing.T / n + 0.01 * torch.eye(n, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), block=st.integers(1, 17), seed=st.integers(0, 10**6))
def test_product_of_the_factors_is_the_hessian(n, block, seed):
    hessian = correlated(n, seed)
    ldl = block_ldl(hessian, block)
    middle = torch.block_diag(*ldl.diagonal)
    rebuilt = ldl.lower @ middle @ ldl.lower.T
    torch.testing.assert_close(rebuilt, hessian, rtol=0, atol=1e-10)
    for low, high in block_bounds(n, block):
        corner = ldl.lower[low:high, low:high]
        torch.testing.assert_close(corner, torch.eye(high - low).double(), rtol=0, atol=1e-10)
        assert not bool(ldl.lower[low:high, high:].any())


def test_identity_has_identity_factors():
    ldl = block_ldl(torch.eye(11), 4)
    assert torch.equal(ldl.lower, torch.eye(11).double())
    assert all(torch.equal(d, torch.eye(len(d)).double()) for d in ldl.diagonal)


def test_feedback_is_seldom_worse_than_nearest_rounding():
    """95 % of random correlated Hessians at least; the sum over all is far below."""
    book, better, losses = make_codebook("lloyd-max", 2), 0, torch.zeros(2)
    for seed in range(40):
        hessian = correlated(24, seed)
        weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed)).double()
        blocks = CodebookBlocks(book, 24)
        aware = ldlq(weight, block_ldl(hessian, 1).lower, blocks)[1]
        plain = ldlq(weight, torch.eye(24).double(), blocks)[1]
        pair = [weighted_loss(weight - q, hessian) for q in (aware, plain)]
        better += pair[0] <= pair[1]
        losses += torch.tensor(pair)
    assert better >= 38
    assert float(losses[0]) < 0.8 * float(losses[1])


def test_single_precision_first_and_double_where_it_fails():
    hessian = correlated(12)
    easy = cholesky(hessian, single=True)
    assert easy.dtype == torch.float32
    torch.testing.assert_close(easy.double(), cholesky(hessian), rtol=1e-5, atol=1e-5)
    hard = torch.ones(6, 6, dtype=torch.float64) + 1e-12 * torch.eye(6, dtype=torch.float64)
    factor = cholesky(hard, single=True)  # singular in float32
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.T, hard, rtol=0, atol=1e-12)


def test_indefinite_matrix_is_refused_with_advice():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    with pytest.raises(DataError, match=r"smallest eigenvalue -0.5; raise sigma_reg"):
        cholesky(matrix, single=True)
    with pytest.raises(DataError, match=r"smallest eigenvalue -0.5; raise sigma_reg"):
        cholesky_(matrix.double(), lambda: matrix)
