import copy

import pytest
import torch

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers, set_mode
from lplr_q.bits import factor_pair, layer_bits
from workbench.errors import ConfigError, DataError


def compressed(m=24, n=40, *, rotated=True, bias=False, seed=0, ft_rank=0, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    prepared = prepare_hessian(None, n, generator=generator if rotated else None)
    options = {"rounds": 1, "sweeps": 0, "inner_iterations": 1, **options}
    result = decompose(weight, prepared, generator=generator if rotated else None, **options)
    offset = torch.randn(m, generator=generator) if bias else None
    return result, LPLRQuantizedLinear.from_decomposition(result, offset, ft_rank)


FORMS = [
    {"rank": 0},
    {"rank": 3},
    {"rank": 3, "factor_bits": 16},
    {"rank": 3, "factor_bits": 3},
    {"m": 13, "rank": 3, "factor_bits": (3, 5)},
    {"rank": 2, "q_bits": 0},
    {"rank": 3, "factor_bits": (16, 3)},
    {"m": 21, "n": 13, "rank": 3, "factor_bits": (2, 16), "factor_codebook": "e8p"},
    {"q_bits": 3},
    {"q_bits": 4, "rank": 1},
    {"codebook": "lloyd-max", "q_bits": 3},
    {"rotated": False, "rank": 2},
    {"m": 13, "n": 21, "rank": 2},
    {"m": 5, "n": 172, "q_bits": 4, "bias": True},
    {"m": 3, "n": 5, "q_bits": 2},
    {"m": 1, "n": 8, "rank": 1, "bias": True},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_matrix_and_bytes(form):
    result, layer = compressed(**form)
    expected = result.dequantize()
    assert torch.equal(layer.dequantize(), expected)
    x = torch.randn(2, 3, layer.in_features)
    kept = x.clone()
    offset = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(layer(x), x @ expected.T + offset, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)
    torch.testing.assert_close(layer.set_mode("cached")(x), x @ expected.T + offset)
    assert layer.buffer_bytes() * 8 == layer.stored_bits().total == result.bits.total


@pytest.mark.parametrize("form", FORMS[:8], ids=str)
def test_state_round_trip_and_deepcopy(form):
    _, layer = compressed(**form)
    empty = LPLRQuantizedLinear.from_settings(layer.settings())
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(4, layer.in_features)
    assert torch.equal(empty(x), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.load_state_dict({k: torch.zeros_like(v) for k, v in twin.state_dict().items()})
    assert not torch.equal(twin(x), layer(x))  # nothing is shared


def test_every_tensor_is_a_buffer_or_parameter_and_none_trains():
    _, layer = compressed(rank=2, bias=True)
    named = {n for n, _ in layer.named_buffers()} | {n for n, _ in layer.named_parameters()}
    assert named == set(layer.state_dict())
    loose = {k for k, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    assert not loose
    assert not any(p.requires_grad for p in layer.parameters())


def test_casts_do_not_touch_the_codes():
    _, layer = compressed(rank=2, q_bits=4)
    expected = layer.dequantize()
    assert torch.equal(layer.half().to(torch.bfloat16).double().dequantize(), expected)
    meta = copy.deepcopy(layer).to("meta")
    assert {b.device.type for b in meta.buffers()} == {"meta"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float64, 1e-5)])
def test_output_has_the_type_of_the_input(dtype, tolerance):
    _, layer = compressed(rank=2, bias=True)
    x = torch.randn(5, layer.in_features)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    expected = layer(x)
    assert float((y.float() - expected).abs().max() / expected.abs().max()) < tolerance


def test_gradients_reach_the_input():
    _, layer = compressed(rank=2)
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad, layer.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4
    )


def test_cached_matrix_is_dropped_by_a_cast_and_a_change_of_mode():
    _, layer = compressed()
    model = torch.nn.Sequential(layer)
    set_mode(model, "cached")
    x = torch.randn(2, layer.in_features)
    first = model(x)
    assert layer._kept
    model.to(torch.float64)
    assert not layer._kept
    torch.testing.assert_close(model(x.double()).float(), first, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in quantised_layers(model)] == ["0"]


@pytest.mark.parametrize("mode", ["cached", "kernel"])
def test_what_was_kept_in_inference_mode_serves_a_backward_pass(mode):
    _, layer = compressed(rank=2)
    layer.set_mode(mode)
    with torch.inference_mode():
        layer(torch.randn(2, 40))
    x = torch.randn(2, 40, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_without_rotation_does_not_rotate():
    result, layer = compressed(rotated=False)
    assert layer.settings()["rotation_in"] == "none"
    assert torch.equal(layer.dequantize(), result.rotated())


def test_bad_forms_are_refused():
    _, layer = compressed()
    with pytest.raises(ConfigError, match="choose dequant, cached or kernel"):
        layer.set_mode("fast")
    with pytest.raises(ConfigError, match="rank=9"):
        LPLRQuantizedLinear(8, 8, rank=9)
    changed = {**layer.settings(), "rotation_in": "paley-12"}
    with pytest.raises(DataError, match="paley-12"):
        LPLRQuantizedLinear.from_settings(changed)
    state = layer.state_dict()
    state["q_codes"] = state["q_codes"][:-1]
    with pytest.raises(RuntimeError, match="q_codes"):
        layer.load_state_dict(state)


# ---------------------------------------------------------------- the part that trains


@pytest.mark.parametrize("ft_rank", [1, 3])
@pytest.mark.parametrize("factor_bits", [3, 16, (3, 5), (16, 3)])
def test_trained_components_are_parameters_and_the_rest_stays_codes(ft_rank, factor_bits):
    result, layer = compressed(rank=3, factor_bits=factor_bits, ft_rank=ft_rank)
    assert layer.lora_L.shape == (24, ft_rank)
    assert layer.lora_R.shape == (ft_rank, 40)
    assert layer.lora_L.dtype == layer.lora_R.dtype == torch.bfloat16
    torch.testing.assert_close(layer.dequantize(), result.dequantize(), rtol=2e-2, atol=2e-2)
    own = layer.buffer_bytes() * 8
    assert own == layer.stored_bits().total
    assert layer.stored_bits().factors == 16 * ft_rank * 64 + sum(
        8 * ((3 - ft_rank) * length * bits // 8 + bool((3 - ft_rank) * length * bits % 8))
        for length, bits in zip((24, 40), factor_pair(factor_bits), strict=True)
    )
    x = torch.randn(5, 40)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-5)


def test_only_what_was_asked_for_trains():
    _, layer = compressed(rank=3, ft_rank=2, bias=True)
    x = torch.randn(4, 40)
    before = layer(x)

    def trained():
        return {name for name, p in layer.named_parameters() if p.requires_grad}

    assert trained() == set()
    torch.testing.assert_close(layer.trainable()(x), before, rtol=1e-5, atol=1e-5)
    assert trained() == {"lora_L", "lora_R"}
    assert layer.lora_L.dtype == torch.float32
    assert layer.trainable(signs=True, factors=False, bias=True) is layer
    assert trained() == {"signs_in", "signs_out", "bias"}
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    layer.trainable(signs=True)
    layer(x).square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert set(gradients) == {"signs_in", "signs_out", "lora_L", "lora_R"}
    assert all(float(g.abs().sum()) > 0 for g in gradients.values())
    assert not any(b.dtype.is_floating_point for b in layer.buffers())
    layer.merge_trained()
    assert trained() == set()
    assert torch.equal(layer(x), before)  # nothing moved: +-1 are bits again
    assert layer.form.signs == "packed"


def test_gradients_are_those_of_the_dense_layer():
    _, layer = compressed(rank=3, ft_rank=2, m=24, n=40)
    layer.tile_rows = 16
    layer.trainable(signs=True)
    x = torch.randn(3, 5, 40, requires_grad=True)
    target = torch.randn(3, 5, 24)
    (layer(x) * target).sum().backward()
    found = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    twin = copy.deepcopy(layer)
    y = x.detach().clone().requires_grad_()
    for parameter in twin.parameters():
        parameter.grad = None
    (y @ twin.dequantize().T * target).sum().backward()
    expected = {"x": y.grad, **{n: p.grad for n, p in twin.named_parameters()}}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_trained_signs_and_factors_are_stored_in_sixteen_bits():
    _, layer = compressed(rank=3, ft_rank=2)
    packed = layer.stored_bits()
    layer.trainable(signs=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    x = torch.randn(4, 40)
    trained = layer(x)
    layer.merge_trained()
    torch.testing.assert_close(layer(x), trained, rtol=5e-2, atol=5e-2)
    assert layer.settings()["signs"] == "float"
    assert layer.stored_bits().signs == 16 * (24 + 40)
    assert layer.stored_bits().total - packed.total == 16 * 64 - 64
    assert layer.buffer_bytes() * 8 == layer.stored_bits().total
    again = LPLRQuantizedLinear.from_settings(layer.settings())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(copy.deepcopy(layer).to(dtype).float().dequantize(), layer.dequantize())


def test_a_step_smaller_than_the_stored_spacing_adds_up():
    _, layer = compressed(rank=2, ft_rank=2)
    start = layer.lora_L.detach().float().clone()
    layer.trainable()
    for _ in range(64):
        layer.lora_L.data += 1e-4 * start.abs()
    layer.merge_trained()
    assert float((layer.lora_L.float() - start).abs().max()) > 0


def test_training_and_a_dense_copy_exclude_each_other():
    _, layer = compressed(rank=2, ft_rank=1)
    layer.set_mode("cached")
    layer.trainable()
    assert layer.mode == "dequant"
    with pytest.raises(ConfigError, match="merge_trained"):
        layer.set_mode("kernel")
    with pytest.raises(ConfigError, match="ft_rank=3"):
        LPLRQuantizedLinear(8, 8, rank=2, ft_rank=3)


# ---------------------------------------------------------------- compiled


def compile_and_compare(layer, backend):
    torch._dynamo.reset()
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    found = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dequant", "kernel"])
def test_one_graph_without_breaks(mode):
    _, layer = compressed(m=13, n=24, rank=3, ft_rank=1, bias=True)
    compile_and_compare(layer.set_mode(mode), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, {"codebook": "tcq", "rank": 2}], ids=str)
@pytest.mark.parametrize("mode", ["dequant", "kernel", "cached"])
def test_one_graph_in_every_form(form, mode):
    compile_and_compare(compressed(**form)[1].set_mode(mode), "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_gradients_through_a_compiled_layer():
    _, layer = compressed(rank=3, ft_rank=2)
    layer.trainable(signs=True)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 40)
    layer(x).square().sum().backward()
    torch._dynamo.reset()
    torch.compile(twin, fullgraph=True, backend="inductor")(x).square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4, msg=name)


# ---------------------------------------------------------------- defects of the published code


def test_defect_a_nothing_beside_the_codes_is_lost():
    """Bias and trained parts are in the state; the model's test is in test_hf."""
    _, layer = compressed(rank=2, ft_rank=1, bias=True)
    assert {"bias", "lora_L", "lora_R", "q_codes", "q_scale"} <= set(layer.state_dict())


def test_defect_b_codes_follow_the_device():
    _, layer = compressed(rank=2, ft_rank=1, q_bits=4)
    assert {t.device.type for t in layer.to("meta").state_dict().values()} == {"meta"}
    assert layer(torch.empty(2, 40, device="meta")).shape == (2, 24)


def test_defect_4_both_stages_survive_a_move():
    _, layer = compressed(q_bits=4)
    first, second = layer.q_codes.clone(), layer.q_codes_2.clone()
    moved = copy.deepcopy(layer).to(torch.float16).to("cpu")
    assert not torch.equal(first, second)
    assert torch.equal(moved.q_codes, first)
    assert torch.equal(moved.q_codes_2, second)


def test_defect_5_three_bits_use_the_second_stage():
    result, layer = compressed(q_bits=3)
    whole = layer.dequantize()
    assert torch.equal(whole, result.dequantize())
    layer.q_codes_2.zero_()
    assert not torch.allclose(layer.dequantize(), whole)


def test_defect_6_the_rescale_divides_the_input_and_leaves_it_alone():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator) * torch.logspace(-1, 1, 40)
    second = torch.diag(torch.logspace(1, -1, 40))
    prepared = prepare_hessian(second, 40, generator=generator)
    result = decompose(weight, prepared, rank=2, rounds=1, rescale=True, generator=generator)
    layer = LPLRQuantizedLinear.from_decomposition(result)
    assert layer.form.rescaled
    assert layer.rescale.shape == (40,)
    assert torch.equal(layer.dequantize(), result.dequantize())
    x = torch.randn(3, 40)
    kept = x.clone()
    torch.testing.assert_close(layer(x), x @ result.dequantize().T, rtol=1e-4, atol=1e-3)
    assert torch.equal(x, kept)
    assert layer.buffer_bytes() * 8 == layer.stored_bits().total == result.bits.total


def test_defect_11_trained_components_are_whole_components():
    """With codes of several entries each, rows of packed codes are not rows of the factor."""
    for book in ("lloyd-max", "e8p"):
        result, layer = compressed(rank=3, factor_bits=4, factor_codebook=book, ft_rank=1)
        left, right = result.left.decode(), result.right.decode()
        torch.testing.assert_close(layer.lora_L.float(), left[:1].T, rtol=4e-3, atol=4e-3)
        torch.testing.assert_close(layer.lora_R.float(), right[:1], rtol=4e-3, atol=4e-3)
        assert torch.equal(layer.factor("l"), left[1:])
        assert torch.equal(layer.factor("r"), right[1:])


def test_defect_12_signs_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = compressed(seed=5)[1].signs()
    torch.manual_seed(2)
    second = compressed(seed=5)[1].signs()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


TRELLISES = [
    {"codebook": "tcq", "m": 24, "n": 43, "rank": 1},
    {"codebook": "tcq-8-16x16", "m": 40, "n": 32, "q_bits": 3},
    {"rank": 2, "factor_codebook": "e8p", "m": 13, "n": 21},
    {"rank": 2, "factor_codebook": "e8p", "m": 5, "n": 7},
]


@pytest.mark.parametrize("form", TRELLISES, ids=str)
def test_trellises_and_coded_factors(form):
    result, layer = compressed(**form)
    assert torch.equal(layer.dequantize(), result.dequantize())
    assert layer.buffer_bytes() * 8 == layer.stored_bits().total == result.bits.total
    x = torch.randn(3, layer.in_features)
    expected = x @ layer.dequantize().T
    for mode in ("dequant", "kernel", "cached"):
        torch.testing.assert_close(layer.set_mode(mode)(x), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_cached_and_kernel_agree_with_decoding_in_bfloat16():
    _, layer = compressed(m=64, n=64, rank=4)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    expected = layer(x).float()
    for mode in ("kernel", "cached"):
        found = layer.set_mode(mode)(x).float()
        assert float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("ft_rank", [0, 2, 3])
@pytest.mark.parametrize("signs", ["packed", "float"])
@pytest.mark.parametrize("book", ["lloyd-max", "e8p"])
def test_the_layer_counts_as_the_formula_does(ft_rank, signs, book):
    form = {"rank": 3, "codebook": "tcq", "ft_rank": ft_rank, "factor_codebook": book}
    layer = LPLRQuantizedLinear(40, 24, rescaled=True, signs=signs, **form)
    counted = layer_bits(24, 40, rescaled=True, float_signs=signs == "float", **form)
    assert layer.stored_bits() == counted
    assert layer.buffer_bytes() * 8 == counted.total
