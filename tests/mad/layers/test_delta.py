"""Delta rules: the chunked form is the recurrence, pairs are stored exactly, decay is decay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.delta import (
    delta_rule_chunked,
    delta_rule_recurrent,
    unit,
)
from workbench.errors import ConfigError

LAYERS = ("deltanet", "gated-deltanet")


def draw(length, seed=0, dtype=torch.float64, decay=1.0, head=5, value=3):
    """Unit queries and keys, values, β in (0, 1) and log α of that mean; two rows, two heads."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 2, length, n, generator=rng, dtype=dtype) for n in (head, head, value)
    )
    beta = torch.rand(2, 2, length, generator=rng, dtype=dtype)
    log_decay = -decay * torch.rand(2, 2, length, generator=rng, dtype=dtype) * 2
    parts = (unit(q), unit(k), v, beta, log_decay)
    return tuple(part.detach().requires_grad_() for part in parts)


def flat(parts):
    """Outputs and last state in one vector."""
    return torch.cat([part.flatten() for part in parts])


# ---------------------------------------------------------------- the two forms


@given(st.integers(1, 40), st.sampled_from([1, 3, 8, 32]), st.sampled_from([0.0, 1.0, 200.0]))
@settings(max_examples=25, deadline=None)
def test_chunked_is_recurrent(forms, length, chunk, decay):
    parts = draw(length, seed=length, decay=decay)
    state = forms.noise(2, 2, 5, 3, seed=9).requires_grad_()
    fast, slow = delta_rule_chunked(*parts, state, chunk), delta_rule_recurrent(*parts, state)
    forms.same(flat(fast), flat(slow), [*parts, state])


def test_without_decay_is_a_decay_of_one(forms):
    q, k, v, beta, _ = draw(21)
    zero = torch.zeros_like(beta)
    fast, slow = (
        delta_rule_chunked(q, k, v, beta, chunk=8),
        delta_rule_recurrent(q, k, v, beta, zero),
    )
    forms.same(flat(fast), flat(slow), [q, k, v, beta])


def test_single_precision_stays_close():
    parts = draw(100, dtype=torch.float32, head=16, value=16)
    torch.testing.assert_close(
        delta_rule_chunked(*parts)[0], delta_rule_recurrent(*parts)[0], rtol=1e-4, atol=1e-5
    )


def test_long_sequences_of_one_key_stay_bounded():
    """β = 2 and one key for ever: the worst system; what is read stays what was written."""
    q = unit(torch.ones(1, 1, 512, 8))
    v, beta = torch.ones(1, 1, 512, 4), torch.full((1, 1, 512), 2.0)
    out, state = delta_rule_chunked(q, q, v, beta)
    expected = torch.tensor([2.0, 0.0]).repeat(256)  # twice the difference, to and fro
    torch.testing.assert_close(out[0, 0, :, 0], expected, rtol=0, atol=1e-2)
    assert state.abs().max() < 1.1


def test_half_precision_is_computed_in_single():
    parts = draw(40, dtype=torch.float32)
    halves = [part.detach().bfloat16() for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = delta_rule_chunked(*halves)
    assert out.dtype == state.dtype == torch.float32
    again, _ = delta_rule_recurrent(*(part.float() for part in halves))
    torch.testing.assert_close(out, again, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- closed forms


def test_orthonormal_keys_store_their_values_exactly(forms):
    k = torch.eye(8, dtype=torch.float64)[None, None]
    v, beta = forms.noise(1, 1, 8, 6), torch.ones(1, 1, 8, dtype=torch.float64)
    for rule in (delta_rule_chunked, delta_rule_recurrent):
        _, memory = rule(k, k, v, beta, torch.zeros_like(beta))
        torch.testing.assert_close(k @ memory, v, rtol=0, atol=1e-12)


def test_a_key_written_again_holds_its_new_value_only(forms):
    key = unit(forms.noise(1, 1, 1, 8)).expand(1, 1, 2, 8)
    v, beta = forms.noise(1, 1, 2, 6), torch.ones(1, 1, 2, dtype=torch.float64)
    out, _ = delta_rule_chunked(key, key, v, beta)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-5)  # |k|² = 1 − 10⁻⁶ or so


def test_without_writing_the_memory_only_decays(forms):
    q, k, v, beta, log_decay = draw(11)
    state = forms.noise(2, 2, 5, 3)
    out, last = delta_rule_chunked(q, k, v, 0 * beta, log_decay, state, chunk=4)
    total = log_decay.cumsum(-1)[..., None]
    torch.testing.assert_close(out, total.exp() * (q @ state))
    torch.testing.assert_close(last, total[..., -1:, :].exp() * state)


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("text", [*LAYERS, "deltanet,negative_eigenvalues=true,short_conv=1"])
def test_layers_fulfil_their_contract(forms, text):
    text = f"{text},num_heads=2,chunk=4"
    forms.parallel_is_recurrent(text)
    forms.state_is_as_stated(text)
    forms.causal(text)
    forms.replicas(text)


@pytest.mark.parametrize(("name", "params"), [("deltanet", 68_112), ("gated-deltanet", 85_536)])
def test_counts_at_the_published_width(forms, name, params):
    cost = forms.make(name, width=128).accounting(128)
    assert cost.params == params
    assert cost.matrix_state_floats == 2_048, "the iso-state rule"
    assert cost.state_floats == 2_048 + 3 * 3 * 128
    assert cost.flops_per_token > 2 * 4 * 128**2


def test_gates_lie_where_they_should(forms):
    x = forms.noise(4, 20, 16, dtype=torch.float32) * 10
    beta, none = forms.make("deltanet,num_heads=2").gates(x)
    assert none is None
    assert 0 < beta.min() < 0.1
    assert 0.9 < beta.max() <= 1
    doubled, _ = forms.make("deltanet,num_heads=2,negative_eigenvalues=true").gates(x)
    torch.testing.assert_close(doubled, 2 * beta)
    _, log_decay = forms.make("gated-deltanet,num_heads=2").gates(x)
    assert (log_decay < 0).all()
    _, idle = forms.make("gated-deltanet,num_heads=2").gates(0 * x[:1, :1])
    assert -16 * 0.1 <= idle.min() <= idle.max() <= -1e-3  # A softplus(b), as initialised


def test_equal_answers_whatever_the_chunk(forms):
    x = forms.noise(2, 24, 16, dtype=torch.float32)
    outputs = [forms.make(f"gated-deltanet,num_heads=2,chunk={c}")(x) for c in (1, 7, 64)]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deltanet,num_heads=3", "not divisible by num_heads=3"),
        ("deltanet,chunk=0", "at least 1"),
        ("gated-deltanet,short_conv=0", "at least 1"),
        ("gated-deltanet,head=2", "num_heads"),
    ],
)
def test_impossible_options_are_refused(forms, text, message):
    with pytest.raises(ConfigError, match=message):
        forms.make(text)


@pytest.mark.slow
def test_deltanet_recalls_from_the_context_within_two_hundred_steps(tmp_path):
    from mad.train import Experiment, main
    from workbench.cli import RunOptions

    results = main(
        Experiment(
            task="in-context-recall",
            layers=("deltanet", "swiglu", "deltanet", "swiglu"),
            vocab_size=16,
            seq_len=32,
            num_train_examples=12800,
            num_test_examples=512,
            dim=64,
            train_targets="answers",
            batch_size=64,
            epochs=1,
            scheduler="none",
            lr=2e-3,
            evaluate_every=50,
            stop_accuracy=0.995,
            run=RunOptions(root=tmp_path, threads=1),
        )
    )
    assert results["test_accuracy"] >= 0.99, results["curve"]
    assert results["steps"] <= 200
