import copy

import pytest
import torch

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers, set_mode
from workbench.errors import ConfigError, DataError


def compressed(m=24, n=40, *, rotated=True, bias=False, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    prepared = prepare_hessian(None, n, generator=generator if rotated else None)
    options = {"rounds": 1, "sweeps": 0, "inner_iterations": 1, **options}
    result = decompose(weight, prepared, generator=generator if rotated else None, **options)
    offset = torch.randn(m, generator=generator) if bias else None
    return result, LPLRQuantizedLinear.from_decomposition(result, offset)


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
    assert layer._dense is not None
    model.to(torch.float64)
    assert layer._dense is None
    torch.testing.assert_close(model(x.double()).float(), first, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in quantised_layers(model)] == ["0"]


def test_a_layer_without_rotation_does_not_rotate():
    result, layer = compressed(rotated=False)
    assert layer.settings()["rotation_in"] == "none"
    assert torch.equal(layer.dequantize(), result.rotated())


def test_bad_forms_are_refused():
    _, layer = compressed()
    with pytest.raises(ConfigError, match="choose dequant or cached"):
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
