import pytest
import torch

from lplr_q.activation_aware.factors import (
    FactorRounding,
    decode_factor,
    fit_left,
    fit_low_rank,
    fit_right,
    quantise_factor,
)
from lplr_q.linalg.ldl import cholesky
from lplr_q.linalg.ldlq import weighted_loss
from lplr_q.linalg.regression import (
    cholesky_whitening,
    eigen_whitening,
    rank_constrained_regression,
)
from workbench.errors import ConfigError


def problem(m=12, n=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 40, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(3, 0.1, n, dtype=torch.float64)[:, None]
    return target, x @ x.T / 40 + 0.01 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_loss_left_is_the_singular_tail(rank):
    target, hessian = problem()
    left, right, values = rank_constrained_regression(
        target, cholesky_whitening(cholesky(hessian)), rank
    )
    loss = weighted_loss(target - left @ right, hessian)
    assert loss == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)


def test_whitenings_agree_and_plain_svd_is_the_identity_case():
    target, hessian = problem()
    by_cholesky = rank_constrained_regression(target, cholesky_whitening(cholesky(hessian)), 4)
    by_eigen = rank_constrained_regression(target, eigen_whitening(hessian), 4)
    torch.testing.assert_close(by_cholesky[0] @ by_cholesky[1], by_eigen[0] @ by_eigen[1])
    eye = torch.eye(10, dtype=torch.float64)
    plain = rank_constrained_regression(target, cholesky_whitening(eye), 4)
    u, s, vt = torch.linalg.svd(target, full_matrices=False)
    torch.testing.assert_close(plain[0] @ plain[1], (u[:, :4] * s[:4]) @ vt[:4])


def test_never_worse_than_plain_svd():
    for seed in range(20):
        target, hessian = problem(seed=seed)
        left, right, _ = rank_constrained_regression(
            target, cholesky_whitening(cholesky(hessian)), 3
        )
        u, s, vt = torch.linalg.svd(target, full_matrices=False)
        plain = (u[:, :3] * s[:3]) @ vt[:3]
        ours = weighted_loss(target - left @ right, hessian)
        assert ours < weighted_loss(target - plain, hessian)


def test_full_rank_leaves_nothing():
    target, hessian = problem()
    left, right, _ = rank_constrained_regression(target, eigen_whitening(hessian), 10)
    torch.testing.assert_close(left @ right, target, rtol=0, atol=1e-9)


def test_factors_are_balanced():
    target, hessian = problem()
    whitening = cholesky_whitening(cholesky(hessian))
    left, right, values = rank_constrained_regression(target, whitening, 3)
    torch.testing.assert_close(left.norm(dim=0), values[:3].sqrt())
    torch.testing.assert_close((right @ whitening.forward).norm(dim=1), values[:3].sqrt())


def test_least_squares_steps_are_optimal():
    """Neither step can be improved by any small change of the factor it fits."""
    target, hessian = problem()
    generator = torch.Generator().manual_seed(1)
    right = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    left = fit_left(target, hessian, right)
    gradient = (target - left @ right) @ hessian @ right.T
    assert float(gradient.abs().max()) < 1e-4
    fitted = fit_right(target, left)
    gradient = left.T @ (target - left @ fitted)
    assert float(gradient.abs().max()) < 1e-4


def test_singular_normal_matrix_gives_finite_factors():
    target, hessian = problem()
    right = torch.zeros(3, 10, dtype=torch.float64)
    right[0] = 1.0
    assert bool(torch.isfinite(fit_left(target, hessian, right)).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_factor_rounding_uses_the_stored_scale(bits):
    factor = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)) * 10
    rounded = quantise_factor(factor, bits)
    decoded = decode_factor(rounded.codes, rounded.scales, bits)
    assert torch.equal(decoded, rounded.decode())
    assert rounded.scales.dtype == torch.int16
    assert int(rounded.codes.max()) < 2**bits
    again = quantise_factor(factor, bits)
    assert torch.equal(again.codes, rounded.codes)
    error = (decoded - factor).square().mean() / factor.square().mean()
    assert float(error) == pytest.approx(
        {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0095, 8: 4.1e-5}[bits], rel=0.08
    )


def test_sixteen_bits_are_bfloat16():
    factor = torch.randn(3, 7)
    assert torch.equal(quantise_factor(factor, 16).decode(), factor.bfloat16().float())


def test_more_inner_iterations_never_hurt():
    target, hessian = problem(40, 32)
    whitening = cholesky_whitening(cholesky(hessian))
    losses = [
        fit_low_rank(
            target, hessian, whitening, rank=4, rounding=FactorRounding(2), inner_iterations=i
        ).loss
        for i in (1, 2, 5, 10)
    ]
    assert losses == sorted(losses, reverse=True)


def test_sixteen_bit_factors_reach_the_closed_form():
    target, hessian = problem(40, 32)
    whitening = cholesky_whitening(cholesky(hessian))
    tail = rank_constrained_regression(target, whitening, 4)[2][4:].square().sum()
    result = fit_low_rank(target, hessian, whitening, rank=4, rounding=FactorRounding(16))
    assert result.loss == pytest.approx(float(tail), rel=2e-3)
    product = result.product().double()
    assert result.loss == pytest.approx(weighted_loss(target - product, hessian), rel=1e-5)


def test_unknown_factor_bits():
    with pytest.raises(ConfigError, match="factors cannot have 50 bits"):
        quantise_factor(torch.ones(1, 4), 50)
