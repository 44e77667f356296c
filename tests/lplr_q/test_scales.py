"""Scales of Q per row and per group of columns, from rounding to a model on disk."""

import copy

import pytest
import torch

from lplr_q import native
from lplr_q.activation_aware.dataclasses import LPLRParams
from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.layer_state import Form
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from lplr_q.bits import layer_bits
from lplr_q.codebooks.base import make_codebook
from lplr_q.hf import save_compressed, storage_report
from lplr_q.kernels import cpu, dispatch
from lplr_q.linalg.ldl import block_ldl
from lplr_q.linalg.ldlq import CodebookBlocks, guarded_sweep, ldlq, reference_ldlq, weighted_loss
from lplr_q.linalg.scales import RowScales, ScaledBlocks, row_scales, scale_width
from lplr_q.quantize_model import CompressionSettings
from lplr_q.quantize_save import Experiment, Parameters, settings_of
from lplr_q.settings import candidates, settings_for
from tests.lplr_q.test_hf import compress, logits
from workbench.errors import ConfigError
from workbench.models import load_model
from workbench.tiny import byte_tokenizer

GROUPS = [-1, 16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uneven(m, n, *, seed=0):
    """A weight whose rows and groups of eight columns differ by factors up to 25 and 5; H."""
    generator = seeded(seed)
    weight = torch.randn(m, n, generator=generator)
    weight *= torch.logspace(-0.7, 0.7, m)[torch.randperm(m, generator=generator)][:, None]
    weight *= torch.logspace(0.4, -0.3, -(-n // 8)).repeat_interleave(8)[:n]
    x = torch.randn(3 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return weight, (x.T @ x / (3 * n)).double()


def decomposed(q_group, m=40, n=48, *, rotated=False, **options):
    weight, hessian = uneven(m, n)
    generator = seeded()
    prepared = prepare_hessian(hessian, n, generator=generator if rotated else None)
    options = {"rounds": 1, "rank": 0, **options}
    return (
        weight,
        prepared,
        decompose(weight, prepared, generator=generator, q_group=q_group, **options),
    )


def layer_of(q_group, **options):
    *_, result = decomposed(q_group, **options)
    return result, LPLRQuantizedLinear.from_decomposition(result)


# ---------------------------------------------------------------- scales and rounding


def test_scales_are_the_rms_of_their_weights():
    weight, _ = uneven(5, 43)
    for width, count in ((43, 1), (16, 3), (64, 1)):
        found = row_scales(weight, width, 0.9)
        assert found.patterns.shape == (5, count)
        parts = weight.split(width, dim=1)
        expected = torch.stack([p.square().mean(1).sqrt() for p in parts], 1) / 0.9
        torch.testing.assert_close(found.values(), expected, rtol=2**-8, atol=0)
        spread = found.spread().expand(5, 43)
        assert torch.equal(spread[:, 0], found.values()[:, 0])
        assert torch.equal(spread[:, -1], found.values()[:, -1])
        assert torch.equal(found.times(2.0**-90).values(), found.values() * 2.0**-90)
        assert torch.equal(found[1:3].values(), found.values()[1:3])


def test_empty_groups_and_rows_have_a_scale_within_reach():
    weight = torch.zeros(2, 32)
    weight[0, :16] = 1
    found = row_scales(weight, 16).values()
    assert found[0].tolist() == pytest.approx([1, 0.5**0.5 / 64], rel=2**-8)
    assert float(found[1].max()) < 1e-19
    *_, result = decomposed(16, m=2, n=32)
    assert torch.isfinite(result.dequantize()).all()
    prepared = prepare_hessian(None, 32, generator=None)
    dense = decompose(weight, prepared, q_group=16, rounds=1).dequantize()
    assert float((dense - weight)[1].abs().max()) < 1e-18


@pytest.mark.parametrize(
    ("name", "m", "n"), [("e8p", 9, 43), ("tcq", 40, 48), ("lloyd-max", 7, 30)]
)
@pytest.mark.parametrize("width", [16, 1000])
def test_ldlq_with_scales_is_the_plain_form_and_its_loss_that_of_the_local_errors(
    name, m, n, width
):
    """tr(E H E^T) = sum of tr(eta_k D_k eta_k^T) in the domain of W."""
    weight, hessian = uneven(m, n)
    hessian = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(n).double()
    book = make_codebook(name, 2)
    scales = row_scales(weight, width)
    blocks = ScaledBlocks(CodebookBlocks(book, n), scales)
    factors = block_ldl(hessian, book.dim)
    lower = factors.lower
    wide = weight.double()
    codes, points = ldlq(wide, lower, blocks, buffer=16)
    for a, b in zip(codes, reference_ldlq(wide, lower, blocks)[0], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(blocks.decode(codes).double(), points, rtol=1e-5, atol=1e-6)
    eta = (wide - points) @ lower
    local = sum(
        weighted_loss(eta[:, low:high].contiguous(), middle)
        for (low, high), middle in zip(factors.bounds, factors.diagonal, strict=True)
    )
    assert weighted_loss(wide - points, hessian) == pytest.approx(local, rel=1e-9)
    swept_codes, swept = guarded_sweep(wide, hessian, blocks, codes, points)
    assert weighted_loss(wide - swept, hessian) <= weighted_loss(wide - points, hessian)
    torch.testing.assert_close(blocks.decode(swept_codes).double(), swept, rtol=1e-5, atol=1e-6)


def test_equal_scales_round_as_one_scale_does():
    """A power of two for every row: the codes of W / s in both domains."""
    weight, hessian = uneven(6, 40)
    lower = block_ldl(hessian, 8).lower
    blocks = CodebookBlocks(make_codebook("e8p", 2), 40)
    patterns = torch.full((6, 1), 0.5).to(torch.bfloat16).view(torch.int16)
    codes, points = ldlq(weight, lower, ScaledBlocks(blocks, RowScales(patterns, 40, 40)))
    plain, unit = ldlq(weight / 0.5, lower, blocks)
    assert all(torch.equal(a, b) for a, b in zip(codes, plain, strict=True))
    assert torch.equal(points, unit * 0.5)


# ---------------------------------------------------------------- decompositions and layers

FORMS = [
    {},
    {"codebook": "tcq"},
    {"n": 43, "rank": 3},
    {"m": 70, "codebook": "lloyd-max", "q_bits": 3, "rank": 2},
    {"rotated": True, "rank": 3, "q_bits": 4, "refinements": 1},
    {"scale_search": True},
    {"rescale": True, "rotated": True},
    {"feedback": False},
    {"q_hessian": "downdate", "rank": 4, "rounds": 2},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("q_group", GROUPS)
def test_layer_is_the_dequantised_matrix_in_every_mode_and_byte(q_group, form):
    weight, prepared, result = decomposed(q_group, **form)
    layer = LPLRQuantizedLinear.from_decomposition(result)
    expected = result.dequantize()
    assert torch.equal(layer.dequantize(), expected)
    x = torch.randn(2, 3, layer.in_features, generator=seeded(1))
    size = float((x @ expected.T).abs().max())
    for mode in ("dequant", "kernel", "cached"):
        found = layer.set_mode(mode)(x)
        torch.testing.assert_close(found, x @ expected.T, rtol=1e-4, atol=1e-5 * size)
    layer.set_mode("dequant").tile_rows = 64
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-5 * size)
    assert layer.buffer_bytes() * 8 == layer.stored_bits().total == result.bits.total
    m, n = result.shape
    assert result.bits.scales >= 16 * m * (1 if q_group == -1 else -(-n // 16))
    if not form.get("rescale"):
        hessian = prepared.matrix
        if prepared.signs_in is None:
            error = weight.double() - expected
            ratio = weighted_loss(error, hessian) / weighted_loss(weight.double(), hessian)
            assert ratio**0.5 == pytest.approx(result.error, rel=1e-4)


def test_rows_of_different_size_are_rounded_better():
    one, row, group = (decomposed(g, codebook="tcq")[2] for g in (0, -1, 16))
    assert row.frobenius < 0.9 * one.frobenius
    assert group.frobenius < 0.95 * row.frobenius
    assert group.error < row.error < one.error


@pytest.mark.skipif(native.library(cpu.SOURCE) is None, reason="no compiled kernels")
@pytest.mark.parametrize("codebook", ["e8p", "tcq"])
def test_scales_per_row_go_through_the_compiled_product(codebook):
    result, layer = layer_of(-1, codebook=codebook)
    codes, tail = layer.codes("q")
    form = (codebook, 2, 40)
    x = torch.randn(3, 48, generator=seeded(1))
    found = dispatch.gemv(x, codes, tail, layer.q_scale, *form, -1)
    torch.testing.assert_close(found, x @ result.q_matrix().T, rtol=1e-4, atol=1e-3)
    other, grouped = layer_of(16, codebook=codebook)
    codes, tail = grouped.codes("q")
    assert dispatch.gemv(x, codes, tail, grouped.q_scale, *form, 16) is None
    assert other.q_group == 16
    assert "torch decodes" in dispatch.status(torch.device("cpu"), grouped=True)


@pytest.mark.parametrize("q_group", GROUPS)
def test_gradients_compile_and_copies(q_group):
    _, layer = layer_of(q_group, rank=2, rotated=True)
    x = torch.randn(3, 48, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (slope,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)
    twin = LPLRQuantizedLinear.from_settings(layer.settings())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.dequantize(), layer.dequantize())


def test_one_scale_is_stored_as_it_always_was():
    _, layer = layer_of(0)
    assert layer.q_scale.dtype == torch.int32
    assert layer.q_scale.shape == (1,)
    assert "q_group" not in layer.settings()
    assert "q_group" not in CompressionSettings().record()


def test_magnitude_is_exact():
    """Weights times a power of two: the same codes, scales times that power."""
    weight, hessian = uneven(16, 32)
    prepared = prepare_hessian(hessian, 32, generator=None)
    results = [decompose(weight * p, prepared, q_group=8, rounds=1) for p in (1.0, 2.0**-60)]
    assert torch.equal(results[0].q_scales.values() * 2.0**-60, results[1].q_scales.values())
    assert all(torch.equal(*pair) for pair in zip(*(r.q_codes for r in results), strict=True))


@pytest.mark.parametrize("q_group", GROUPS)
def test_reloaded_logits_and_bits_in_the_files(tmp_path, q_group):
    chosen = CompressionSettings(
        bits=3.4, rounds=1, inner_iterations=1, sweeps=0, q_bits=2, q_group=q_group
    )
    _, compressed = compress("mistral", chosen)
    save_compressed(compressed, byte_tokenizer(), tmp_path)
    loaded, _ = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(compressed))
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.form.q_group == q_group
    assert storage_report(tmp_path)["bits_per_weight"] <= 3.4


# ---------------------------------------------------------------- settings


def test_budgets_count_the_scales():
    pairs = [
        candidates(128, 256, CompressionSettings(bits=2.6, q_bits=2, q_group=g))[0]
        for g in (0, -1, 64)
    ]
    ranks = [rank for _, rank in pairs]
    assert ranks[0] > ranks[1] > ranks[2]
    assert layer_bits(128, 256, rank=ranks[2], q_group=64).per_weight <= 2.6
    assert layer_bits(128, 256, rank=ranks[2] + 1, q_group=64).per_weight > 2.6
    params = LPLRParams(target_bpw=2.6, L_bits=4, R_bits=4, hadamard_transform=True, q_group=64)
    assert params.rank_for((128, 256)) == ranks[2]
    assert params.to_settings()["q_group"] == 64
    e = Experiment(params=Parameters(q_group=-1, rank=4))
    assert settings_of(e).q_group == -1


def test_groups_that_cannot_be_are_refused():
    assert scale_width(24, 40, 8) == 24
    for wrong in (12, -2):
        with pytest.raises(ConfigError, match="a multiple of 8"):
            decomposed(wrong)
        with pytest.raises(ConfigError, match=f"q_group={wrong}"):
            Form(48, 40, q_group=wrong)
    with pytest.raises(ConfigError, match="one scale per matrix"):
        CompressionSettings(method="quip-sharp", q_group=-1)
    with pytest.raises(ConfigError, match="one scale per matrix"):
        LPLRParams(method="quip-sharp", q_group=-1)
    with pytest.raises(ConfigError, match="with an allocation"):
        settings_for("a", CompressionSettings(q_group=-1), {"modules": {"a": {}}})
