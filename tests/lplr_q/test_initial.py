import pytest
import torch

from lplr_q.activation_aware.initial import odlri_start, outlier_channels, srr_split, tail_ratios
from lplr_q.activation_aware.prepared import prepare_hessian, rescaling, unrotated
from lplr_q.activation_aware.shaping import SIGMA_2, blind_hessian, covered_directions
from lplr_q.linalg.hadamard import random_signs, rotate_weight
from lplr_q.linalg.ldlq import weighted_loss
from lplr_q.linalg.regression import cholesky_whitening
from workbench.errors import ConfigError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(m=16, n=24):
    """Channels 3, 7 and 20 carry most of the energy."""
    g = generator()
    x = torch.randn(n, 100, generator=g, dtype=torch.float64)
    x[[3, 7, 20]] *= torch.tensor([9.0, 11.0, 10.0], dtype=torch.float64)[:, None]
    return torch.randn(m, n, generator=g), x @ x.T / 100


@pytest.mark.parametrize("rotated", [True, False])
def test_odlri_fits_the_outlier_channels(rotated):
    """With as many components as outliers, L R is W there and its projection elsewhere."""
    weight, hessian = problem()
    g = generator(1)
    prepared = prepare_hessian(hessian, 24, generator=g if rotated else None)
    outliers = weight[:, [3, 7, 20]]
    expected = outliers @ torch.linalg.pinv(outliers) @ weight
    torch.testing.assert_close(expected[:, [3, 7, 20]], outliers)
    target = weight
    if rotated:
        assert prepared.signs_in is not None
        signs = random_signs(16, g)
        target, expected = (rotate_weight(w, signs, prepared.signs_in) for w in (weight, expected))
    rows = outlier_channels(prepared, 3)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
    left, right = odlri_start(target, prepared, 3)
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-3)


def test_tail_ratios_by_hand():
    ratios = tail_ratios(torch.tensor([2.0, 1.0, 1.0]).double())
    torch.testing.assert_close(ratios.square(), torch.tensor([1.0, 1 / 3, 1 / 6, 0.0]).double())


def test_srr_preserves_what_the_weight_holds_in_few_components():
    g = generator()
    prepared = prepare_hessian(None, 40, generator=None)
    strong = torch.randn(40, 4, generator=g) @ torch.randn(4, 40, generator=g) * 10
    assert srr_split(strong + 0.01 * torch.randn(40, 40, generator=g), prepared, 8) >= 4
    flat = torch.linalg.qr(torch.randn(40, 40, generator=g)).Q
    assert srr_split(flat, prepared, 8) == 0  # nothing to preserve: all components repair


def test_blind_hessian_is_flat_where_the_factors_look():
    _, hessian = problem()
    prepared = prepare_hessian(hessian, 24, generator=None)
    whitening = cholesky_whitening(prepared.factor)
    right = torch.randn(5, 24, generator=generator(), dtype=torch.float64)
    directions = covered_directions(right, whitening)
    shaped = blind_hessian(prepared.matrix, whitening, directions)
    shift = torch.linalg.eigvalsh(shaped)[0]
    middle = shaped - shift * torch.eye(24)
    inverse = torch.linalg.inv(prepared.factor)
    expected = torch.eye(24).double() - directions @ directions.T
    torch.testing.assert_close(inverse @ middle @ inverse.T, expected, rtol=0, atol=1e-6)
    plain = shaped.diagonal().mean() - shift
    assert float(shift) == pytest.approx(SIGMA_2 * (1 + float(plain)), rel=1e-6)


@pytest.mark.parametrize("rotated", [True, False])
def test_rescaling_keeps_the_weighted_loss(rotated):
    weight, hessian = problem()
    weight[:, 5] = 0
    prepared = prepare_hessian(hessian, 24, generator=generator() if rotated else None)
    patterns, scaled, new = rescaling(weight, prepared)
    d = patterns.view(torch.bfloat16).double()
    torch.testing.assert_close(scaled.double(), weight.double() * d)
    before, after = unrotated(prepared), unrotated(new)
    torch.testing.assert_close(after * d * d[:, None], before, rtol=1e-9, atol=1e-9)
    assert weighted_loss(scaled.double(), after) == pytest.approx(
        weighted_loss(weight.double(), before), rel=1e-6
    )
    live = torch.arange(24) != 5
    norms = weight.square().sum(0).double()
    balance = (before.diagonal() / norms)[live] ** 0.25 / d[live]
    assert float(balance.max() / balance.min()) < 1.02


def test_prepared_forms_are_computed_once():
    _, hessian = problem()
    prepared = prepare_hessian(hessian, 24, generator=None)
    assert prepared.lower_for(8) is prepared.lower_for(8)
    assert prepared.single() is prepared.single()
    assert prepared.whitening().forward is prepared.whitening().forward
    assert torch.equal(unrotated(prepared), prepared.matrix)


def test_strict_rotation_needs_a_hadamard_matrix():
    prepare_hessian(None, 24, generator=generator(), strict=True)
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 31"):
        prepare_hessian(None, 31, generator=generator(), strict=True)
