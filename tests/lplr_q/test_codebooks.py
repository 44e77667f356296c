import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q import native
from lplr_q.codebooks import base
from lplr_q.codebooks.base import Codebook, make_codebook
from lplr_q.codebooks.e8p import (
    decode_e8p,
    e8p_patterns,
    encode_e8p,
    reference_encode_e8p,
    torch_encode_e8p,
)
from lplr_q.codebooks.rvq import e8_short_vectors
from lplr_q.codebooks.scalar import gaussian_mse, lloyd_max_levels
from workbench.errors import ConfigError


def gaussian(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def mse(codebook, scale, count=60_000):
    x = gaussian(count, codebook.dim)
    return float((codebook.decode(codebook.encode(x * scale)) / scale - x).square().mean())


def test_patterns():
    patterns = e8p_patterns()
    norms = patterns.square().sum(1)
    counts = {int(n): int((norms == n).sum()) for n in norms.unique()}
    assert counts == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert len(torch.unique(patterns, dim=0)) == 256


def test_e8p_table_facts():
    points = decode_e8p(torch.arange(65536))
    assert len(torch.unique(points, dim=0)) == 65536
    assert float(points.square().sum(1).mean() / 8) == pytest.approx(1.19629, abs=1e-5)
    shift = torch.where(torch.arange(65536) & 1 == 0, 0.25, -0.25)[:, None]
    sums = (points - shift).sum(1)
    assert torch.equal(sums % 2, torch.zeros(65536))


def test_code_layout_as_documented():
    code = (255 << 8) | (1 << 7) | 1  # last pattern, coordinate 7 negative, shift -1/4
    point = decode_e8p(torch.tensor([code]))[0] + 0.25
    assert point.abs().tolist() == [1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5]  # places 2, 3, 7
    # the sum of this pattern is 9, one sign is set: even already, coordinate 0 stays positive
    assert (point < 0).tolist() == [False] * 7 + [True]


def test_every_code_is_its_own_nearest_point():
    codes = torch.arange(65536)
    assert torch.equal(encode_e8p(decode_e8p(codes)), codes)


@pytest.mark.parametrize("encode", [encode_e8p, torch_encode_e8p])
@pytest.mark.parametrize("scale", [0.2, 1.03, 1.8, 4.0])
def test_fast_encoder_is_exact(scale, encode):
    x = gaussian(1500, seed=3) * scale
    fast = encode(x)
    assert torch.equal(reference_encode_e8p(x), fast)
    points = decode_e8p(torch.arange(65536))
    few = x[:150]
    full = (2 * few @ points.T - points.square().sum(1)).argmax(1)
    assert torch.equal(full, fast[:150])


@pytest.mark.skipif(native.library() is None, reason=native.status())
@pytest.mark.parametrize("scale", [0.3, 1.03, 2.5])
def test_compiled_encoder_gives_the_same_codes(scale):
    x = gaussian(20_000, seed=8) * scale
    compiled, plain = encode_e8p(x), torch_encode_e8p(x)
    same = compiled == plain
    assert int((~same).sum()) <= 1  # sums are rounded in another order: ties within 1e-6
    errors = [(decode_e8p(codes) - x).square().sum(1) for codes in (compiled, plain)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=1e-6)
    assert encode_e8p(torch.empty(0, 8)).shape == (0,)


def test_every_code_is_its_own_nearest_point_in_torch():
    codes = torch.arange(65536)
    assert torch.equal(torch_encode_e8p(decode_e8p(codes)), codes)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from([-2.0, -1.0, -0.75, -0.5, 0.0, 0.25, 0.5, 1.0, 2.5]), min_size=8, max_size=8
    )
)
def test_encoder_with_ties_still_finds_a_nearest_point(values):
    x = torch.tensor([values])
    points = decode_e8p(torch.arange(65536))
    best = (points - x).square().sum(1).min()
    for encode in (encode_e8p, torch_encode_e8p):
        found = (decode_e8p(encode(x)) - x).square().sum()
        assert float(found) == pytest.approx(float(best), abs=1e-5)


# value, tolerance: an independent full search over one million Gaussians
@pytest.mark.parametrize(
    ("bits", "value", "tolerance"), [(2, 0.0913, 4e-4), (3, 0.0295, 3e-4), (4, 0.00965, 1e-4)]
)
def test_gaussian_error_of_e8p_and_its_residual_stages(bits, value, tolerance):
    codebook = make_codebook("e8p", bits)
    assert mse(codebook, codebook.opt_scale, 60_000) == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize(("scale", "value"), [(1.0, 0.0918), (0.95, 0.0942), (0.9, 0.0988)])
def test_e8p_error_at_other_scales(scale, value):
    assert mse(make_codebook("e8p", 2), scale) == pytest.approx(value, abs=8e-4)


def test_wrong_residual_scale_would_show():
    """Encoding with 0.9 and decoding with 2.04, as the published library does, costs 0.08."""
    codebook = make_codebook("e8p", 3)
    assert (codebook.rho, make_codebook("e8p", 4).rho) == (2.04, 3.45)
    right = mse(codebook, codebook.opt_scale, 20_000)
    x = gaussian(20_000) * codebook.opt_scale
    codebook.rho = 0.9
    codes = codebook.encode(x)
    codebook.rho = 2.04
    wrong = float((codebook.decode(codes) - x).square().mean())
    assert wrong > 2 * right


def test_second_stage_has_its_own_codes():
    codebook = make_codebook("e8p", 4)
    codes = codebook.encode(gaussian(100))
    assert codes.shape == (100, 2)
    assert not torch.equal(codes[:, 0], codes[:, 1])
    swapped = torch.stack([codes[:, 0], codes[:, 0]], dim=1)
    assert not torch.equal(codebook.decode(swapped), codebook.decode(codes))


def test_short_vectors_of_e8():
    points = e8_short_vectors()
    norms = points.square().sum(1)
    assert [int((norms == v).sum()) for v in (0, 2, 4)] == [1, 240, 15]
    assert len(torch.unique(points, dim=0)) == 256


@pytest.mark.parametrize(
    ("bits", "value"), [(1, 1 - 2 / math.pi), (2, 0.11748), (3, 0.03454), (4, 0.009497)]
)
def test_lloyd_max_error_in_closed_form(bits, value):
    levels = lloyd_max_levels(bits)
    assert gaussian_mse(levels) == pytest.approx(value, rel=1e-3)
    assert torch.equal(levels, -levels.flip(0))


def test_one_bit_lloyd_max_is_the_mean_of_the_half_normal():
    expected = math.sqrt(2 / math.pi)
    assert lloyd_max_levels(1).tolist() == pytest.approx([-expected, expected])


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e8p", 3), ("e8p", 4), ("lloyd-max", 3)])
def test_codebook_interface(name, bits):
    codebook = make_codebook(name, bits)
    assert isinstance(codebook, Codebook)
    assert sum(codebook.streams) == codebook.bits * codebook.dim
    codes = codebook.encode(gaussian(12, codebook.dim).reshape(3, 4, codebook.dim))
    assert codes.shape == (3, 4, len(codebook.streams))
    assert codebook.decode(codes).shape == (3, 4, codebook.dim)
    for index, width in enumerate(codebook.streams):
        assert 0 <= int(codes[..., index].min()) <= int(codes[..., index].max()) < 2**width


def test_no_codebook_beats_rate_distortion():
    for name in base.CODEBOOKS:
        codebook = make_codebook(name, 2)
        assert mse(codebook, codebook.opt_scale, 40_000 // codebook.dim) > 4.0**-2


def test_unknown_names_and_bits_are_refused():
    with pytest.raises(ConfigError, match="nearest: e8p"):
        make_codebook("e8q", 2)
    with pytest.raises(ConfigError, match="choose from 2, 3, 4"):
        make_codebook("e8p", 5)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_codebook("no_such_module:Thing", 2)


def test_own_codebook_by_path():
    assert make_codebook("lplr_q.codebooks.scalar:LloydMaxCodebook", 2).bits == 2


@pytest.mark.parametrize("build", [e8p_patterns, e8_short_vectors, lloyd_max_levels])
def test_tables_are_real_under_the_meta_device(build):
    """Loaders create layers on the meta device; a cached empty table would spoil the process."""
    arguments = (3,) if build is lloyd_max_levels else ()
    build.cache_clear()
    with torch.device("meta"):
        table = build(*arguments)
    assert table.device.type == "cpu"
    assert bool(torch.isfinite(table).all())
