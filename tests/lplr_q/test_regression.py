from itertools import pairwise

import pytest
import torch

from lplr_q.activation_aware.factors import (
    FactorRounding,
    LowRank,
    ascending_levels,
    decode_factor,
    factor_layout,
    fit_left,
    fit_low_rank,
    fit_right,
    quantise_factor,
    quantise_left,
)
from lplr_q.activation_aware.refine import refinable, sweep_left, sweep_right
from lplr_q.codebooks.base import make_codebook
from lplr_q.codebooks.scalar import lloyd_max_levels
from lplr_q.linalg.ldl import block_ldl, cholesky
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, weighted_loss
from lplr_q.linalg.regression import (
    cholesky_whitening,
    eigen_whitening,
    rank_constrained_regression,
)
from lplr_q.linalg.scalar_ldlq import scalar_ldlq
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


@pytest.mark.parametrize("eigenvalue", [0.0, -1e-9])
def test_a_hessian_that_is_not_quite_positive_gives_finite_factors(eigenvalue):
    """Directions without energy, or with a negative eigenvalue left by rounding."""
    target, _ = problem()
    basis = torch.linalg.qr(
        torch.randn(10, 10, generator=torch.Generator().manual_seed(4)).double()
    )
    values = torch.tensor([4.0, 3.0, 2.0, 1.0] + [eigenvalue] * 6, dtype=torch.float64)
    hessian = basis.Q @ torch.diag(values) @ basis.Q.T
    left, right, found = rank_constrained_regression(target, eigen_whitening(hessian), 3)
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
    loss = weighted_loss(target - left @ right, hessian)
    assert loss == pytest.approx(float(found[3:].square().sum()), rel=1e-5)


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


@pytest.mark.parametrize("seed", range(6))
def test_more_inner_iterations_never_hurt(seed):
    """P6. Rounded least squares go up and down; what is returned is the best pair met."""
    target, hessian = problem(40, 32, seed)
    whitening = cholesky_whitening(cholesky(hessian))
    losses = [
        fit_low_rank(
            target, hessian, whitening, rank=4, rounding=FactorRounding(2), inner_iterations=i
        ).loss
        for i in range(1, 9)
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


@pytest.mark.parametrize("codebook", ["lloyd-max", "uniform"])
def test_feedback_lowers_the_weighted_error_of_a_rounded_factor(codebook):
    target, hessian = problem(8, 48)
    generator = torch.Generator().manual_seed(3)
    mixing = torch.linalg.qr(torch.randn(48, 48, generator=generator).double()).Q
    factor, hessian = target.float(), mixing @ hessian @ mixing.T
    lower = block_ldl(hessian, 1).lower
    plain = quantise_factor(factor, 3, codebook).decode() - factor
    aware = quantise_factor(factor, 3, codebook, lower=lower).decode() - factor
    assert weighted_loss(aware.double(), hessian) < 0.9 * weighted_loss(plain.double(), hessian)
    left = factor.T.contiguous()  # L is rounded under R H R^T, across components
    normal = hessian[:8, :8]
    errors = [
        (quantise_left(left, 3, codebook, n).decode() - factor).T.double() for n in (None, normal)
    ]
    assert weighted_loss(errors[1], normal) <= weighted_loss(errors[0], normal)


@pytest.mark.parametrize(("r", "n", "buffer"), [(3, 40, 128), (5, 70, 16), (1, 5, 1)])
def test_scalar_rounding_is_the_general_one(r, n, buffer):
    _, hessian = problem(4, n)
    factor = torch.randn(r, n, generator=torch.Generator().manual_seed(2)).double()
    lower, book = block_ldl(hessian, 1).lower, make_codebook("lloyd-max", 3)
    levels = ascending_levels(book)
    assert levels is not None
    general, _ = ldlq(factor, lower, CodebookBlocks(book, n))
    assert torch.equal(scalar_ldlq(factor, lower, levels, buffer=buffer), torch.cat(general, 1))
    assert ascending_levels(make_codebook("e8p", 2)) is None


@pytest.mark.parametrize("codebook", ["e8p", "tcq-8"])
def test_factors_of_vector_codebooks_decode_from_their_codes(codebook):
    factor = torch.randn(6, 45, generator=torch.Generator().manual_seed(0)) * 3
    rounded = quantise_factor(factor, 4, codebook)
    slots, scales = factor_layout(6, 45, bits=4, codebook=codebook)
    assert rounded.codes.shape == (6, slots)
    assert rounded.scales.shape == (scales,) == (1,)
    error = (rounded.decode() - factor).square().mean() / factor.square().mean()
    assert float(error) < 0.02


def test_sweeps_over_the_factors_never_raise_the_loss():
    target, hessian = problem(30, 24)
    target, hessian = target.float(), hessian.float()
    low = fit_low_rank(
        target,
        hessian,
        cholesky_whitening(cholesky(hessian).float()),
        rank=4,
        rounding=FactorRounding(2),
        inner_iterations=1,
    )
    losses = [weighted_loss(target - low.product(), hessian)]
    for sweep in (sweep_left, sweep_right, sweep_left, sweep_right):
        low = sweep(target, hessian, low)
        losses.append(weighted_loss(target - low.product(), hessian))
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(losses))
    assert losses[-1] < losses[0]
    assert refinable(low)


def test_sweep_of_the_right_factor_by_hand():
    """One component, H = I: every entry of R goes to the level nearest to its least squares."""
    target = torch.tensor([[1.0, -3.0, 0.2], [2.0, -6.0, 0.4]])
    left = quantise_factor(torch.tensor([[1.0, 2.0]]), 8)
    start = quantise_factor(torch.tensor([[1.0, 1.0, 1.0]]), 3)
    low = sweep_right(target, torch.eye(3), LowRank(left, start, 0.0))
    column = left.decode()[0]
    best = (column @ target) / column.square().sum()
    levels = lloyd_max_levels(3).float() * float(start.scales.view(torch.bfloat16))
    nearest = levels[(best[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(low.right.decode()[0], nearest)


def test_unknown_factor_bits():
    with pytest.raises(ConfigError, match="factors cannot have 50 bits"):
        quantise_factor(torch.ones(1, 4), 50)
