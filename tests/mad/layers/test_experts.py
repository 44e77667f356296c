"""Mixtures of experts: routing by hand, sparse = dense = equation, balance, accounting."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.experts import MoEMLP, collect_routing, route, spread
from workbench.errors import ConfigError

VARIANTS = [
    "hyena-experts,expert_width=2,num_experts=4,filter_order=3",
    "hyena-experts,expert_width=2,num_experts=3,active=1,legacy=true,kernel=fft",
    "hyena-experts,expert_width=2,num_experts=4,filter=rtf,rtf_init=montel,filter_order=3",
    "moe-mlp,hidden=3",
    "moe-mlp,hidden=3,num_experts=4,active=4,bias=true",
]


@pytest.mark.parametrize(
    ("text", "params", "active"),
    [
        ("moe-mlp,legacy=true", 165_000, 165_000),
        ("moe-mlp", 3 * 128 * 128 + 129 * 8, 2 * 3 * 128 * 16 + 129 * 8),
        ("hyena-experts", 57_080 + 72, 57_080 + 72),
        ("hyena-experts,legacy=true", 57_080 + 72, 57_080 + 72),
    ],
)
def test_parameters_at_the_published_width(forms, text, params, active):
    cost = forms.make(text, width=128).accounting(24)
    assert (cost.params, cost.params_active) == (params, active)


def test_state_at_the_published_width(forms):
    cost = forms.make("hyena-experts", width=128).accounting(24)
    assert cost.matrix_state_floats == 128 * 16
    assert cost.state_floats == 128 * 24 + 2 * 384
    assert forms.make("moe-mlp").accounting(24).state_floats == 0


def test_operations_count_the_picked_experts_only(forms):
    two, all_ = forms.make("moe-mlp"), forms.make("moe-mlp,active=8")
    router = 2 * 16 * 8
    assert two.linear_flops_per_token() - router == (all_.linear_flops_per_token() - router) / 4
    assert forms.make("moe-mlp,legacy=true").linear_flops_per_token() == 2 * (
        16 * 8 + 16 * 256 + 128 * 128
    )


# ---------------------------------------------------------------- routing


def test_routing_by_hand():
    scores = torch.tensor([[1.0, 2.0, -5.0, 0.5]])
    weights, picked = route(scores, 2)
    e = math.exp(1)
    assert weights[0].tolist() == pytest.approx([1 / (1 + e), e / (1 + e), 0, 0])
    assert sorted(picked[0].tolist()) == [0, 1]
    # published: the others' scores become 0, so they keep e⁰/Z
    legacy, _ = route(scores, 2, legacy=True)
    z = e + e**2 + 2
    assert legacy[0].tolist() == pytest.approx([e / z, e**2 / z, 1 / z, 1 / z])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_true_routing_uses_exactly_k_and_sums_to_one(experts, active, seed):
    active = min(active, experts)
    scores = torch.randn(5, experts, generator=torch.Generator().manual_seed(seed))
    weights, _ = route(scores, active)
    assert ((weights > 0).sum(-1) == active).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    everything, _ = route(scores, experts)
    torch.testing.assert_close(everything, scores.softmax(-1))


def test_spread_by_hand():
    even = spread(torch.eye(4), 1)
    assert even.balance_loss.item() == pytest.approx(1.0)
    assert even.usage.tolist() == [0.25] * 4
    assert even.usage_entropy.item() == pytest.approx(1.0)
    # every token picks expert 0 with probability e/(e + 3)
    one = spread(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(6, 4), 1)
    assert one.balance_loss.item() == pytest.approx(4 * math.e / (math.e + 3))
    assert one.usage.tolist() == [1, 0, 0, 0]
    assert one.usage_entropy.item() == pytest.approx(0.0, abs=1e-7)
    both = spread(torch.tensor([[3.0, 2.0, 0.0, 0.0]]), 2)
    assert both.usage.tolist() == [0.5, 0.5, 0, 0]
    assert both.usage_entropy.item() == pytest.approx(0.5)


def test_balance_loss_spreads_tokens(forms):
    """Descending on it alone evens out the usage of a router that starts one-sided."""
    layer, x = forms.make("moe-mlp,active=1"), forms.noise(8, 24, 16).float()
    layer.router.bias.data[0] = 3.0
    optimiser = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    before = layer.routing(x).usage_entropy.item()
    for _ in range(60):
        optimiser.zero_grad()
        layer.routing(x).balance_loss.backward()
        optimiser.step()
    after = layer.routing(x)
    assert before < 0.3
    assert after.usage_entropy > 0.9
    assert after.balance_loss < 1.1


def test_routings_are_collected_from_every_routed_layer(forms):
    model = torch.nn.Sequential(
        forms.make("moe-mlp"), forms.make("mlp"), forms.make("hyena-experts,expert_width=2")
    )
    x = forms.noise(2, 5, 16).float()
    with collect_routing(model) as routings:
        model(x)
    assert len(routings) == 2
    torch.testing.assert_close(routings[0].balance_loss, model[0].routing(x).balance_loss)
    model(x)
    assert len(routings) == 2, "nothing is collected outside the block"


# ---------------------------------------------------------------- one form equals another


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_dispatch_is_the_dense_form(forms, length, experts, active, bias, seed):
    options = f"hidden=3,num_experts={experts},active={min(active, experts)},bias={bias}".lower()
    layers = [
        forms.make(f"moe-mlp,{options},kernel={kernel}", seed=seed).double()
        for kernel in ("dispatch", "dense")
    ]
    for layer in layers:
        if bias:
            layer.down_bias.data[:] = forms.noise(experts, 16)
    x = forms.noise(2, length, 16, seed=seed).requires_grad_()
    results = []
    for layer in layers:
        y = layer(x)
        wrt = [x, *layer.parameters()]
        results.append((y, torch.autograd.grad(y.square().sum(), wrt)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel", ["dense", "dispatch"])
def test_each_token_is_its_picked_experts(forms, kernel):
    layer = forms.make(f"moe-mlp,hidden=3,num_experts=4,kernel={kernel}").double()
    x = forms.noise(1, 6, 16)
    up = layer.up.weight.view(2, 4, 3, 16)
    for t in range(6):
        token = x[0, t]
        scores = layer.router(token)
        values, picked = scores.topk(2)
        expected = sum(
            p * (((up[0, e] @ token) * F.gelu(up[1, e] @ token)) @ layer.down[e])
            for p, e in zip(values.softmax(0), picked.tolist(), strict=True)
        )
        torch.testing.assert_close(layer(x)[0, t], expected)


def test_published_layer_by_its_equation(forms):
    layer = forms.make("moe-mlp,hidden=3,num_experts=4,legacy=true").double()
    x = forms.noise(1, 5, 16)
    a, b = layer.up(x[0]).chunk(2, dim=-1)
    z = layer.mix(a * F.gelu(b)).view(5, 16, 4)
    scores = layer.router(x[0])
    kept = torch.where(scores >= scores.topk(2, -1).values[:, 1:], scores, 0.0)
    expected = torch.einsum("te,tde->td", kept.softmax(-1), z)
    torch.testing.assert_close(layer(x)[0], expected)


def test_large_mixtures_are_dispatched_and_small_ones_are_not():
    assert not MoEMLP(8, hidden=16, num_experts=8).dispatches
    assert MoEMLP(8, hidden=64, num_experts=8).dispatches
    assert not MoEMLP(8, hidden=64, num_experts=8, kernel="dense").dispatches
    assert not MoEMLP(8, hidden=64, num_experts=8, legacy=True).dispatches


def test_experts_of_hyena_are_interleaved_channels(forms):
    layer = forms.make("hyena-experts,expert_width=2,num_experts=4").double()
    x = forms.noise(1, 5, 16)
    y = layer.convolution.mix(x)
    weights, _ = route(layer.router(x), 2)
    expected = layer.out(sum(weights[..., e, None] * y[..., e::4] for e in range(4)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("text", VARIANTS)
def test_forms(forms, text):
    forms.parallel_is_recurrent(text)
    forms.state_is_as_stated(text)
    forms.causal(text)
    forms.replicas(text)
    forms.half_precision(text)


def test_the_step_form_of_a_dispatched_layer(forms):
    forms.parallel_is_recurrent("moe-mlp,hidden=3,kernel=dispatch")


def test_only_the_published_form_has_an_unused_parameter(forms):
    x = forms.noise(1, 24, 16).float()
    for text, unused in (("moe-mlp,legacy=true", {"gates"}), ("moe-mlp", set())):
        layer = forms.make(text)
        layer(x).sum().backward()
        assert {n for n, p in layer.named_parameters() if p.grad is None} == unused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe-mlp,active=9", "choose 1 to 8"),
        ("moe-mlp,active=0", "choose 1 to 8"),
        ("moe-mlp,hidden=0", "at least 1"),
        ("moe-mlp,kernel=sparse", "expected auto, dense, dispatch"),
        ("moe-mlp,kernel=dispatch,legacy=true", "all experts weigh"),
        ("hyena-experts,active=9", "choose 1 to 8"),
        ("hyena-experts,expert_width=0", "at least 1"),
    ],
)
def test_impossible_options_are_refused(forms, text, message):
    with pytest.raises(ConfigError, match=message):
        forms.make(text)
