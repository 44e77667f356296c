import pytest
import torch

from lplr_q.activation_aware import alternation, factors, remainder
from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.factors import LowRank, quantise_factor
from lplr_q.activation_aware.remainder import CodedQ, Remainder
from lplr_q.codebooks.base import CODEBOOKS, make_codebook, rows_of
from lplr_q.linalg import rows as rows_module
from lplr_q.linalg.ldlq import CodebookBlocks, ldlq, weighted_loss
from lplr_q.linalg.rows import row_chunks, squared_norm, times


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("m", [1, 127, 128, 129, 1000, 2048, 5000])
def test_chunks_cover_every_row_once_and_begin_at_whole_tiles(m):
    chunks = row_chunks(m)
    assert [i for rows in chunks for i in range(m)[rows]] == list(range(m))
    assert max(rows.stop - rows.start for rows in chunks) <= 512
    assert len(chunks) >= (4 if m >= 1024 else 1)
    tallest = max(rows_of(make_codebook(name, 2)) for name in CODEBOOKS)
    assert all(rows.start % tallest == 0 for rows in chunks)


def test_sums_and_products_by_rows():
    g = generator()
    a, b = torch.randn(300, 40, generator=g), torch.randn(40, 7, generator=g)
    torch.testing.assert_close(times(a, b), a @ b, rtol=1e-5, atol=1e-5)
    triangle = torch.tril(torch.randn(40, 40, generator=g))
    torch.testing.assert_close(times(a, triangle, lower=True), a @ triangle, rtol=1e-5, atol=1e-5)
    wide = torch.tril(torch.randn(600, 600, generator=g))
    b = torch.randn(30, 600, generator=g)
    torch.testing.assert_close(times(b, wide, lower=True), b @ wide, rtol=1e-4, atol=1e-4)
    assert squared_norm(a) == pytest.approx(float(a.double().square().sum()), rel=1e-6)


def test_a_remainder_is_what_its_parts_leave():
    g = generator(1)
    weight = torch.randn(300, 44, generator=g)  # four columns in the scalar tail
    blocks = CodebookBlocks(make_codebook("e8p", 2), 44)
    codes, points = ldlq(weight, torch.eye(44), blocks)
    narrow = [part.to(blocks.code_dtype) for part in codes]
    left = quantise_factor(torch.randn(3, 300, generator=g), 4)
    right = quantise_factor(torch.randn(3, 44, generator=g), 4)
    low, q = LowRank(left, right, 0.0), CodedQ(blocks, narrow, 0.5)
    product = left.decode().T @ right.decode()
    hessian = torch.eye(44) * 2
    for parts, expected in (
        ((None, None), weight),
        ((q, None), weight - 0.5 * points),
        ((None, low), weight - product),
        ((q, low), weight - 0.5 * points - product),
    ):
        left_over = Remainder(weight, *parts)
        torch.testing.assert_close(left_over.whole(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(left_over[60:70], expected[60:70], rtol=0, atol=1e-5)
        assert left_over.loss(hessian) == pytest.approx(weighted_loss(expected, hessian), rel=1e-5)
    assert Remainder(weight).whole() is weight  # no copy where nothing is taken away


@pytest.mark.parametrize("codebook", ["e8p", "tcq-8", "lloyd-max"])
def test_the_number_of_rows_done_at_a_time_changes_nothing(codebook, monkeypatch):
    g = generator(2)
    weight = torch.randn(200, 48, generator=g, dtype=torch.float64).float()
    mixing = torch.randn(48, 48, generator=g) * (1 + torch.arange(48)) ** -0.6
    prepared = prepare_hessian(mixing @ mixing.T, 48, generator=generator(3))

    def run():
        return decompose(
            weight, prepared, codebook=codebook, rank=4, rounds=2, generator=generator(4)
        )

    pieces = run()
    for module in (rows_module, alternation, remainder, factors):
        monkeypatch.setattr(module, "row_chunks", lambda m: [slice(0, m)])
    whole = run()
    same = [
        float((a.long() == b.long()).float().mean())
        for a, b in zip(pieces.q_codes, whole.q_codes, strict=True)
    ]
    assert min(same) > 0.99  # sums in another order may tip a tie
    assert pieces.error == pytest.approx(whole.error, rel=1e-4)


@pytest.mark.parametrize("codebook", ["e8p", "tcq-8"])
def test_a_decomposition_may_be_given_the_memory_of_the_weight(codebook):
    g = generator(5)
    weight = torch.randn(40, 32, generator=g)
    hessian = torch.eye(32) + 0.1
    kept = weight.clone()

    def run(**options):
        prepared = prepare_hessian(hessian, 32, generator=generator(6))
        return decompose(
            weight, prepared, codebook=codebook, rank=2, generator=generator(7), **options
        )

    untouched = run()
    assert torch.equal(weight, kept)
    taken = run(overwrite=True)
    assert not torch.equal(weight, kept)
    assert untouched.error == taken.error
    assert untouched.settings == taken.settings
    assert all(map(torch.equal, untouched.q_codes, taken.q_codes))


def test_a_compact_hessian_is_the_same_hessian():
    g = generator(8)
    mixing = torch.randn(24, 24, generator=g)
    hessian = (mixing @ mixing.T).double()
    full = prepare_hessian(hessian, 24, generator=generator(9))
    kept = hessian.clone()
    compact = prepare_hessian(hessian, 24, generator=generator(9), compact=True)
    assert torch.equal(hessian, kept)
    assert compact.matrix.dtype == compact.factor.dtype == torch.float32
    assert torch.equal(compact.matrix, full.matrix.float())
    torch.testing.assert_close(compact.factor, full.factor.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compact.lower_for(8), full.lower_for(8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compact.lower_for(1), full.lower_for(1), rtol=1e-5, atol=1e-6)
    given = prepare_hessian(hessian, 24, generator=generator(9), compact=True, overwrite=True)
    assert torch.equal(given.factor, compact.factor)
    assert not torch.equal(hessian, kept)
