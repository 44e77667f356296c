"""RWKV-7: the chunked form is the recurrence; special cases are known rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.delta import delta_rule_recurrent, unit
from mad.layers.rwkv7 import (
    STRONGEST_DECAY,
    generalised_delta_chunked,
    generalised_delta_recurrent,
)
from workbench.errors import ConfigError


def draw(length, seed=0, dtype=torch.float64, decay=None, head=5, value=3):
    """r, log w, k, v, κ, a for two rows of two heads; `decay` fixes −log w in all channels."""
    rng = torch.Generator().manual_seed(seed)
    shape = 2, 2, length
    r, k, removal, pace, rate = (
        torch.randn(*shape, head, generator=rng, dtype=dtype) for _ in range(5)
    )
    v = torch.randn(*shape, value, generator=rng, dtype=dtype)
    log_decay = -STRONGEST_DECAY * pace.sigmoid()
    if decay is not None:
        log_decay = torch.full_like(log_decay, -decay)
    parts = (r, log_decay, k, v, unit(removal), rate.sigmoid())
    return tuple(part.detach().requires_grad_() for part in parts)


def flat(parts):
    """Outputs and last state in one vector."""
    return torch.cat([part.flatten() for part in parts])


@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 8, 32]),
    st.sampled_from([None, 0.0, 1e-9, STRONGEST_DECAY, 2.0]),
)
@settings(max_examples=25, deadline=None)
def test_chunked_is_recurrent(forms, length, chunk, decay):
    parts = draw(length, seed=length, decay=decay)
    state = forms.noise(2, 2, 5, 3, seed=9).requires_grad_()
    fast = generalised_delta_chunked(*parts, state, chunk)
    forms.same(flat(fast), flat(generalised_delta_recurrent(*parts, state)), [*parts, state])


@pytest.mark.parametrize("chunk", [32, 128])
def test_single_precision_at_the_strongest_decay(chunk):
    parts = draw(130, dtype=torch.float32, head=16, value=16, decay=STRONGEST_DECAY)
    fast = generalised_delta_chunked(*parts, chunk=chunk)[0]
    slow = generalised_delta_recurrent(*parts)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(fast.sum(), parts)
    assert all(g.isfinite().all() for g in gradients)
    for a, b in zip(gradients, torch.autograd.grad(slow.sum(), parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_half_precision_is_computed_in_single():
    halves = [part.detach().bfloat16() for part in draw(40, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = generalised_delta_chunked(*halves)
    assert out.dtype == state.dtype == torch.float32
    again, _ = generalised_delta_recurrent(*(part.float() for part in halves))
    torch.testing.assert_close(out, again, rtol=1e-4, atol=1e-4)


def test_the_delta_rule_is_a_special_case():
    r, _, _, v, removal, _ = draw(19)
    beta = torch.rand(2, 2, 19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zero, rate = torch.zeros_like(r), beta[..., None].expand_as(r)
    out, state = generalised_delta_chunked(
        r, zero, removal, v * beta[..., None], removal, rate, chunk=8
    )
    known, memory = delta_rule_recurrent(r, removal, v, beta, torch.zeros_like(beta))
    torch.testing.assert_close(out, known)
    torch.testing.assert_close(state, memory)


def test_orthonormal_keys_store_their_values_exactly(forms):
    k = torch.eye(8, dtype=torch.float64)[None, None]
    v = forms.noise(1, 1, 8, 6)
    _, memory = generalised_delta_chunked(k, 0 * k, k, v, k, torch.ones_like(k))
    torch.testing.assert_close(k @ memory, v, rtol=0, atol=1e-12)


def test_without_removal_it_is_attention_with_a_decay_per_channel(forms):
    r, log_decay, k, v, removal, rate = draw(11)
    out, _ = generalised_delta_chunked(r, log_decay, k, v, removal, 0 * rate, chunk=4)
    total = log_decay.cumsum(2)
    t, s = 9, 6
    weight = (r[:, :, t] * k[:, :, s] * (total[:, :, t] - total[:, :, s]).exp()).sum(-1)
    (gradient,) = torch.autograd.grad(out[:, :, t].sum(), v)
    torch.testing.assert_close(gradient[:, :, s, 0], weight)


@pytest.mark.parametrize("text", ["rwkv7,head_dim=8,chunk=4", "rwkv7,head_dim=4"])
def test_layer_fulfils_its_contract(forms, text):
    forms.parallel_is_recurrent(text)
    forms.state_is_as_stated(text)
    forms.causal(text)
    forms.replicas(text)


def test_counts_at_the_published_width(forms):
    cost = forms.make("rwkv7", width=128).accounting(128)
    assert cost.params == 99_968
    assert cost.matrix_state_floats == 2_048, "the iso-state rule"
    assert cost.state_floats == 2_048 + 128
    assert cost.flops_per_token > 2 * 4 * 128**2


def test_streams_follow_their_equations(forms):
    layer = forms.make("rwkv7,head_dim=8").double()
    for name in ("decay", "rate"):
        torch.nn.init.normal_(getattr(layer, name).down.weight)
    torch.nn.init.uniform_(layer.replacement)
    x, before = forms.noise(2, 3, 16).unbind(0)
    (r, log_decay, k, v, removal, rate), gate = layer.streams(x, before)
    mixed = [x + (before - x) * layer.mix[i] for i in range(6)]
    torch.testing.assert_close(r.flatten(-2), layer.receptance(mixed[0]))
    pace = layer.decay_base + layer.decay.up(torch.tanh(layer.decay.down(mixed[1])))
    w = torch.exp(-(math.e**-0.5) * torch.sigmoid(pace))
    torch.testing.assert_close(log_decay.exp().flatten(-2), w)
    assert (w > 0.545).all()
    a = torch.sigmoid(layer.rate_base + layer.rate.up(layer.rate.down(mixed[4])))
    torch.testing.assert_close(rate.flatten(-2), a)
    plain = layer.key(mixed[2])
    torch.testing.assert_close(k.flatten(-2), plain * (1 + (a - 1) * layer.replacement))
    torch.testing.assert_close(removal.norm(dim=-1), torch.ones(3, 2).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(v.flatten(-2), layer.value(mixed[3]))
    expected = layer.gate.up(torch.sigmoid(layer.gate.down(mixed[5])))
    torch.testing.assert_close(gate, expected)


def test_the_bonus_reads_the_present_token(forms):
    layer = forms.make("rwkv7,head_dim=8").double()
    x = forms.noise(1, 1, 16)
    parts, gate = layer.streams(x, 0 * x)
    quiet = layer.finish(0 * parts[0], parts, gate)
    torch.testing.assert_close(quiet, 0 * quiet)
    torch.nn.init.ones_(layer.bonus)
    dot = (parts[0] * parts[2]).sum(-1, keepdim=True)
    expected = layer.out(gate * (dot * parts[3]).flatten(-2))
    torch.testing.assert_close(layer.finish(0 * parts[0], parts, gate), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rwkv7,head_dim=3", "choose one of 1, 2, 4"),
        ("rwkv7,head_dim=0", "not divisible"),
        ("rwkv7,chunk=129", "expected 1 to 128"),
        ("rwkv7,gate_rank=0", "gate_rank=0"),
    ],
)
def test_impossible_options_are_refused(forms, text, message):
    with pytest.raises(ConfigError, match=message):
        forms.make(text)
