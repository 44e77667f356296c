"""RTN and GPTQ: closed forms of the grids and of one step, GPTQ = LDLQ, groups, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.baselines import gptq, min_max_grid, round_to_nearest
from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.ldl import block_bounds, block_ldl, regularise
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, weighted_loss
from workbench.errors import ConfigError, DataError


def problem(m, n, seed=0):
    """Weight and a strongly correlated, regularised Hessian, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    mixing = mixing * (1 + torch.arange(n, dtype=torch.float64)) ** -0.7
    return weight, regularise(mixing @ mixing.T, sigma=1e-2)


def half(x):
    """What float16 makes of a number."""
    return float(torch.tensor(x, dtype=torch.float16))


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("row", "bits", "symmetric", "scale", "zero"),
    [
        ([-1.0, 0.3, 2.0], 2, False, 1.0, 1),
        ([-1.0, 0.3, 2.0], 4, False, half(3 / 15), 5),
        ([0.5, 1.0, 6.0], 3, False, half(6 / 7), 0),  # 0 is always on the grid
        ([-7.0, -1.0, -2.0], 3, False, 1.0, 7),
        ([-1.0, 0.3, 2.0], 3, True, half(4 / 7), 4),
        ([-1.0, 0.3, 2.0], 1, True, 4.0, 1),
        ([0.0, 0.0, 0.0], 4, False, 1.0, 0),
        ([0.0, 0.0, 0.0], 4, True, 1.0, 8),
    ],
)
def test_spacing_and_zero_point(row, bits, symmetric, scale, zero):
    grid = min_max_grid(torch.tensor([row]), bits, symmetric=symmetric)
    assert (float(grid.scale[0]), int(grid.zero[0])) == (scale, zero)
    codes, values = grid.round(torch.tensor([[0.0]]))
    assert (int(codes), float(values)) == (zero, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    group=st.integers(1, 40),
    n=st.integers(1, 40),
    size=st.sampled_from([0.02, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 3.0, -8.0]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_nearest_is_within_half_a_step(bits, group, n, size, shift, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, n, generator=generator, dtype=torch.float64) + shift) * size
    result = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)
    top = 2**bits - 1
    assert int(result.codes.min()) >= 0
    assert int(result.codes.max()) <= top
    assert len(result.grids) == -(-n // group)
    for grid, low in zip(result.grids, range(0, n, group), strict=True):
        columns = slice(low, low + group)
        # codes, scale and zero point are all there is
        codes = result.codes[:, columns]
        stored = (codes - grid.zero[:, None]) * grid.scale[:, None]
        assert torch.equal(result.weight[:, columns], stored)
        # the scale is float16: up to 2^-11 of it (2^-25 where it is subnormal) per step
        spacing = (grid.scale * 2.0**-11).clamp_min(2.0**-25)
        allowed = (0.5 + 1e-9) * grid.scale + top * spacing
        assert bool(((weight - result.weight)[:, columns].abs() <= allowed[:, None]).all())
        # points of the grid are their own nearest
        again, values = grid.round(stored)
        assert torch.equal(again, codes)
        assert torch.equal(values, stored)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_group_has_a_grid_of_its_own(method, symmetric):
    """10 columns in groups of 4: the last has 2. Each is rounded as if it were alone."""
    weight, _ = problem(5, 10)
    weight = weight * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 2)
    options = {"bits": 3, "symmetric": symmetric}
    eye = torch.eye(10).double()

    def rounded(part, group):
        if method == "rtn":
            return round_to_nearest(part, group=group, **options)
        width = part.shape[1]
        return gptq(part, eye[:width, :width], group=group, **options)

    whole = rounded(weight, 4)
    assert len(whole.grids) == 3
    for low, high in ((0, 4), (4, 8), (8, 10)):
        alone = rounded(weight[:, low:high], 99)
        assert torch.equal(whole.codes[:, low:high], alone.codes)
        assert torch.equal(whole.weight[:, low:high], alone.weight)


def test_a_group_of_one_column_keeps_the_column():
    weight, hessian = problem(4, 6)
    for result in (
        round_to_nearest(weight, bits=4, group=1),
        gptq(weight, torch.eye(6).double(), bits=4, group=1),
    ):
        torch.testing.assert_close(result.weight, weight, rtol=2**-11, atol=0)
    kept = gptq(weight, hessian, bits=4, group=1)  # what little error there is goes on
    torch.testing.assert_close(kept.weight, weight, rtol=0, atol=0.02)


# ---------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("diagonal", [False, True])
def test_without_correlations_gptq_is_nearest_rounding(diagonal):
    weight, _ = problem(7, 30)
    hessian = torch.eye(30).double()
    if diagonal:
        hessian = torch.diag(1 + torch.arange(30).double())
    nearest = round_to_nearest(weight, bits=3, group=8)
    found = gptq(weight, hessian, bits=3, group=8, buffer=16)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.weight, nearest.weight)


def test_two_columns_by_hand():
    """The second column moves by (w_0 - q_0) H_01 / H_11 before it is rounded."""
    weight = torch.tensor([[0.3, 1.0], [-0.4, 1.0]]).double()
    hessian = torch.tensor([[2.0, 1.5], [1.5, 2.0]]).double()
    grid = min_max_grid(torch.tensor([[-1.0, 2.0]] * 2).double(), 2)  # points -1, 0, 1, 2
    found = gptq(weight, hessian, bits=2, group=2, grid_of=lambda block, j: grid)
    # 0.3 -> 0 and 1 + 0.225 -> 1;  -0.4 -> 0 and 1 - 0.3 -> 1
    assert found.weight.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    weight[0, 0] = 0.45
    hessian[0, 1] = hessian[1, 0] = 1.99
    hessian[0, 0] = 4.0
    weight[0, 1] = 1.2
    found = gptq(weight, hessian, bits=2, group=2, grid_of=lambda block, j: grid)
    # 0.45 -> 0 and 1.2 + 0.448 -> 2, though 1 is nearer to 1.2
    assert found.weight[0].tolist() == [0.0, 2.0]


class Levels:
    """A codebook of single columns as the grid of GPTQ."""

    def __init__(self, book):
        self.book = book

    def round(self, x):
        codes = self.book.encode(x[..., None])[..., 0]
        return codes, self.book.decode(codes[..., None])[..., 0].to(x.dtype)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 45),
    bits=st.integers(1, 4),
    buffer=st.sampled_from([1, 7, 16, 128]),
    seed=st.integers(0, 999),
)
def test_gptq_is_ldlq_of_single_columns_in_reverse(m, n, bits, buffer, seed):
    """P3 on the codebook that LDLQ really uses, code for code."""
    weight, hessian = problem(m, n, seed)
    book = make_codebook("lloyd-max", bits)
    ours = gptq(
        weight, hessian, bits=bits, group=n, buffer=buffer, grid_of=lambda block, j: Levels(book)
    )
    lower = block_ldl(hessian.flip(0, 1), 1).lower
    codes, points = ldlq(weight.flip(1), lower, CodebookBlocks(book, n), buffer=16)
    assert torch.equal(torch.cat(codes, 1).flip(1), ours.codes)
    assert torch.equal(points.flip(1), ours.weight)


class GroupGrids:
    """The grids of groups of columns as the blocks of LDLQ, last column first."""

    def __init__(self, weight, bits, group):
        n = weight.shape[1]
        self.bounds = block_bounds(n, 1)
        grids = round_to_nearest(weight, bits=bits, group=group).grids
        self.of = [grids[(n - 1 - k) // group] for k in range(n)]

    def quantise(self, target, block):
        return self.of[block].round(target)


@pytest.mark.parametrize("group", [8, 12, 41, 64])
def test_gptq_is_ldlq_with_ragged_groups_too(group):
    weight, hessian = problem(6, 41, seed=3)
    grids = round_to_nearest(weight, bits=3, group=group).grids
    ours = gptq(
        weight, hessian, bits=3, group=group, buffer=10, grid_of=lambda block, j: grids[j // group]
    )
    blocks = GroupGrids(weight, 3, group)
    codes, points = ldlq(weight.flip(1), block_ldl(hessian.flip(0, 1), 1).lower, blocks)
    assert torch.equal(torch.cat(codes, 1).flip(1), ours.codes)
    assert torch.equal(points.flip(1), ours.weight)


@pytest.mark.parametrize("group", [7, 24, 50, 128])
def test_ragged_groups_do_not_depend_on_the_buffer(group):
    """Also the grids: each is chosen from weights that carry all corrections so far."""
    weight, hessian = problem(5, 50, seed=1)
    plain, *others = (gptq(weight, hessian, bits=3, group=group, buffer=b) for b in (50, 1, 16, 33))
    assert len(plain.grids) == -(-50 // group)
    for other in others:
        assert torch.equal(other.codes, plain.codes)
        for a, b in zip(other.grids, plain.grids, strict=True):
            assert torch.equal(a.scale, b.scale)
            assert torch.equal(a.zero, b.zero)


@pytest.mark.parametrize(("bits", "group"), [(2, 24), (3, 17), (4, 100)])
def test_gptq_loses_less_than_nearest_rounding(bits, group):
    wins, ratios = 0, []
    for seed in range(20):
        weight, hessian = problem(8, 48, seed)
        losses = [
            weighted_loss(weight - result.weight, hessian)
            for result in (
                gptq(weight, hessian, bits=bits, group=group),
                round_to_nearest(weight, bits=bits, group=group),
            )
        ]
        wins += losses[0] <= losses[1]
        ratios.append(losses[0] / losses[1])
    assert wins >= 19
    assert sum(ratios) / len(ratios) < 0.7


def test_the_loss_of_gptq_is_bounded_by_its_pivots():
    """tr(E H E^T) = sum of |eta_j|^2 / U_jj^2; |eta| is at most half a step without clipping."""
    weight, hessian = problem(9, 40)
    grid = min_max_grid(torch.tensor([[-40.0, 40.0]] * 9).double(), 8)
    found = gptq(weight, hessian, bits=8, group=40, grid_of=lambda block, j: grid)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    largest = 9 * (float(grid.scale[0]) / 2) ** 2 * float(upper.diagonal().pow(-2).sum())
    loss = weighted_loss(weight - found.weight, hessian)
    assert largest / 9 < loss <= largest
    nearest, _ = grid.round(weight)
    assert weighted_loss(weight - (nearest - grid.zero[:, None]) * grid.scale[:, None], hessian) > (
        1.5 * loss
    )


# ---------------------------------------------------------------- symmetries


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rows_are_independent_and_scales_pass_through(method):
    weight, hessian = problem(6, 20)
    before = weight.clone(), hessian.clone()

    def rounded(w, h=hessian):
        options = {"bits": 3, "group": 6}
        return round_to_nearest(w, **options) if method == "rtn" else gptq(w, h, **options)

    plain = rounded(weight)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(rounded(weight[order]).codes, plain.codes[order])
    assert torch.equal(rounded(weight[2:3]).codes, plain.codes[2:3])
    doubled = rounded(4 * weight)
    assert torch.equal(doubled.codes, plain.codes)
    assert torch.equal(doubled.weight, 4 * plain.weight)
    assert torch.equal(rounded(weight, 4 * hessian).codes, plain.codes)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"bits": 0}, ConfigError, "rounding to 0 bits; choose 1 to 8"),
        ({"bits": 9}, ConfigError, "rounding to 9 bits; choose 1 to 8"),
        ({"group": 0}, ConfigError, "group=0; use at least 1 column per group"),
        ({"weight": torch.full((2, 4), torch.nan)}, DataError, "weight has 8 non-finite"),
        ({"hessian": torch.eye(5)}, DataError, r"shape \(5, 5\) for a weight with 4 inputs"),
        ({"hessian": torch.ones(4)}, DataError, r"shape \(4,\) for a weight with 4 inputs"),
        ({"hessian": torch.eye(4) * torch.inf}, DataError, "Hessian has .* non-finite"),
        ({"hessian": -torch.eye(4)}, DataError, "not positive definite: smallest eigenvalue -1"),
    ],
)
def test_gptq_refuses_nonsense(changes, error, said):
    given = {"weight": torch.ones(2, 4), "hessian": torch.eye(4), "bits": 4, "group": 4} | changes
    with pytest.raises(error, match=said):
        gptq(given.pop("weight"), given.pop("hessian"), **given)
