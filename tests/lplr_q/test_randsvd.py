import pytest
import torch

from lplr_q.linalg.randsvd import RandomisedSVD, default_oversampling
from lplr_q.linalg.regression import cholesky_whitening, closed_form


def decaying(m, n, power, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator)).Q
    values = (1 + torch.arange(min(m, n))) ** -power
    return (u * values) @ v.T, values


@pytest.mark.parametrize(("m", "n", "rank"), [(160, 200, 8), (200, 160, 16)])
@pytest.mark.parametrize("power", [0.3, 0.6, 1.5])
def test_loss_is_within_a_thousandth_of_the_optimum(m, n, rank, power):
    matrix, values = decaying(m, n, power)
    svd = RandomisedSVD()
    for _ in range(3):
        u, s, zt = svd(matrix, rank)
        loss = float((matrix - (u * s) @ zt).double().square().sum())
        optimum = float(values[rank:].double().square().sum())
        assert optimum * (1 - 1e-4) < loss < optimum * (1 + 1e-3)
        torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-4)
        torch.testing.assert_close(zt @ zt.T, torch.eye(rank), rtol=0, atol=1e-4)


def test_a_warm_start_needs_fewer_iterations():
    matrix, _ = decaying(160, 160, 0.6)
    svd = RandomisedSVD()
    svd(matrix, 8)
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    svd(matrix + 1e-3 * noise, 8)
    cold, warm = (entry.split() for entry in svd.log)
    assert (cold[0], warm[0]) == ("cold", "warm")
    assert int(warm[1]) < int(cold[1])


def test_same_call_same_result():
    matrix, _ = decaying(120, 120, 0.5)
    first, second = RandomisedSVD()(matrix, 4), RandomisedSVD()(matrix, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wide_subspaces_and_slow_convergence_take_the_exact_decomposition():
    svd = RandomisedSVD()
    matrix, values = decaying(40, 40, 0.5)
    assert not svd.worth(40, 40, 8)
    u, s, zt = svd(matrix, 8)
    assert svd.log == ["exact"]
    torch.testing.assert_close(s, values[:8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u.T @ matrix @ zt.T, torch.diag(s), rtol=0, atol=1e-5)
    hurried = RandomisedSVD(limit=1)
    hurried(decaying(120, 120, 0.01)[0], 2)
    assert hurried.log == ["exact"]


def test_oversampling_and_the_energy_of_the_closed_form():
    assert [default_oversampling(r) for r in (1, 64, 256)] == [16, 16, 64]
    matrix, values = decaying(30, 30, 0.5)
    left, right, energy = closed_form(matrix, cholesky_whitening(torch.eye(30)), 5)
    assert energy == pytest.approx(float(values.square().sum()), rel=1e-5)
    tail = float(values[5:].square().sum())
    assert float((matrix - left @ right).square().sum()) == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize(("m", "n", "rank"), [(320, 400, 16), (400, 320, 8)])
def test_nearly_flat_spectra_settle_in_the_krylov_space(m, n, rank):
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(2))
    svd = RandomisedSVD(limit=2)
    u, s, zt = svd(matrix, rank)
    assert svd.log[0].startswith("krylov")
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(s, values[:rank], rtol=2e-3, atol=0)
    loss = float((matrix - (u * s) @ zt).double().square().sum())
    optimum = float(values[rank:].double().square().sum())
    assert optimum * (1 - 1e-4) < loss < optimum * (1 + 1e-3)
    torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-4)
    torch.testing.assert_close(zt @ zt.T, torch.eye(rank), rtol=0, atol=1e-4)
    svd(matrix, rank)  # its subspace serves the next call
    assert svd.log[1].startswith("warm")
    # the subspace iteration it stands in for would not have been done
    _, s, _ = RandomisedSVD(limit=2, tolerance=1.0)(matrix, rank)
    assert not torch.allclose(s, values[:rank], rtol=2e-3, atol=0)
