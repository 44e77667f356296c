"""Block-wise quantisers: closed forms, orderings, exact bits, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q.codebooks.scalar import gaussian_mse, lloyd_max_levels
from lplr_q.utils.enums import CalibSet, InitKind, Sketch, SubLayer
from lplr_q.utils.quantization import (
    QUANTIZERS,
    LloydMaxQuantizer,
    NormalFloatQuantizer,
    QuantizerFactory,
    RTNQuantizer,
    UniformQuantizer,
    make_quantizer,
    normal_float_levels,
)
from workbench.errors import ConfigError, DataError

SCALAR = [name for name in QUANTIZERS if name != "lattice"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(quantizer, x):
    return float((quantizer(x) - x).square().mean())


# ------------------------------------------------------------------------------ by hand


def test_symmetric_grid_at_two_bits_has_three_levels():
    """As published: k / (2^(b-1) - 1) with k in -1, 0, 1."""
    quantizer = UniformQuantizer(2, block=4)
    x = torch.tensor([-2.0, 0.9, 1.1, 0.2])
    assert quantizer(x).tolist() == [-2.0, 0.0, 2.0, 0.0]
    assert quantizer.levels == 3
    assert len(quantizer(gaussian(64)).unique()) <= 3 * 16


def test_asymmetric_grid_by_hand():
    quantizer = UniformQuantizer(2, block=4, asymmetric=True)
    stored = quantizer.quantize(torch.tensor([-1.0, 0.4, 0.6, 2.0]))
    assert stored.codes.tolist() == [0, 1, 2, 3]
    assert stored.zeros.tolist() == [1]
    assert quantizer.dequantize(stored).tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert quantizer.levels == 4


def test_one_bit_keeps_sign_and_mean_magnitude():
    x = torch.tensor([1.0, -3.0, 2.0, -2.0])
    assert UniformQuantizer(1, block=4)(x).tolist() == [2.0, -2.0, 2.0, -2.0]


def test_clipping_uses_the_magnitude_of_the_mean():
    """Entries around -10: the published mean + 2.5 deviations would cut them off at a negative
    bound."""
    x = gaussian(1, 64) * 0.1 - 10
    x[0, 0] = 40
    bound = float(x.mean().abs() + 2.5 * x.std(correction=0))
    found = make_quantizer("uniform-clipped", 8)(x)
    assert float(found.abs().max()) == pytest.approx(bound, rel=0.005)
    assert float((found - x)[0, 1:].abs().max()) < bound / 127


def test_normal_float_levels_are_those_of_the_paper():
    """QLoRA, Appendix E."""
    printed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert normal_float_levels(4).tolist() == pytest.approx(printed, abs=1e-6)
    for bits in range(2, 9):
        levels = normal_float_levels(bits)
        assert len(levels.unique()) == 2**bits
        assert 0.0 in levels.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_reaches_its_closed_form(bits):
    x = gaussian(300, 256)
    expected = gaussian_mse(lloyd_max_levels(bits))
    assert error(LloydMaxQuantizer(bits, block=256), x) == pytest.approx(expected, rel=0.03)


def test_sixteen_bits_are_bfloat16():
    x = gaussian(5, 7)
    for name in QUANTIZERS:
        quantizer = make_quantizer(name, 16)
        stored = quantizer.quantize(x)
        assert torch.equal(quantizer.dequantize(stored), x.to(torch.bfloat16).float())
        assert stored.bits_per_weight == 16


# ------------------------------------------------------------------------------ properties


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCALAR), st.integers(2, 8), st.integers(1, 5), st.integers(1, 70),
    st.sampled_from([1, 7, 64]), st.integers(0, 99),
)  # fmt: skip
def test_codes_fit_their_bits_and_shapes_come_back(name, bits, m, n, block, seed):
    x = gaussian(m, n, seed=seed) * 3
    before = x.clone()
    quantizer = make_quantizer(name, bits, block=block)
    stored = quantizer.quantize(x)
    assert torch.equal(x, before)
    assert stored.codes.shape == x.shape
    assert 0 <= int(stored.codes.min()) <= int(stored.codes.max()) < 2**bits
    found = quantizer.dequantize(stored)
    assert found.shape == x.shape
    assert torch.equal(found, quantizer(x))  # deterministic
    blocks = -(-m * n // block)
    assert stored.scales.shape == (blocks,)
    per_block = 16 + (bits if stored.zeros is not None else 0)
    assert stored.bits == m * n * bits + blocks * per_block


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["uniform", "rtn"]), st.integers(2, 8), st.integers(0, 99))
def test_error_is_within_half_a_step(name, bits, seed):
    x = gaussian(4, 64, seed=seed)
    found = make_quantizer(name, bits)(x)
    span = 2 * x.abs().amax(1) if name == "uniform" else x.amax(1) - x.amin(1)
    step = span / (2**bits - 2 if name == "uniform" else 2**bits - 1)
    # the scale's rounding to bfloat16 moves the end of the grid by up to 2^-8 of the range
    assert bool(((found - x).abs() <= 0.51 * step[:, None] + span[:, None] * 2**-8).all())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["uniform", "normal-float"]), st.integers(2, 8), st.integers(0, 99))
def test_quantised_again_nothing_changes(name, bits, seed):
    quantizer = make_quantizer(name, bits)
    once = quantizer(gaussian(3, 64, seed=seed))
    torch.testing.assert_close(quantizer(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_scaling_by_powers_of_two_scales_the_result(name, factor):
    x, quantizer = gaussian(4, 50), make_quantizer(name, 3)
    assert torch.equal(quantizer(x * factor), quantizer(x) * factor)


@pytest.mark.parametrize("name", [*SCALAR, "lattice"])
def test_more_bits_less_error(name):
    x = gaussian(16, 128, seed=4)
    widths = [2, 3, 4] if name == "lattice" else [2, 3, 4, 5, 6, 7, 8]
    errors = [error(make_quantizer(name, bits), x) for bits in widths]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_clipping_is_never_worse(bits):
    """Per block the unshrunk range is among the candidates."""
    x = gaussian(50, 64, seed=5) ** 3
    plain, searched = (make_quantizer(n, bits) for n in ("uniform-asymmetric", "uniform-mse"))
    before = (plain(x) - x).square().sum(1)
    after = (searched(x) - x).square().sum(1)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.97 * float(before.sum())


def test_ordering_on_gaussian_weights_at_two_bits():
    """More suitable points, less error; trellis below lattice below scalar levels."""
    x = gaussian(64, 128, seed=6)
    names = ["uniform", "uniform-asymmetric", "uniform-mse", "lloyd-max", "lattice"]
    errors = [error(make_quantizer(name, 2), x) for name in names]
    errors.append(error(make_quantizer("lattice", 2, codebook="tcq-8"), x))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("codebook", ["e8p", "tcq-8", "lloyd-max"])
@pytest.mark.parametrize("shape", [(70, 19), (3, 4), (2, 3, 21), (24,), (0, 5), ()])
def test_lattices_take_any_shape(codebook, shape):
    quantizer = make_quantizer("lattice", 2, codebook=codebook)
    x = gaussian(*shape) if shape else torch.tensor(0.7)
    stored = quantizer.quantize(x)
    found = quantizer.dequantize(stored)
    assert found.shape == x.shape
    if x.numel() > 20:
        assert float((found - x).square().mean()) < 0.25 * float(x.square().mean())
        assert stored.bits == pytest.approx(2 * x.numel() + 16, abs=16)  # padding to bytes


def test_zeros_constants_and_empty_tensors_survive():
    for name in SCALAR:
        quantizer = make_quantizer(name, 4)
        assert float(quantizer(torch.zeros(3, 40)).abs().max()) < 1e-37
        assert quantizer(torch.empty(0, 4)).shape == (0, 4)
    assert torch.allclose(RTNQuantizer(4)(torch.full((2, 64), 3.0)), torch.tensor(3.0), rtol=5e-3)


def test_last_block_does_not_see_its_padding():
    x = gaussian(100)
    for name in SCALAR:
        quantizer = make_quantizer(name, 3, block=64)
        assert torch.equal(quantizer(x)[64:], make_quantizer(name, 3, block=36)(x[64:]))


# ------------------------------------------------------------------------------ names


def test_factory_and_registry():
    factory = QuantizerFactory("lattice", options={"codebook": "tcq-8"})
    assert factory.get_quantizer(2).codebook.name == "tcq-8"
    assert isinstance(QuantizerFactory("normal-float", 32).get_quantizer(4), NormalFloatQuantizer)
    own = make_quantizer("lplr_q.utils.quantization:RTNQuantizer", 4, block=16)
    assert (own.bits, own.block) == (4, 16)
    for name in SCALAR:
        assert make_quantizer(name, 4).bits == 4


def test_bad_names_bits_blocks_and_tensors():
    with pytest.raises(ConfigError, match="nearest: uniform"):
        make_quantizer("unifrom", 4)
    with pytest.raises(ConfigError, match=r"no 9-bit version; choose from 1, .*8, 16"):
        make_quantizer("uniform", 9)
    with pytest.raises(ConfigError, match="choose from 2"):
        make_quantizer("normal-float", 1)
    with pytest.raises(ConfigError, match="e8p has no 5-bit"):
        make_quantizer("lattice", 5)
    with pytest.raises(ConfigError, match="block=0"):
        make_quantizer("rtn", 4, block=0)
    with pytest.raises(ConfigError, match="clip='hard'"):
        UniformQuantizer(4, clip="hard")
    with pytest.raises(ConfigError, match="with {'depth': 2}"):
        make_quantizer("rtn", 4, depth=2)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_quantizer("nowhere:Thing", 4)
    with pytest.raises(DataError, match="1 non-finite"):
        make_quantizer("rtn", 4).quantize(torch.tensor([1.0, float("nan")]))


def test_sublayers_know_their_names_in_every_family():
    assert SubLayer.QUERY == "q_proj"
    families = {
        "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.up_proj "
        "mlp.gate_proj mlp.down_proj",
        "phi": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2",
        "phi3": "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
        "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        "mamba": "mixer.in_proj mixer.out_proj",
    }
    for family, names in families.items():
        found = [SubLayer.of(f"model.layers.0.{name}") for name in names.split()]
        assert all(found), family
        flat = [member for members in found for member in members]
        assert len(flat) == len(set(flat)), family  # every sublayer is one module
    assert len(SubLayer.of("x.c_attn")) == 3
    assert SubLayer.of("lm_head") == ()
    assert (CalibSet("rp1t"), Sketch("srht"), InitKind("odlri")) == ("rp1t", "srht", "odlri")
