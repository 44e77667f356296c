"""Layers: published parameter counts, causality, and equality of every pair of forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.attention import Attention, attend_eager, attend_sdpa, rotate
from mad.layers.hyena import (
    Hyena,
    MultiHeadHyena,
    convolve_fft,
    convolve_toeplitz,
    mix_heads_fft,
    mix_heads_toeplitz,
    toeplitz,
)
from mad.layers.linear_attention import (
    LinearAttention,
    build_feature_map,
    linear_attention_parallel,
    linear_attention_recurrent,
)
from mad.layers.options import AttentionOptions
from mad.registry import LAYERS, LayerSpec, parse_layer, stack_name
from workbench.errors import ConfigError

MAX_LENGTH = 128
FEATURE_MAPS = [
    "elementwise_product",
    "elu",
    "relu",
    "identity",
    "hedgehog",
    "t2r",
    "dpfp",
    "taylor",
]


def make(text: str, width: int = 32, max_length: int = 24, seed: int = 0) -> torch.nn.Module:
    """A layer with its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return parse_layer(text).make(width, max_length)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers from their own seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("name", "params", "state"),
    [
        ("mlp", 131_072, 0),
        ("swiglu", 135_168, 0),
        ("attention", 66_048, 2 * 128 * 128),
        ("mh-attention", 66_048, 2 * 128 * 128),
        ("sliding-attention", 66_048, 2 * 33 * 128),
        ("mh-sliding-attention", 66_048, 2 * 33 * 128),
        ("mh-linear-attention", 65_824, 1_024),
        ("linear-attention", 131_584, 16_384),
        ("hyena", 123_964 + 3 * MAX_LENGTH, 2_048),
        ("mh-hyena", 30_478 + 3 * MAX_LENGTH, 4_096),
    ],
)
def test_accounting_equals_the_published_counts_and_the_parameters(name, params, state):
    layer = make(name, width=128, max_length=MAX_LENGTH)
    cost = layer.accounting(MAX_LENGTH)
    assert cost.params == sum(p.numel() for p in layer.parameters()) == params
    assert cost.matrix_state_floats == state
    assert cost.flops_per_token >= 2 * sum(
        m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear)
    )


def test_attention_operations_count_the_keys_in_reach():
    full, windowed = make("attention", width=8), make("attention,window=1", width=8)
    # positions 0..3 see 1, 2, 3, 4 keys (mean 2.5), or 1, 2, 2, 2 (mean 1.75) in a window
    assert full.mixing_flops_per_token(4) == 4 * 8 * 2.5
    assert windowed.mixing_flops_per_token(4) == 4 * 8 * 1.75


# ---------------------------------------------------------------- attention


@given(
    st.integers(1, 17),
    st.one_of(st.none(), st.integers(0, 20)),
    st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_fused_attention_is_the_eager_one(length, window, seed):
    q, k, v = noise(3, 2, 2, length, 4, seed=seed, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(attend_sdpa(q, k, v, window), attend_eager(q, k, v, window))


def test_eager_attention_by_hand():
    v = torch.tensor([[1.0], [2.0], [6.0]]).view(1, 1, 3, 1)
    zero = torch.zeros(1, 1, 3, 1)  # equal scores: the mean of what is in reach
    assert attend_eager(zero, zero, v).flatten().tolist() == pytest.approx([1.0, 1.5, 3.0])
    assert attend_eager(zero, zero, v, window=1).flatten().tolist() == pytest.approx([1, 1.5, 4])
    assert attend_eager(zero, zero, v, window=0).flatten().tolist() == pytest.approx([1, 2, 6])


def test_window_of_the_whole_length_is_full_attention():
    full, windowed = make("attention"), make("attention,window=19")
    narrow = make("attention,window=18")
    x = noise(2, 20, 32)
    torch.testing.assert_close(full(x), windowed(x))
    assert not torch.allclose(full(x)[:, -1], narrow(x)[:, -1], atol=1e-6)


def test_rotation_depends_on_distance_only_and_keeps_length():
    q, k = noise(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)
    q, k = (rotate(part.expand(1, 1, 12, 8), 6) for part in (q, k))
    scores = (q @ k.transpose(-1, -2))[0, 0]
    for offset in (-3, 0, 5):
        along = scores.diagonal(offset)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.norm(dim=-1)[..., 1:], q.norm(dim=-1)[..., :1].expand(1, 1, 11))


def test_rotation_by_hand():
    x = torch.tensor([1.0, 0.0, 5.0]).expand(1, 1, 2, 3)
    turned = rotate(x, 2)[0, 0]
    angle = torch.tensor(1.0)
    assert turned[0].tolist() == [1.0, 0.0, 5.0]
    assert turned[1].tolist() == pytest.approx([angle.cos().item(), angle.sin().item(), 5.0])


# ---------------------------------------------------------------- linear attention


@given(st.integers(1, 19), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_parallel_linear_attention_is_the_recurrence(length, seed):
    q, k, v = (
        noise(2, 2, length, n, seed=seed + n, dtype=torch.float64).requires_grad_()
        for n in (5, 5, 3)
    )
    q = q.detach().requires_grad_()
    fast, slow = (f(q, k, v) for f in (linear_attention_parallel, linear_attention_recurrent))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(fast.square().sum(), (q, k, v)),
        torch.autograd.grad(slow.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_taylor_map_is_the_second_order_exponential():
    phi = build_feature_map("taylor", 6)
    q, k = noise(2, 10, 6, dtype=torch.float64).unbind(0)
    s = (q * k).sum(-1) / 6**0.5
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 1 + s + s**2 / 2)
    assert phi.size == phi(q).shape[-1] == 1 + 6 + 21


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_feature_maps_state_their_size(kind):
    phi = build_feature_map(kind, 6)
    y = phi(noise(4, 6))
    assert y.shape == (4, phi.size)
    if kind in ("elu", "relu", "hedgehog", "t2r", "dpfp"):
        assert (y >= 0).all(), "a normaliser of non-negative features never changes sign"


def test_feature_maps_by_hand():
    x = torch.tensor([[1.0, -2.0]])
    assert build_feature_map("elu", 2)(x)[0].tolist() == pytest.approx([2.0, 0.1353353], abs=1e-6)
    hedgehog = build_feature_map("hedgehog", 2)
    torch.nn.init.zeros_(hedgehog.map.bias)
    expected = torch.tensor([2.0, -4.0, -2.0, 4.0]).softmax(0)
    torch.testing.assert_close(hedgehog(x)[0], expected)
    # u = [1, 0, 0, 2]; rolled by 1..4: [2,1,0,0], [0,2,1,0], [0,0,2,1], itself
    dpfp = build_feature_map("dpfp", 2)(x)[0].tolist()
    assert dpfp == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 4]


def test_sum_normalised_linear_attention_averages():
    """With equal values at all positions a normalised mixer returns that value."""
    layer = LinearAttention(8, num_heads=2, feature_map="elu", normalize="sum")
    torch.nn.init.eye_(layer.out.weight)
    x = noise(1, 1, 8).expand(1, 6, 8)
    y = layer(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    torch.testing.assert_close(y[0, 0], layer.qkv(x)[0, 0, 16:])


# ---------------------------------------------------------------- hyena


def test_toeplitz_by_hand():
    matrix = toeplitz(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    assert matrix.tolist() == [[1, 0, 0], [2, 1, 0], [3, 2, 1]]


@given(st.integers(1, 33), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_fft_is_toeplitz(length, seed):
    u, h = noise(2, 3, length, seed=seed), noise(3, length, seed=seed + 1)
    a, b = convolve_fft(u, h), convolve_toeplitz(u, h)
    assert (a - b).abs().max() <= 1e-6 * max(1.0, float(b.abs().max()))
    x1, x2, v = noise(3, 2, 3, length, 4, seed=seed).unbind(0)
    a, b = mix_heads_fft(x1, x2, v, h), mix_heads_toeplitz(x1, x2, v, h)
    assert (a - b).abs().max() <= 1e-6 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("text", ["hyena", "mh-hyena,num_heads=4"])
def test_both_forms_have_the_same_gradients(text):
    x = noise(2, 20, 32)
    gradients = []
    for kernel in ("fft", "toeplitz"):
        layer = make(f"{text},kernel={kernel}").double()
        loss = layer(x.double()).square().sum()
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [Hyena, MultiHeadHyena])
def test_hyena_with_a_delta_filter_is_gates_on_a_short_convolution(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = kind(16, 12, **({"num_heads": 4} if kind is MultiHeadHyena else {}))
    torch.nn.init.zeros_(layer.filter.out.weight)  # h = b at tap 0 and nothing after it
    x = noise(2, 12, 16)
    x1, x2, v = layer.project(x)
    if kind is Hyena:
        expected = layer.out(x1 * x2 * v * layer.filter.bias)
    else:
        groups = [part.unflatten(-1, (4, 4)) for part in (x1, x2, v)]
        inner = (groups[0] * groups[2]).sum(-1, keepdim=True)  # x₁·v within each group
        expected = layer.out((inner * groups[1] * layer.filter.bias[:, None]).flatten(-2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-6)


def test_projection_is_tiled_and_filtered_causally():
    project = make("hyena", width=8).project
    torch.nn.init.zeros_(project.bias)
    x = noise(1, 5, 8)
    p = project.map(x)  # 3·32/4 = 24 channels
    x1, x2, v = project(x)
    for j, stream in ((0, x1[..., 0]), (33, x2[..., 1]), (95, v[..., 31])):
        shared = p[0, :, j % 24]
        w = project.taps[:, j]
        expected = w[2] * shared[3] + w[1] * shared[2] + w[0] * shared[1]
        torch.testing.assert_close(stream[0, 3], expected)


def test_filter_follows_its_equation():
    layer = make("mh-hyena,num_heads=4", width=16, max_length=10).filter
    t, c = 6, 2
    z = layer.positions[t]
    tau = t / 9
    angle = torch.tensor(1e-4 * 2 * torch.pi * t / 10)
    torch.testing.assert_close(z, torch.stack([torch.tensor(tau), angle.cos(), -angle.sin()]))
    for linear in layer.hidden:
        z = torch.sin(layer.frequency * linear(z))
    rates = torch.linspace(3.0701135, 15.350567, 4)
    expected = (layer.out.weight[c] @ z) * torch.exp(-tau * rates[c])
    torch.testing.assert_close(layer(8)[c, t], expected)
    torch.testing.assert_close(layer(8), layer(10)[:, :8])


# ---------------------------------------------------------------- names and options


class Shift(torch.nn.Module):
    """A user's own layer: the position before, scaled."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((width,), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shift by one."""
        return self.scale * torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def test_a_users_layer_is_reached_through_the_registry(monkeypatch):
    monkeypatch.setattr("mad.layers.channel.Shift", Shift, raising=False)
    layer = parse_layer("mad.layers.channel:Shift,scale=3.0").make(4, 9)
    assert layer(torch.ones(1, 2, 4))[0].tolist() == [[0.0] * 4, [3.0] * 4]
    windowed = LayerSpec(LAYERS["attention"].build, "W", "sequence", AttentionOptions(window=2))
    monkeypatch.setitem(LAYERS, "window", windowed)
    assert isinstance(parse_layer("window").make(8, 9), Attention)
    assert stack_name(("window", "mlp")) == "W-M"


def test_stack_names():
    assert stack_name(("mh-attention", "swiglu") * 2) == "mA-Sg x2"
    assert stack_name(("mlp",)) == "M"
    assert stack_name(("mh-attention,num_heads=4", "mlp", "hyena")) == "mA(num_heads=4)-M-H"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atention", "nearest: attention"),
        ("attention,heads=2", "nearest: num_heads"),
        ("attention,num_heads", "option=value"),
        ("attention,num_heads=two", "should be of type int"),
        ("mh-attention,bias=1", "should be of type bool"),
        ("nowhere.module:Layer", "cannot be loaded"),
        ("mad.layers.channel:Nothing", "cannot be loaded"),
        ("mad.layers.channel:MLP,depth=3", "option of layer"),
    ],
)
def test_bad_layer_texts_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layer(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention,num_heads=3", "not divisible by num_heads=3"),
        ("attention,num_heads=0", "not divisible"),
        ("mh-attention,rotary_dim=4", "rotary_dim=4 must be even and at most the head width 2"),
        ("attention,rotary_dim=3", "must be even"),
        ("attention,window=-1", "negative"),
        ("linear-attention,feature_map=rely", "nearest: relu"),
        ("hyena,proj_groups=7", "does not divide"),
        ("mh-hyena,num_heads=5", "not divisible"),
    ],
)
def test_impossible_options_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        make(text, width=32)


def test_hyena_refuses_a_sequence_longer_than_its_filters():
    with pytest.raises(ConfigError, match="max_length=24"):
        make("hyena")(noise(1, 25, 32))
