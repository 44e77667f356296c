"""Linear attention: three forms of one sum, feature maps, normalisers; Based on top of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.linear_attention import (
    FEATURE_MAPS,
    LinearAttention,
    build_feature_map,
    linear_attention_chunked,
    linear_attention_parallel,
    linear_attention_recurrent,
    prefers_chunks,
)
from workbench.errors import ConfigError

VARIANTS = [
    *(f"mh-linear-attention,num_heads=4,feature_map={kind}" for kind in FEATURE_MAPS),
    "linear-attention",
    "linear-attention,form=chunked,chunk=4",
    "linear-attention,feature_map=elu,normalize=sum,form=chunked,chunk=5",
    "mh-linear-attention,num_heads=2,feature_map=taylor,normalize=sum,key_width=3",
    "linear-attention,feature_map=relu,norm_q=true,norm_k=true,normalize=sum",
    "mh-linear-attention,num_heads=4,tie=true",
    "based,num_heads=2,feature_width=3,window=2",
]


@pytest.mark.parametrize(
    ("text", "params", "state"),
    [
        ("mh-linear-attention", 65_824, 1_024),
        ("linear-attention", 131_584, 16_384),
        ("mh-linear-attention,tie=true", 65_536 + 144, 1_024),
        ("mh-linear-attention,feature_map=elu,normalize=sum", 65_536, 1_024),
        ("mh-linear-attention,feature_map=learnable_outer_product", 65_536 + 256, 16 * 36 * 8),
        ("mh-linear-attention,feature_map=rebased", 65_536 + 32, 16 * 36 * 8),
        ("based", 6 * 128**2 + 4 * 128 + 2 * 128 * 64, 4 * 153 * 32 + 2 * 128 * 65),
    ],
)
def test_parameters_and_matrix_state_at_the_published_width(forms, text, params, state):
    cost = forms.make(text, width=128).accounting(128)
    assert (cost.params, cost.matrix_state_floats) == (params, state)


def test_rebased_kernel_is_a_square():
    phi = build_feature_map("rebased", 5).double()
    phi.scale.data = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    phi.shift.data += 0.3
    x = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * phi.scale + phi.shift
    s = (y[0] * y[1]).sum(-1)
    torch.testing.assert_close((phi(x[0]) * phi(x[1])).sum(-1), s**2 / 5)


def test_outer_product_map_by_hand():
    phi = build_feature_map("learnable_outer_product", 2)
    phi.left.weight.data = torch.eye(2)
    phi.right.weight.data = torch.tensor([[0.0, 1.0], [10.0, 0.0]])
    # left [a, b], right [b, 10a]: upper triangle ab, 10a², 10ab
    assert phi(torch.tensor([[2.0, 3.0]]))[0].tolist() == [6.0, 40.0, 60.0]


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_feature_maps_state_their_size(kind):
    phi = build_feature_map(kind, 6)
    assert phi(torch.ones(4, 6)).shape == (4, phi.size)


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_chunks_and_the_masked_product_are_the_recurrence(forms, length, chunk, seed):
    q, k = (forms.noise(2, 2, length, 5, seed=seed + n).requires_grad_() for n in (0, 20))
    v = forms.noise(2, 2, length, 3, seed=seed + 40).requires_grad_()
    slow = linear_attention_recurrent(q, k, v)
    forms.same(linear_attention_parallel(q, k, v), slow, (q, k, v))
    forms.same(linear_attention_chunked(q, k, v, chunk), slow, (q, k, v))
    single = [part.detach().float() for part in (q, k, v)]
    torch.testing.assert_close(
        linear_attention_chunked(*single, chunk), slow.float(), rtol=1e-4, atol=1e-4
    )


def test_chunks_are_chosen_where_they_need_fewer_multiplications():
    assert not prefers_chunks(64, 8, 8, 64)  # one chunk is the whole
    assert prefers_chunks(128, 8, 8, 64)  # 64·16 + 2·64 = 1152 < 128·16
    assert not prefers_chunks(128, 8385, 128, 64)  # the state is larger than the row
    assert prefers_chunks(512, 8385, 128, 64)


def test_auto_takes_the_chunks_for_long_rows(forms, monkeypatch):
    layer, x = (
        forms.make("mh-linear-attention,num_heads=4,chunk=4").double(),
        forms.noise(1, 20, 16),
    )
    expected = layer(x)
    monkeypatch.setattr("mad.layers.linear_attention.linear_attention_parallel", None)
    assert torch.equal(layer(x), expected)
    layer.form = "parallel"
    with pytest.raises(TypeError):
        layer(x)


def test_sum_normaliser_is_the_published_quotient(forms):
    layer = forms.make("linear-attention,feature_map=elu,normalize=sum,norm_k=true").double()
    x = forms.noise(1, 6, 16)
    q, k, v = layer.qkv(x)[0].chunk(3, dim=-1)
    phi = torch.nn.functional.elu(k) + 1  # a norm of q would cancel in the quotient
    k, q = phi / (phi.sum(-1, keepdim=True) + 1e-4), torch.nn.functional.elu(q) + 1
    rows = []
    for i in range(6):
        weights = k[: i + 1] @ q[i]
        rows.append(weights @ v[: i + 1] / (weights.sum() + 1e-12))
    torch.testing.assert_close(layer(x)[0], layer.out(torch.stack(rows)), rtol=1e-9, atol=1e-12)


def test_feature_norms_divide_by_the_sum(forms):
    plain, normed = (
        forms.make(f"linear-attention,feature_map=elu{options}").double()
        for options in ("", ",norm_q=true,norm_k=true")
    )
    x = forms.noise(1, 3, 16)
    pairs = (layer._features(*layer._heads(x))[:2] for layer in (plain, normed))
    for before, after in zip(*pairs, strict=True):
        torch.testing.assert_close(after, before / (before.sum(-1, keepdim=True) + 1e-4))


def test_a_tied_map_serves_keys_too(forms):
    tied, own = (LinearAttention(16, num_heads=2, tie=tie) for tie in (True, False))
    missing = own.load_state_dict(tied.state_dict(), strict=False).missing_keys
    assert missing == [f"map_k.{name}" for name, _ in own.map_q.named_parameters()]
    own.map_k.load_state_dict(own.map_q.state_dict())
    x = forms.noise(1, 5, 16).float()
    torch.testing.assert_close(tied(x), own(x))


def test_sums_stay_in_single_precision_under_autocast(forms):
    layer, x = forms.make("mh-linear-attention,num_heads=4"), forms.noise(2, 9, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        _, state = layer.step(x[:, 0], layer.initial_state(2))
        assert state["sums"].dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.05)


def test_based_is_the_sum_of_its_parts(forms):
    layer, x = forms.make("based,num_heads=2,window=3").double(), forms.noise(2, 9, 16)
    torch.testing.assert_close(layer(x), layer.taylor(x) + layer.window(x))
    assert layer.taylor.map_q.size == 153
    assert layer.taylor.normalize == "sum"
    assert layer.kv_bytes(9) == 2 * 2 * 16 * 4


@pytest.mark.parametrize("text", VARIANTS)
def test_forms(forms, text):
    forms.parallel_is_recurrent(text)
    forms.state_is_as_stated(text)
    forms.causal(text)
    forms.replicas(text)
    forms.half_precision(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear-attention,feature_map=rebase", "nearest: rebased"),
        ("linear-attention,normalize=none", "should be of type str|expected rms or sum"),
        ("linear-attention,normalize=mean", "expected rms or sum"),
        ("linear-attention,form=quadratic", "expected auto, parallel, chunked"),
        ("linear-attention,chunk=0", "must be positive"),
        ("based,num_heads=3", "not divisible"),
        ("based,window=-2", "negative"),
        ("based,feature_width=0", "must be positive"),
    ],
)
def test_impossible_options_are_refused(forms, text, message):
    with pytest.raises(ConfigError, match=message):
        forms.make(text)
