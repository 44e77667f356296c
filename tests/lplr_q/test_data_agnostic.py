"""Compression without activations: closed forms, bounds, orderings, storage, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lplr_q.data_agnostic.budget import (
    METHODS,
    bits_per_weight,
    compress_to_budget,
    rank_for_ratio,
    search_bits,
)
from lplr_q.data_agnostic.compressed import CompressedMatrix, fit_affine, relative_error
from lplr_q.data_agnostic.dsvd import compress_dsvd
from lplr_q.data_agnostic.inputs import power_law_matrix
from lplr_q.data_agnostic.iterative import alternate, compress_iterative, compress_lplr_q
from lplr_q.data_agnostic.lplr import compress_lplr, least_squares, rounding_ridge
from lplr_q.data_agnostic.lsvd import compress_lsvd
from lplr_q.data_agnostic.naive import compress_naive, quantise_uniform
from lplr_q.data_agnostic.sketch import SKETCHES, apply_sketch, sketch_range, sparse_sketch
from workbench.errors import ConfigError, DataError


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(n: int, d: int, r: int, seed: int = 0) -> torch.Tensor:
    g = stream(seed)
    left = torch.randn(n, r, generator=g, dtype=torch.float64)
    return left @ torch.randn(r, d, generator=g, dtype=torch.float64)


def compress(method: str, matrix: torch.Tensor, **options) -> CompressedMatrix:
    return METHODS[method](matrix, generator=stream(3), **options)


# --- the uniform grid ---------------------------------------------------------------------------


def test_codes_by_hand():
    codes = quantise_uniform(torch.tensor([[0.0, 1.0], [2.4, 3.0]]), 2)
    assert codes.codes.tolist() == [[0, 1], [2, 3]]
    assert (codes.low, codes.step) == (0.0, 1.0)
    assert codes.decode().tolist() == [[0.0, 1.0], [2.0, 3.0]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(-50, 50))
@example(13, 1, 0.001, 8.0)  # a step is less than the distance of two float32 numbers
def test_nearest_rounding_errs_by_half_a_step(bits, seed, scale, shift):
    x = torch.randn(7, 5, generator=stream(seed), dtype=torch.float64) * scale + shift
    codes = quantise_uniform(x, bits)
    slack = 4e-7 * float(x.abs().max())  # the grid itself is float32
    moved = math.floor(slack / codes.step + 0.5)  # 0 unless a step is as small as that
    assert 0 <= int(codes.codes.min()) <= moved
    assert 2**bits - 1 - moved <= int(codes.codes.max()) <= 2**bits - 1
    assert float((codes.decode(torch.float64) - x).abs().max()) <= codes.step / 2 + slack


def test_stochastic_rounding_is_unbiased_and_stays_within_a_step():
    x = torch.tensor([[0.0, 0.3, 0.8, 1.0]]).repeat(20_000, 1)
    codes = quantise_uniform(x, 1, rounding="stochastic", generator=stream())
    mean = codes.decode().mean(0)
    # 6 standard errors of a coin with p = 0.3
    assert torch.allclose(mean, x[0], atol=6 * math.sqrt(0.25 / 20_000))
    assert float((codes.decode() - x).abs().max()) < 1.0


def test_a_constant_matrix_is_kept():
    assert relative_error(
        torch.full((3, 4), 0.25), compress_naive(torch.full((3, 4), 0.25), bits=1).dequantize()
    ) == pytest.approx(0.0, abs=1e-12)


# --- sketches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SKETCHES))
@pytest.mark.parametrize(("d", "r"), [(64, 16), (20, 3), (33, 5)])
def test_sketches_are_linear_maps_with_unit_expectation(kind, d, r):
    a = torch.randn(6, d, generator=stream(1), dtype=torch.float64)
    dense = apply_sketch(torch.eye(d, dtype=torch.float64), r, kind, stream(2))
    assert torch.allclose(apply_sketch(a, r, kind, stream(2)), a @ dense, atol=1e-12)
    draws = 400
    g = stream(5)
    eye = torch.eye(d, dtype=torch.float64)
    total = sum((s := apply_sketch(eye, r, kind, g)) @ s.T for _ in range(draws))
    assert float((total / draws - eye).abs().max()) < 6.5 * math.sqrt(2 / (r * draws))


@pytest.mark.parametrize(("r", "nonzeros"), [(16, 4), (7, 3), (3, 8)])
def test_sparse_rows_have_as_many_entries_of_equal_size_as_asked_for(r, nonzeros):
    dense = sparse_sketch(torch.eye(40, dtype=torch.float64), r, stream(), nonzeros=nonzeros)
    s = min(nonzeros, r)
    assert ((dense != 0).sum(1) == s).all()
    assert torch.allclose(dense[dense != 0].abs(), torch.tensor(1 / math.sqrt(s)).double())


def test_the_hadamard_sketch_has_orthogonal_columns():
    dense = apply_sketch(torch.eye(64, dtype=torch.float64), 16, "srht", stream())
    assert torch.allclose(dense.T @ dense, 4 * torch.eye(16).double(), atol=1e-12)
    assert torch.allclose(dense.abs(), torch.full_like(dense, 0.25))


def test_the_range_meets_its_bound_in_expectation():
    k, r = 5, 12
    a = power_law_matrix(50, 40, 1.0, stream()).double()
    tail = float(torch.linalg.svdvals(a)[k:].square().sum())
    losses = []
    g = stream(9)
    for _ in range(200):
        q = torch.linalg.qr(sketch_range(a, r, generator=g)).Q
        losses.append(float((a - q @ (q.T @ a)).square().sum()))
    bound = (1 + k / (r - k - 1)) * tail
    error = np.std(losses) / math.sqrt(len(losses))
    assert np.mean(losses) + 4 * error < bound
    assert np.mean(losses) > float(torch.linalg.svdvals(a)[r:].square().sum())


@pytest.mark.parametrize("kind", sorted(SKETCHES))
def test_power_iterations_bring_the_range_nearer_to_the_best(kind):
    a = power_law_matrix(64, 48, 0.5, stream()).double()
    best = float(torch.linalg.svdvals(a)[10:].square().sum())
    losses = []
    for q in (0, 1, 3):
        basis = torch.linalg.qr(
            sketch_range(a, 10, kind=kind, power_iterations=q, generator=stream(1))
        ).Q
        losses.append(float((a - basis @ (basis.T @ a)).square().sum()))
    assert losses[0] > losses[1] > losses[2] > best * (1 - 1e-9)
    assert losses[2] < 1.04 * best


def test_an_orthogonal_range_has_orthonormal_columns_and_the_same_span():
    a = power_law_matrix(30, 20, 1.0, stream()).double()
    plain = sketch_range(a, 6, generator=stream(4))
    turned = sketch_range(a, 6, orthogonal=True, generator=stream(4))
    assert torch.allclose(turned.T @ turned, torch.eye(6).double(), atol=1e-12)
    assert torch.allclose(turned @ (turned.T @ plain), plain, atol=1e-10)


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((m, {}) for m in METHODS),
        *(("lplr", {"sketch": kind}) for kind in SKETCHES),
        ("lplr", {"power_iterations": 2}),
        ("lplr", {"orthogonal": True}),
        ("lplr", {"damped": False}),
        ("lsvd", {"mix": False}),
    ],
)
@pytest.mark.parametrize("shape", [(30, 18), (18, 30)])
def test_enough_rank_and_16_bits_are_exact(method, options, shape):
    a = low_rank(*shape, 4)
    made = compress(method, a, rank=6, bits=16, **options)
    assert relative_error(a, made.dequantize(torch.float64)) < 5e-4


@pytest.mark.parametrize("mix", [False, True])
def test_lsvd_at_16_bits_is_the_truncated_svd(mix):
    a = power_law_matrix(40, 30, 0.7, stream()).double()
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    best = u[:, :7] * s[:7] @ vt[:7]
    made = compress_lsvd(a, rank=7, bits=16, mix=mix, generator=stream(1))
    assert relative_error(best, made.dequantize(torch.float64)) < 1e-3
    tail = float(s[7:].square().sum().sqrt() / s.square().sum().sqrt())
    assert relative_error(a, made.dequantize(torch.float64)) == pytest.approx(tail, rel=1e-5)


def test_dsvd_factors_are_the_rounded_singular_vectors():
    a = power_law_matrix(20, 16, 1.0, stream()).double()
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    term = compress_dsvd(a, rank=3, bits=5, bits_right=7).terms[0]
    assert term.left is not None
    assert torch.equal(term.left.codes, quantise_uniform(u[:, :3], 5).codes)
    assert torch.equal(term.right.codes, quantise_uniform(s[:3, None] * vt[:3], 7).codes)


def test_the_least_squares_factor_is_the_pseudo_inverse_even_with_equal_columns():
    g = stream()
    a = torch.randn(12, 9, generator=g, dtype=torch.float64)
    left = torch.randn(12, 4, generator=g, dtype=torch.float64)
    assert torch.allclose(least_squares(left, a), torch.linalg.pinv(left) @ a, atol=1e-12)
    twice = torch.cat([left, left[:, :1]], 1)
    fitted = least_squares(twice, a)
    assert torch.allclose(fitted, torch.linalg.pinv(twice) @ a, atol=1e-9)


def test_the_ridge_solves_its_normal_equations():
    g = stream()
    a = torch.randn(12, 9, generator=g, dtype=torch.float64)
    left = torch.randn(12, 4, generator=g, dtype=torch.float64)
    normal = left.T @ left + 0.7 * torch.eye(4).double()
    expected = torch.linalg.solve(normal, left.T @ a)
    assert torch.allclose(least_squares(left, a, ridge=0.7), expected, atol=1e-12)
    assert rounding_ridge(left, 1) == pytest.approx(
        float(left.square().sum()) / 4 * 7.5**2 / 12, rel=1e-12
    )
    assert rounding_ridge(left, 2) == pytest.approx(rounding_ridge(left, 1) / 9, rel=1e-12)


def test_the_ridge_saves_a_nearly_dependent_sketch():
    a = power_law_matrix(64, 64, 0.5, stream())
    plain, damped = (
        relative_error(
            a,
            compress_lplr(a, rank=64, bits=2, damped=damped, generator=stream(2)).dequantize(),
        )
        for damped in (False, True)
    )
    assert damped < 1 < plain


def test_the_affine_fit_is_the_regression_line():
    a = power_law_matrix(16, 12, 1.0, stream()) + 0.3
    plain = compress_naive(a, bits=2)
    fitted = fit_affine(a, plain)
    x = plain.dequantize(torch.float64).flatten().numpy()
    slope, offset = np.polyfit(x, a.double().flatten().numpy(), 1)
    assert fitted.affine == pytest.approx((slope, offset), rel=1e-5)
    assert fitted.bits == plain.bits + 64
    before = relative_error(a, plain.dequantize())
    assert relative_error(a, fitted.dequantize()) < before


@pytest.mark.parametrize("method", [*METHODS, "naive"])
def test_the_affine_fit_never_hurts(method):
    a = power_law_matrix(40, 24, 1.0, stream(8))
    errors = [
        relative_error(
            a,
            compress_to_budget(
                a, method, naive_bits=2, bits=2, generator=stream(1), affine=affine
            ).dequantize(),
        )
        for affine in (False, True)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-5)
    assert errors[1] < 1


# --- what the paper claims ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "naive_bits", "gain"),
    [(1.0, 1, 0.75), (1.0, 2, 0.45), (2.0, 1, 0.3), (2.0, 2, 0.2)],
)
def test_order_of_the_methods_on_falling_spectra(exponent, naive_bits, gain):
    a = power_law_matrix(200, 160, exponent, stream())

    def median(method: str) -> float:
        errors = [
            relative_error(
                a,
                compress_to_budget(
                    a, method, naive_bits=naive_bits, bits=4, generator=stream(seed)
                ).dequantize(),
            )
            for seed in range(5)
        ]
        return sorted(errors)[2]

    naive, dsvd, lsvd, lplr = (median(m) for m in ("naive", "dsvd", "lsvd", "lplr"))
    assert lsvd <= 1.1 * lplr
    assert lplr < gain * dsvd
    assert dsvd < naive
    # ours: rounds on the residual with refits, at the same size
    assert median("iterative") < 0.9 * lplr


def test_fitting_to_the_rounded_factor_beats_any_other_second_factor():
    a = power_law_matrix(30, 20, 1.0, stream()).double()
    left = quantise_uniform(sketch_range(a, 5, generator=stream(1)), 3).decode(torch.float64)
    best = float((a - left @ least_squares(left, a)).norm())
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    for other in (s[:5, None] * vt[:5], torch.linalg.pinv(u[:, :5]) @ a, torch.zeros(5, 20)):
        assert best < float((a - left @ other.double()).norm())


def test_a_sketch_of_the_rows_is_that_of_the_columns_of_the_transpose():
    a = power_law_matrix(40, 24, 1.0, stream())
    rows = compress_to_budget(
        a, "lplr", naive_bits=2, bits=3, bits_right=5, side="rows", generator=stream(2)
    )
    flipped = compress_lplr(a.T, rank=rows.rank, bits=5, bits_right=3, generator=stream(2))
    assert torch.allclose(rows.dequantize(), flipped.dequantize().T, atol=1e-6)
    assert isinstance(rows, CompressedMatrix)
    left, right = rows.terms[0].left, rows.terms[0].right
    assert left is not None
    assert (left.bits, right.bits) == (3, 5)
    assert left.codes.shape == (40, rows.rank)


# --- rounds -------------------------------------------------------------------------------------


def test_rounds_never_raise_the_error_and_history_is_true():
    a = power_law_matrix(60, 40, 1.0, stream())
    made = compress_iterative(a, rank=24, bits=4, rounds=4, generator=stream(1))
    assert made.history == sorted(made.history, reverse=True)
    assert relative_error(a, made.dequantize()) == pytest.approx(made.history[-1], rel=1e-4)
    assert made.rank <= 24
    one = compress_iterative(a, rank=24, bits=4, rounds=1, inner_iterations=0, generator=stream(1))
    plain = compress_lplr(a, rank=24, bits=4, generator=stream(1))
    assert torch.equal(one.dequantize(), plain.dequantize())


def test_refits_never_lose():
    a = power_law_matrix(40, 30, 0.7, stream())
    term = compress_lplr(a, rank=8, bits=3, generator=stream(1)).terms[0]
    better = alternate(a, term, 5, 3, 3)
    assert relative_error(a, better.product()) < relative_error(a, term.product())


def test_lplr_q_is_the_alternation_with_an_identity_hessian():
    a = power_law_matrix(48, 32, 0.7, stream())
    made = compress_lplr_q(a, rank=4, q_bits=2, rounds=2, generator=stream(1))
    assert {h["component"] for h in made.history} == {"LR", "Q"}
    assert made.error == pytest.approx(made.frobenius, rel=1e-4)  # H = I: both norms are one
    assert relative_error(a, made.dequantize()) == pytest.approx(made.frobenius, rel=1e-4)
    plain = compress_naive(a, bits=2, affine=True)
    assert made.frobenius < relative_error(a, plain.dequantize())


# --- budget and storage -------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.integers(4, 300), st.integers(4, 300), st.integers(1, 8), st.integers(1, 8),
    st.integers(1, 8), st.floats(0.3, 2.0),
)  # fmt: skip
def test_the_rank_is_the_largest_within_the_budget(n, d, bits, bits_right, naive_bits, ratio):
    budget = ratio * n * d * naive_bits
    one = n * bits + d * bits_right
    if budget < one:
        return
    rank = rank_for_ratio(
        n, d, naive_bits=naive_bits, bits=bits, bits_right=bits_right, ratio=ratio
    )
    assert rank * one <= budget * (1 + 1e-9)
    assert (rank + 1) * one > budget or rank == min(n, d)


@pytest.mark.parametrize("method", METHODS)
def test_the_search_finds_the_best_width_within_the_budget(method):
    a = power_law_matrix(96, 64, 1.0, stream())
    widths = (2, 4, 8, 16)
    made = search_bits(a, method, naive_bits=2, candidates=widths, seed=3)
    tried = [
        relative_error(
            a,
            compress_to_budget(
                a, method, naive_bits=2, bits=bits, generator=stream(3)
            ).dequantize(),
        )
        for bits in widths
    ]
    assert relative_error(a, made.dequantize()) == pytest.approx(min(tried), rel=1e-6)
    assert made.bits_per_weight <= 2 + 64 * 4 / a.numel()
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("method", [*METHODS, "naive"])
@pytest.mark.parametrize("bits", [1, 3, 5, 11])
def test_stored_size_is_counted_to_the_bit_and_comes_back(method, bits):
    a = power_law_matrix(23, 17, 1.0, stream())
    made = compress_to_budget(
        a, method, naive_bits=bits, bits=bits, bits_right=bits + 1, affine=True,
        generator=stream(1),
    )  # fmt: skip
    assert isinstance(made, CompressedMatrix)
    tensors = made.to_tensors()
    assert made.bits == sum(8 * t.numel() * t.element_size() for t in tensors.values())
    back = CompressedMatrix.from_tensors(tensors, made.metadata())
    assert torch.equal(back.dequantize(), made.dequantize())
    assert made.transpose().bits <= made.bits + 8
    assert torch.allclose(made.transpose().dequantize(), made.dequantize().T, atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS, "naive", "lplr-q"])
def test_every_method_keeps_to_its_budget(method):
    a = power_law_matrix(128, 96, 1.0, stream())
    made = compress_to_budget(a, method, naive_bits=2, bits=4, generator=stream(1))
    overhead = 64 * 2 * 2 / a.numel()
    assert 1.8 < bits_per_weight(made) <= 2 + overhead


def test_same_stream_same_codes_and_the_input_is_untouched():
    a = power_law_matrix(30, 20, 1.0, stream())
    copy = a.clone()
    for method in METHODS:
        first, second = (compress(method, a, rank=4, bits=4) for _ in range(2))
        assert torch.equal(first.dequantize(), second.dequantize())
    compress_lplr_q(a, rank=2, generator=stream())
    assert torch.equal(a, copy)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a: compress_lplr(a, rank=0, generator=stream()), ConfigError, "use 1 to 8"),
        (lambda a: compress_lsvd(a, rank=9), ConfigError, "rank=9"),
        (lambda a: compress_naive(a, bits=17), ConfigError, "bits=17"),
        (lambda a: compress_naive(a, bits=0), ConfigError, "1 to 16"),
        (lambda a: compress_naive(a, bits=2, rounding="stochastic"), ConfigError, "generator"),
        (
            lambda a: compress_lplr(a, rank=2, sketch="gausian", generator=stream()),
            ConfigError,
            "gaussian",
        ),
        (
            lambda a: compress_lplr(a, rank=2, power_iterations=-1, generator=stream()),
            ConfigError,
            "power_iterations=-1",
        ),
        (
            lambda a: compress_iterative(a, rank=2, rounds=3, generator=stream()),
            ConfigError,
            "rounds=3",
        ),
        (
            lambda a: compress_to_budget(a, "lprl", naive_bits=1, generator=stream()),
            ConfigError,
            "lplr",
        ),
        (
            lambda a: compress_to_budget(a, "lplr", naive_bits=1, bits=16, generator=stream()),
            ConfigError,
            "no component",
        ),
        (
            lambda a: search_bits(a, "lplr", naive_bits=1, candidates=(16,)),
            ConfigError,
            "no component",
        ),
        (lambda a: search_bits(a, "naive", naive_bits=1), ConfigError, "low-rank method"),
        (lambda a: sparse_sketch(a, 3, stream(), nonzeros=0), ConfigError, "nonzeros=0"),
        (lambda a: compress_naive(a[0], bits=2), DataError, "floating-point matrix"),
        (lambda a: compress_naive(a.long(), bits=2), DataError, "int64"),
        (lambda a: compress_naive(a * math.nan, bits=2), DataError, r"first at \(0, 0\)"),
        (lambda a: compress_dsvd(a[:0], rank=1), DataError, "at least one"),
        (lambda a: rank_for_ratio(8, 8, naive_bits=-1, bits=1, bits_right=1), ConfigError, "posit"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(8, 8, generator=stream()))


def test_damaged_storage_is_named():
    made = compress_naive(torch.randn(5, 4, generator=stream()), bits=3)
    tensors = made.to_tensors()
    with pytest.raises(DataError, match=r"no tensor 0\.right\.grid"):
        CompressedMatrix.from_tensors({"0.right.codes": tensors["0.right.codes"]}, made.metadata())
    tensors["0.right.codes"] = tensors["0.right.codes"][:-1]
    with pytest.raises(DataError, match="damaged"):
        CompressedMatrix.from_tensors(tensors, made.metadata())
