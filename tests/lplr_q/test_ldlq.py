import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q import native
from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.baselines import GroupGrid, gptq, min_max_grid, round_to_nearest
from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.hadamard import rotate_hessian, rotate_weight
from lplr_q.linalg.ldl import block_bounds, block_ldl, regularise
from lplr_q.linalg.ldlq import CodebookBlocks, guarded_sweep, ldlq, reference_ldlq, weighted_loss
from lplr_q.reference_problem import reference_problem
from workbench.errors import ConfigError, DataError


def problem(m, n, seed=0, dtype=torch.float64):
    """Weight and a strongly correlated Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=dtype)
    mixing = torch.randn(n, n, generator=generator, dtype=dtype)
    mixing = mixing * (1 + torch.arange(n, dtype=dtype)) ** -0.7
    hessian = mixing @ mixing.T
    return weight, regularise(hessian, sigma=1e-2).to(dtype)


class FixedGrid:
    """Columns rounded to one grid per row: scalar blocks."""

    def __init__(self, weight, bits):
        self.bounds = block_bounds(weight.shape[1], 1)
        self.grid = min_max_grid(weight, bits)

    def quantise(self, target, block):
        return self.grid.round(target)


@pytest.mark.parametrize(("n", "block"), [(24, 8), (20, 8), (7, 1), (16, 16), (5, 8)])
def test_block_ldl_reconstructs(n, block):
    _, hessian = problem(1, n)
    result = block_ldl(hessian, block)
    middle = torch.block_diag(*result.diagonal)
    rebuilt = result.lower @ middle @ result.lower.T
    torch.testing.assert_close(rebuilt, hessian, rtol=0, atol=1e-10)
    for low, high in result.bounds:
        corner = result.lower[low:high, low:high]
        torch.testing.assert_close(corner, torch.eye(high - low).double(), rtol=0, atol=1e-12)
        assert float(result.lower[low:high, high:].abs().sum()) == 0


def test_identity_hessian_means_plain_rounding():
    weight, _ = problem(6, 16)
    result = block_ldl(torch.eye(16), 8)
    assert torch.equal(result.lower, torch.eye(16).double())
    blocks = CodebookBlocks(make_codebook("e8p", 2), 16)
    codes, points = ldlq(weight, result.lower, blocks)
    for k, (low, high) in enumerate(blocks.bounds):
        plain, expected = blocks.quantise(weight[:, low:high], k)
        assert torch.equal(codes[k], plain)
        assert torch.equal(points[:, low:high], expected)


@pytest.mark.parametrize("n", [32, 28])
def test_loss_is_the_sum_of_local_errors(n):
    """tr(E H E^T) = sum_k tr(eta_k D_k eta_k^T), eta_k the error of step k against its target."""
    weight, hessian = problem(9, n)
    factors = block_ldl(hessian, 8)
    blocks = CodebookBlocks(make_codebook("e8p", 2), n)
    local = {}
    original = blocks.quantise

    def recording(target, k):
        codes, points = original(target, k)
        local[k] = target - points
        return codes, points

    blocks.quantise = recording
    _, points = ldlq(weight, factors.lower, blocks, buffer=16)
    total = sum(
        float(torch.trace(local[k] @ factors.diagonal[k] @ local[k].T)) for k in range(len(local))
    )
    assert weighted_loss(weight - points, hessian) == pytest.approx(total, rel=1e-8)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(8, 70),
    st.sampled_from([8, 16, 24, 64, 128]),
    st.integers(0, 99),
)
def test_buffer_width_changes_nothing(m, n, buffer, seed):
    weight, hessian = problem(m, n, seed)
    blocks = CodebookBlocks(make_codebook("e8p", 2), n)
    lower = block_ldl(hessian, 8).lower
    lazy_codes, lazy = ldlq(weight, lower, blocks, buffer=buffer)
    plain_codes, plain = reference_ldlq(weight, lower, blocks)
    for a, b in zip(lazy_codes, plain_codes, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(lazy, plain)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ldlq_with_single_columns_in_reverse_is_gptq(bits):
    weight, hessian = problem(17, 40)
    grid = min_max_grid(weight, bits)
    ours = gptq(weight, hessian, bits=bits, group=40, buffer=16, grid_of=lambda block, j: grid)
    flipped, turned = weight.flip(1), hessian.flip(0, 1)
    codes, points = ldlq(flipped, block_ldl(turned, 1).lower, FixedGrid(flipped, bits))
    assert torch.equal(torch.cat(codes, 1).flip(1), ours.codes.long())
    torch.testing.assert_close(points.flip(1), ours.weight)


def test_gptq_does_not_depend_on_its_buffer():
    weight, hessian = problem(8, 96)
    results = [gptq(weight, hessian, bits=3, group=32, buffer=b).codes for b in (8, 20, 128)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_feedback_beats_nearest_rounding():
    wins = 0
    for seed in range(40):
        weight, hessian = problem(8, 32, seed)
        blocks = FixedGrid(weight, 3)
        _, fed = ldlq(weight, block_ldl(hessian, 1).lower, blocks)
        plain = blocks.grid.round(weight)[1]
        wins += weighted_loss(weight - fed, hessian) <= weighted_loss(weight - plain, hessian)
    assert wins >= 38


def test_rows_are_independent():
    weight, hessian = problem(10, 24)
    lower = block_ldl(hessian, 8).lower
    blocks = CodebookBlocks(make_codebook("e8p", 2), 24)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    _, points = ldlq(weight, lower, blocks)
    _, permuted = ldlq(weight[order], lower, blocks)
    assert torch.equal(points[order], permuted)


@pytest.mark.parametrize("codebook", ["e8p", "tcq-8", "lloyd-max"])
def test_scaling_the_weight_scales_q(codebook):
    """P4: the codes of c W are those of W (c a power of two, so that nothing is rounded anew)."""
    weight, hessian = problem(12, 20, dtype=torch.float32)
    prepared = prepare_hessian(hessian, 20, generator=None)
    once, scaled = (
        decompose(factor * weight, prepared, codebook=codebook, q_bits=2, rank=0, rounds=1)
        for factor in (1.0, 4.0)
    )
    for a, b in zip(once.q_codes, scaled.q_codes, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(4 * once.dequantize(), scaled.dequantize())


def test_sign_flips_of_columns_pass_through_a_symmetric_codebook():
    weight, hessian = problem(6, 24)
    blocks = CodebookBlocks(make_codebook("lloyd-max", 2), 24)
    signs = (
        torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(2)) * 2 - 1
    ).double()
    _, points = ldlq(weight, block_ldl(hessian, 1).lower, blocks)
    turned = hessian * signs[:, None] * signs
    _, flipped = ldlq(weight * signs, block_ldl(turned, 1).lower, blocks)
    torch.testing.assert_close(flipped * signs, points)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 10), st.integers(4, 45), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_guarded_sweeps_never_raise_the_loss(m, n, bits, seed):
    weight, hessian = problem(m, n, seed)
    blocks = CodebookBlocks(make_codebook("e8p", bits), n)
    codes, points = ldlq(weight, block_ldl(hessian, 8).lower, blocks)
    losses = [weighted_loss(weight - points, hessian)]
    for _ in range(3):
        codes, points = guarded_sweep(weight, hessian, blocks, codes, points, buffer=16)
        losses.append(weighted_loss(weight - points, hessian))
        torch.testing.assert_close(blocks.decode(codes).double(), points, rtol=0, atol=1e-5)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses))


def test_a_sweep_helps_a_bad_start():
    weight, hessian = problem(16, 32)
    blocks = CodebookBlocks(make_codebook("e8p", 2), 32)
    codes, points = ldlq(weight, torch.eye(32).double(), blocks)  # no feedback
    before = weighted_loss(weight - points, hessian)
    _, after = guarded_sweep(weight, hessian, blocks, codes, points)
    assert weighted_loss(weight - after, hessian) < 0.8 * before


def test_weighted_loss_is_the_trace():
    error, hessian = problem(5, 9)
    assert weighted_loss(error, hessian) == pytest.approx(
        float(torch.trace(error @ hessian @ error.T)), rel=1e-12
    )


# ---------------------------------------------------------------- trellises, and every codebook


@settings(max_examples=8, deadline=None)
@given(
    st.integers(3, 80), st.integers(1, 4), st.sampled_from(["tcq-8-16x16", "tcq-8-8x4"]),
    st.integers(0, 99),
)  # fmt: skip
def test_trellis_blocks_and_their_sweeps(m, bits, name, seed):
    """Loss identity, decoding, and sweeps that a whole tile takes or leaves."""
    book = make_codebook(name, bits)
    n = 2 * book.dim + 1
    weight, hessian = problem(m, n, seed)
    factors = block_ldl(hessian, book.dim)
    blocks = CodebookBlocks(book, n)
    codes, points = ldlq(weight, factors.lower, blocks, buffer=16)
    assert [tuple(c.shape) for c in codes] == [(m, book.dim), (m, book.dim), (m, 1)]
    torch.testing.assert_close(blocks.decode(codes).double(), points, rtol=0, atol=1e-5)
    plain, _ = reference_ldlq(weight, factors.lower, blocks)
    assert all(torch.equal(a, b) for a, b in zip(codes, plain, strict=True))
    before = weighted_loss(weight - points, hessian)
    codes, points = guarded_sweep(weight, hessian, blocks, codes, points, buffer=16)
    torch.testing.assert_close(blocks.decode(codes).double(), points, rtol=0, atol=1e-5)
    assert weighted_loss(weight - points, hessian) <= before * (1 + 1e-9)


def test_tiles_do_not_see_each_other():
    weight, hessian = problem(24, 16)
    lower = block_ldl(hessian, 4).lower
    blocks = CodebookBlocks(make_codebook("tcq-8-8x4", 2), 16)
    _, points = ldlq(weight, lower, blocks)
    order = torch.tensor([2, 0, 1])
    tiles = weight.reshape(3, 8, 16)[order].reshape(24, 16)
    _, moved = ldlq(tiles, lower, blocks)
    assert torch.equal(points.reshape(3, 8, 16)[order].reshape(24, 16), moved)


@pytest.fixture(scope="module")
def rotated_problem():
    """The reference problem after a Hadamard rotation, unit rms, and tr(W H W^T)."""
    weight, hessian = reference_problem()
    generator = torch.Generator().manual_seed(0)
    signs_in, signs_out = (
        (torch.randint(0, 2, (512,), generator=generator) * 2 - 1).to(torch.int8) for _ in range(2)
    )
    weight = rotate_weight(weight, signs_out, signs_in)
    weight = weight / weight.square().mean().sqrt()
    hessian = rotate_hessian(hessian.double(), signs_in).float()
    return weight, hessian, weighted_loss(weight, hessian)


@pytest.mark.parametrize(
    ("name", "multiplier", "after_ldlq", "after_sweep"),
    [
        ("lloyd-max", 1.0, 0.1965, None),
        ("e8p", 1.0, 0.1775, 0.1710),
        ("tcq-8-1mad-16x16", 0.95, 0.1678, 0.1643),
        ("tcq-10-1mad-16x16", 0.95, 0.1583, 0.1561),
        ("tcq-8-1mad", 0.95, 0.1621, 0.1605),
        ("tcq-10-1mad", 0.95, 0.1532, 0.1523),
        ("tcq-8", 1.0, 0.1552, 0.1542),
        ("tcq", 1.0, 0.1500, 0.1492),
        pytest.param("tcq-12", 0.95, 0.1502, 0.1495, marks=pytest.mark.slow),
    ],
)
def test_errors_on_the_reference_problem(
    rotated_problem, name, multiplier, after_ldlq, after_sweep
):
    """Relative error e of 2-bit LDLQ after the rotation, and after one guarded sweep."""
    if name.startswith("tcq") and native.library() is None:
        pytest.skip(f"a minute in torch; {native.status()}")
    weight, hessian, total = rotated_problem
    book = make_codebook(name, 2)
    blocks = CodebookBlocks(book, 512, multiplier=multiplier)
    codes, points = ldlq(weight, block_ldl(hessian, book.dim).lower, blocks)
    error = (weighted_loss(weight - points, hessian) / total) ** 0.5
    assert error == pytest.approx(after_ldlq, rel=0.01)
    if after_sweep is not None:
        _, points = guarded_sweep(weight, hessian, blocks, codes, points)
        error = (weighted_loss(weight - points, hessian) / total) ** 0.5
        assert error == pytest.approx(after_sweep, rel=0.01)


def water_filling(eigenvalues, bits):
    """Least relative e^2 at this rate for i.i.d. Gaussian rows: sum min(theta, l_i) / sum l_i."""
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(200):
        theta = (low + high) / 2
        rate = 0.5 * float(torch.log2(eigenvalues / theta).clamp_min(0).mean())
        low, high = (theta, high) if rate > bits else (low, theta)
    return float(eigenvalues.clamp_max(theta).sum() / eigenvalues.sum())


def test_water_filling_in_two_cases_done_by_hand():
    assert water_filling(torch.ones(7).double(), 2) == pytest.approx(4.0**-2)
    # rates 1 1/2 and 1/2 for variances 4 and 1: theta = 1/2
    assert water_filling(torch.tensor([4.0, 1.0]).double(), 1.0) == pytest.approx(1.0 / 5)


@pytest.mark.parametrize("name", ["e8p", "lloyd-max", "tcq", "tcq-8", "tcq-8-random-16x16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_codebook_is_under_the_information_bound(name, bits):
    """P14: below reverse water-filling, bits would be miscounted."""
    weight, hessian = problem(128, 64, seed=3)
    book = make_codebook(name, bits)
    blocks = CodebookBlocks(book, 64)
    codes, points = ldlq(weight, block_ldl(hessian, book.dim).lower, blocks)
    for _ in range(2):
        codes, points = guarded_sweep(weight, hessian, blocks, codes, points)
    found = weighted_loss(weight - points, hessian) / weighted_loss(weight, hessian)
    bound = water_filling(torch.linalg.eigvalsh(hessian), bits)
    assert bound < found < 3.5 * bound


# ---------------------------------------------------------------- rounding grids


def test_min_max_grid_by_hand():
    grid = min_max_grid(torch.tensor([[-1.0, 0.0, 2.0]]), 2)
    codes, values = grid.round(torch.tensor([[-1.0, 0.4, 0.6, 2.0, 9.0]]))
    assert codes.tolist() == [[0, 1, 2, 3, 3]]
    assert values.tolist() == [[-1.0, 0.0, 1.0, 2.0, 2.0]]


def test_round_to_nearest_is_within_half_a_step():
    weight, _ = problem(4, 50)
    result = round_to_nearest(weight, bits=4, group=16)
    for index, low in enumerate(range(0, 50, 16)):
        step = result.grids[index].scale[:, None]
        gap = (weight - result.weight)[:, low : low + 16].abs()
        assert bool((gap <= 0.51 * step).all())
    assert isinstance(result.grids[0], GroupGrid)


def test_constant_and_zero_rows_survive():
    weight = torch.zeros(2, 8)
    weight[1] = 3.0
    assert torch.allclose(round_to_nearest(weight, bits=4, group=8).weight, weight, atol=2e-3)


# ---------------------------------------------------------------- bad input


def test_regularise_refuses_bad_hessians():
    good = torch.eye(4)
    bad = good.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(DataError, match=r"1 non-finite entries, the first at \(1, 2\)"):
        regularise(bad, name="q_proj")
    with pytest.raises(DataError, match="square"):
        regularise(torch.ones(3, 4))
    with pytest.raises(DataError, match="not symmetric"):
        regularise(torch.tensor([[1.0, 5.0], [0.0, 1.0]]))
    with pytest.raises(DataError, match="negative diagonal"):
        regularise(-good)


def test_dead_channels_and_zero_hessians_become_usable():
    h = torch.diag(torch.tensor([0.0, 2.0, 4.0]))
    assert regularise(h, sigma=0.0).diagonal().tolist() == pytest.approx([1, 2 / 3, 4 / 3])
    assert torch.equal(regularise(torch.zeros(3, 3), sigma=0.0), torch.eye(3).double())


def test_indefinite_hessian_names_the_eigenvalue():
    with pytest.raises(DataError, match="smallest eigenvalue -1"):
        block_ldl(torch.diag(torch.tensor([1.0, -1.0])), 1)


def test_rounding_refuses_nonsense():
    with pytest.raises(ConfigError, match="choose 1 to 8"):
        round_to_nearest(torch.ones(2, 2), bits=9)
    with pytest.raises(ConfigError, match="group=0"):
        round_to_nearest(torch.ones(2, 2), bits=2, group=0)
    with pytest.raises(DataError, match="weight has 1 non-finite"):
        round_to_nearest(torch.tensor([[1.0, float("inf")]]), bits=2)
