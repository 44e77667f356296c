import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from lplr_q.bits import (
    average,
    group_bits,
    group_for_budget,
    layer_bits,
    matched_budget,
    rank_for_budget,
)
from lplr_q.pack import pack_bits, pack_signs, packed_size, unpack_bits, unpack_signs
from workbench.errors import ConfigError, DataError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(0, 77), st.integers(0, 999))
def test_round_trip_of_every_width_and_length(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_layout_is_little_endian_without_gaps():
    assert pack_bits(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0b0]
    assert pack_bits(torch.tensor([0x1234]), 16).tolist() == [0x34, 0x12]


def test_shape_is_read_row_by_row():
    codes = torch.arange(15).reshape(3, 5)
    assert torch.equal(unpack_bits(pack_bits(codes, 4), 4, 15).reshape(3, 5), codes)


def test_signs():
    signs = torch.tensor([1, -1, -1, 1, 1, 1, 1, -1, -1], dtype=torch.int8)
    assert torch.equal(unpack_signs(pack_signs(signs), 9), signs)
    assert pack_signs(signs).numel() == 2


def test_bad_codes_and_truncated_bytes():
    with pytest.raises(DataError, match=r"0\.\.4, not 2 bits"):
        pack_bits(torch.tensor([0, 4]), 2)
    with pytest.raises(ConfigError, match="1 to 16"):
        pack_bits(torch.tensor([0]), 17)
    with pytest.raises(DataError, match="damaged or of another shape"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 4, 5)


# ---------------------------------------------------------------- bits per weight

# Llama-2-7B: four 4096 x 4096 and three 4096 x 11008 matrices per layer; CALDERA, Tables 1-2
SHAPES = [(4096, 4096)] * 4 + [(4096, 11008)] * 3


@pytest.mark.parametrize(
    ("rank", "factor_bits", "expected"),
    [
        (64, 4, 2.10),
        (128, 4, 2.20),
        (256, 4, 2.40),
        (64, 16, 2.40),
        (128, 16, 2.79),
        (256, 16, 3.58),
    ],
)
def test_published_bits_per_weight(rank, factor_bits, expected):
    parts = [layer_bits(m, n, rank=rank, factor_bits=factor_bits) for m, n in SHAPES]
    mean = average((p.per_weight, p.weights) for p in parts)
    assert mean == pytest.approx(expected, abs=0.006)


def test_every_part_by_hand():
    bits = layer_bits(10, 20, q_bits=2, rank=3, factor_bits=4)
    # 2 whole blocks of 16 bits and 4 scalar columns of 2 bits per row
    assert bits.q_codes == 10 * 2 * 16 + 10 * 4 * 2
    assert bits.factors == 3 * 10 * 4 + 3 * 20 * 4
    assert bits.scales == 32 + 2 * 16 * 3
    assert bits.signs == 16 + 24
    assert bits.total == sum((400, 360, 128, 40))
    assert layer_bits(10, 20, q_bits=0, rank=3, factor_bits=16, rotated=False).total == 3 * 30 * 16


@pytest.mark.parametrize("codebook", ["e8p", "tcq", "lloyd-max"])
def test_published_bits_per_weight_with_a_trained_part(codebook):
    """Rank 256 with 64 components in 16 bits: 2.69, whatever codebook of two bits."""
    parts = [layer_bits(m, n, rank=256, ft_rank=64, codebook=codebook) for m, n in SHAPES]
    mean = average((p.per_weight, p.weights) for p in parts)
    assert mean == pytest.approx(2.69, abs=0.006)


def test_every_option_by_hand():
    plain = layer_bits(10, 20, rank=3)
    assert layer_bits(10, 20, rank=3, rescaled=True).scales == plain.scales + 16 * 20
    assert layer_bits(10, 20, rank=3, float_signs=True).signs == 16 * 30
    assert layer_bits(10, 20, rank=3, q_group=8).scales == plain.scales - 32 + 16 * 10 * 3
    tuned = layer_bits(10, 20, rank=3, ft_rank=1)
    assert tuned.factors == 2 * 10 * 4 + 2 * 20 * 4 + 16 * 30
    assert tuned.scales == 32 + 2 * 16 * 2
    # E8P factors: two blocks of 32 bits and 4 scalars of 4 bits for R; 1 and 2 for L; two scales
    lattice = layer_bits(10, 20, rank=3, factor_codebook="e8p")
    assert lattice.factors == 3 * (2 * 32 + 4 * 4) + 3 * (32 + 2 * 4)
    assert lattice.scales == 32 + 2 * 16
    # L and R of different widths, one of them without scales
    apart = layer_bits(10, 20, rank=3, factor_bits=(3, 5))
    assert (apart.factors, apart.scales) == (96 + 3 * 20 * 5 + 4, plain.scales)  # 90, 300 in bytes
    apart = layer_bits(10, 20, rank=3, factor_bits=(16, 5), ft_rank=1)
    assert apart.factors == 2 * 10 * 16 + 2 * 20 * 5 + 16 * 30
    assert apart.scales == 32 + 16 * 2
    with pytest.raises(ConfigError, match=r"factor_bits=\(1, 2, 3\): give one number, or two"):
        layer_bits(10, 20, rank=3, factor_bits=(1, 2, 3))
    # a trellis of 3 bits: five blocks of four symbols per row, packed as one run
    assert layer_bits(7, 21, codebook="tcq", q_bits=3).q_codes == 7 * 60 + 4 + 7 * 3 + 3


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    codebook=st.sampled_from(["e8p", "tcq", "lloyd-max"]),
    q_bits=st.sampled_from([0, 2, 3]),
    rank=st.integers(1, 6),
    ft_rank=st.integers(0, 6),
    factor_bits=st.sampled_from([3, 4, 16, (2, 4), (4, 3), (16, 3), (2, 16)]),
    factor_codebook=st.sampled_from(["lloyd-max", "e8p"]),
    rotated=st.booleans(),
    rescaled=st.booleans(),
)
def test_counted_bits_are_the_bits_a_layer_stores(m, n, rank, ft_rank, **form):
    rank = min(rank, m, n)
    form |= {"rank": rank, "ft_rank": min(ft_rank, rank)}
    stored = LPLRQuantizedLinear(n, m, **form).stored_bits()
    assert layer_bits(m, n, **form) == stored


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.5, 9), st.sampled_from([3, 16, (2, 16)]))
def test_bisection_finds_what_trying_every_rank_finds(m, n, budget, factor_bits):
    tried = [
        rank
        for rank in range(min(m, n) + 1)
        if layer_bits(m, n, rank=rank, factor_bits=factor_bits).per_weight <= budget + 1e-9
    ]
    found = rank_for_budget(m, n, budget, factor_bits=factor_bits)
    assert found == max(tried, default=-1)


def test_rank_fills_the_budget():
    for budget in (2.15, 2.5, 3.1):
        rank = rank_for_budget(128, 320, budget)
        assert layer_bits(128, 320, rank=rank).per_weight <= budget
        assert layer_bits(128, 320, rank=rank + 1).per_weight > budget
    assert rank_for_budget(128, 128, 1.9) == -1


def test_group_bits():
    assert group_bits(4, 128, bits=2, group=128) == 2 + 18 / 128
    assert group_bits(4, 128, bits=4, group=64, symmetric=True) == 4 + 16 / 64
    assert group_for_budget(128, 2.15, bits=2) == 128
    assert group_for_budget(128, 2.65, bits=2) == 32
    assert matched_budget(4, 128, 2.5, 0.15) == 2 + 4 * 18 / 128
    assert matched_budget(4, 128, 2.0, 0.03) == 2.03
    assert group_for_budget(64, 2.0, bits=2) == 64  # one group is the least there can be
