import copy

import pytest
import torch

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers, set_mode
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
    {"rank": 2, "q_bits": 0},
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


@pytest.mark.parametrize("form", FORMS[:5], ids=str)
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
@pytest.mark.parametrize("factor_bits", [3, 16])
def test_trained_components_are_parameters_and_the_rest_stays_codes(ft_rank, factor_bits):
    result, layer = compressed(rank=3, factor_bits=factor_bits, ft_rank=ft_rank)
    assert layer.lora_L.shape == (24, ft_rank)
    assert layer.lora_R.shape == (ft_rank, 40)
    assert layer.lora_L.dtype == layer.lora_R.dtype == torch.bfloat16
    torch.testing.assert_close(layer.dequantize(), result.dequantize(), rtol=2e-2, atol=2e-2)
    own = layer.buffer_bytes() * 8
    assert own == layer.stored_bits().total
    assert layer.stored_bits().factors == 16 * ft_rank * 64 + sum(
        8
        * (
            (3 - ft_rank) * length * factor_bits // 8
            + bool((3 - ft_rank) * length * factor_bits % 8)
        )
        for length in (24, 40)
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
