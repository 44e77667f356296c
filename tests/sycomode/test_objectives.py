"""Losses against closed forms, then their bounds and limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sycomode import objectives
from sycomode.objectives import Targets
from workbench.errors import ConfigError


def logits(seed: int, rows: int = 2, time: int = 3, vocab: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, time, vocab, generator=generator, dtype=torch.float64)


ONES = torch.ones(2, 3, dtype=torch.float64)


def test_kl_of_two_known_distributions():
    t = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64).log()
    s = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    mask = torch.ones(1, 1, dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    assert objectives.forward_kl(s, t, mask).item() == pytest.approx(forward, abs=1e-12)
    assert objectives.reverse_kl(s, t, mask).item() == pytest.approx(reverse, abs=1e-12)


def test_kl_of_equals_is_zero():
    t = logits(0)
    assert objectives.forward_kl(t, t, ONES).item() == 0.0
    assert abs(objectives.forward_kl(t.float(), t.float(), ONES).item()) < 1e-6


def test_gradient_of_forward_kl_is_difference_of_softmaxes():
    s, t = logits(1).requires_grad_(), logits(2)
    objectives.forward_kl(s, t, ONES).backward()
    expected = (s.softmax(-1) - t.softmax(-1)).detach() / ONES.sum()
    assert torch.allclose(s.grad, expected, atol=1e-12)


def test_gradient_of_cross_entropy_shifts_once():
    s = logits(3).requires_grad_()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    loss = objectives.cross_entropy(s, ids, ONES)
    by_hand = -s.log_softmax(-1).gather(-1, ids[..., None]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-12)


def test_temperature_squared_keeps_gradients_of_one_order():
    norms = {}
    for tau in (1.0, 10.0):
        s, t = logits(4).requires_grad_(), logits(5)
        objectives.forward_kl(s, t, ONES, tau).backward()
        norms[tau] = s.grad.norm().item()
    assert 0.1 < norms[10.0] / norms[1.0] < 10.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.5]))
def test_top_k_with_rest_is_a_rising_lower_bound_and_exact_at_the_end(seed: int, tau: float):
    s, t = logits(seed), logits(seed + 1)
    full = objectives.forward_kl(s, t, ONES, tau).item()
    values = []
    for k in range(1, 12):
        targets = objectives.compress(t, k, tau)
        values.append(objectives.topk_tail_kl(s, targets, ONES, tau).item())
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert max(values) <= full + 1e-9
    assert values[-1] == pytest.approx(full, abs=1e-9)
    whole = objectives.compress(t, 0, tau)
    assert objectives.topk_tail_kl(s, whole, ONES, tau).item() == pytest.approx(full, abs=1e-12)


def test_rest_class_sees_mass_outside_the_top():
    """Equal on the top two, all other mass moved: only the rest term can tell."""
    t = torch.tensor([[[0.5, 0.3, 0.1, 0.1]]], dtype=torch.float64).log()
    s = torch.tensor([[[0.5, 0.1, 0.2, 0.2]]], dtype=torch.float64).log()
    mask = torch.ones(1, 1, dtype=torch.float64)
    value = objectives.topk_tail_kl(s, objectives.compress(t, 1), mask).item()
    assert value == pytest.approx(0.0, abs=1e-12)  # 0.5 and a rest of 0.5 on both sides
    value = objectives.topk_tail_kl(s, objectives.compress(t, 2), mask).item()
    assert value == pytest.approx(0.3 * math.log(3) + 0.2 * math.log(0.2 / 0.4), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_jensen_shannon_is_symmetric_bounded_and_has_the_kls_as_limits(seed: int):
    s, t = logits(seed), logits(seed + 1)
    there = objectives.generalised_jsd(s, t, ONES, 0.5).item()
    back = objectives.generalised_jsd(t, s, ONES, 0.5).item()
    assert there == pytest.approx(back, abs=1e-12)
    assert 0.0 <= there <= math.log(2)
    small = 1e-5
    forward = objectives.forward_kl(s, t, ONES).item()
    reverse = objectives.reverse_kl(s, t, ONES).item()
    near = objectives.generalised_jsd(s, t, ONES, small).item() / small
    far = objectives.generalised_jsd(s, t, ONES, 1 - small).item() / small
    assert near == pytest.approx(forward, rel=0.02)
    assert far == pytest.approx(reverse, rel=0.02)
    assert objectives.generalised_jsd(s, t, ONES, 0.0).item() == forward
    assert objectives.generalised_jsd(s, t, ONES, 1.0).item() == reverse


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_loss_of_a_padded_batch_is_the_token_weighted_mean(seed: int, used: int):
    s, t = logits(seed), logits(seed + 1)
    mask = ONES.clone()
    mask[1, used:] = 0.0
    batch = objectives.forward_kl(s, t, mask).item()
    first = objectives.forward_kl(s[:1], t[:1], mask[:1]).item()
    second = objectives.forward_kl(s[1:, :used], t[1:, :used], mask[1:, :used]).item()
    assert batch == pytest.approx((3 * first + used * second) / (3 + used), abs=1e-9)


def test_hidden_losses_by_hand():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert objectives.hidden_last([one, one], [zero, zero]).item() == 1.0
    assert objectives.hidden_all([zero, one], [one, 2 * one]).item() == pytest.approx(0.0, abs=1e-6)
    assert objectives.hidden_all([zero, one], [one, -one]).item() == pytest.approx(2.0, abs=1e-6)


def test_targets_rows_keep_what_belongs_together():
    made = objectives.compress(logits(6, rows=4), 3)
    some = made.rows(torch.tensor([2, 0]))
    assert torch.allclose(some.logp.double(), made.logp[[2, 0]], atol=1e-6)
    assert torch.equal(some.ids, made.ids[[2, 0]])
    assert Targets(made.logp).rows(torch.tensor([1])).ids is None


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside_its_range(beta: float):
    with pytest.raises(ConfigError, match="beta"):
        objectives.generalised_jsd(logits(0), logits(1), ONES, beta)
