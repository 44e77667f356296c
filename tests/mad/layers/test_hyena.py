"""Hyena, multi-head Hyena and the rational filter: every form is the written-out convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.convolution import convolve_short, convolve_short_step
from mad.layers.hyena import (
    convolve_fft,
    convolve_recurrent,
    convolve_toeplitz,
    mix_heads_fft,
    mix_heads_recurrent,
    mix_heads_toeplitz,
)
from mad.layers.rtf import RTFFilter, rtf_recurrent
from workbench.errors import ConfigError

VARIANTS = [
    "hyena",
    "hyena,kernel=fft,inner_factor=1,short_filter=4",
    "hyena,proj_groups=1,short_filter=1",
    "hyena,filter=rtf,rtf_init=montel",
    "hyena,filter=rtf,rtf_init=montel,rtf_denominators=2,filter_order=3,kernel=fft",
    "mh-hyena,num_heads=4",
    "mh-hyena,num_heads=2,kernel=fft",
    "mh-hyena,num_heads=2,layout=paper",
    "mh-hyena,num_heads=4,filter=rtf,rtf_init=montel,filter_order=3",
]


@pytest.mark.parametrize(
    ("text", "params", "matrix_state", "state"),
    [
        ("hyena", 123_964 + 72, 2_048, 512 * 24 + 2 * 384),
        ("mh-hyena", 30_478 + 72, 4_096, 256 * 24 + 2 * 96),
        ("mh-hyena,layout=paper", None, 2_048, 256 * 24 + 2 * 96),
        # 512 numerators and denominators of order 4 in the place of the network of 2620 + 72
        ("hyena,filter=rtf", 123_964 - 2620 + 512 * 9, 2_048, 2_048 + 2 * 384),
        ("hyena,filter=rtf,rtf_denominators=8", 123_964 - 2620 + 512 * 5 + 32, 2_048, 2_816),
        ("mh-hyena,filter=rtf", None, 4_096, 4_096 + 2 * 96),
    ],
)
def test_parameters_and_state_at_the_published_width(forms, text, params, matrix_state, state):
    cost = forms.make(text, width=128).accounting(24)
    assert params is None or cost.params == params
    assert (cost.matrix_state_floats, cost.state_floats) == (matrix_state, state)


def test_the_history_grows_and_modes_do_not(forms):
    plain, rational = forms.make("hyena"), forms.make("hyena,filter=rtf")
    assert plain.state_floats(9) - plain.state_floats(8) == 64
    assert plain.kv_bytes(9) == 2 * 64 * 9
    assert rational.state_floats(9) == rational.state_floats(8)
    assert rational.kv_bytes(9) == 0


@given(st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_every_form_is_the_written_out_convolution(forms, length, seed):
    u = forms.noise(2, 3, length, seed=seed).requires_grad_()
    h = forms.noise(3, length, seed=seed + 1).requires_grad_()
    slow = convolve_recurrent(u, h)
    for convolve in (convolve_fft, convolve_toeplitz):
        forms.same(convolve(u, h), slow, (u, h))
    x1, x2, v = (forms.noise(2, 3, length, 4, seed=seed + n).requires_grad_() for n in (10, 20, 30))
    slow = mix_heads_recurrent(x1, x2, v, h)
    for mix in (mix_heads_fft, mix_heads_toeplitz):
        forms.same(mix(x1, x2, v, h), slow, (x1, x2, v, h))
    single = [part.detach().float() for part in (x1, x2, v, h)]
    for mix in (mix_heads_fft, mix_heads_toeplitz):
        torch.testing.assert_close(mix(*single), slow.float(), rtol=1e-4, atol=1e-4)


def test_written_out_forms_by_hand():
    u, h = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 5.0, 1.0]])
    assert convolve_recurrent(u, h).flatten().tolist() == [10, 25, 41]
    one = torch.ones(1, 1, 3, 2)
    v, x2 = u.view(1, 1, 3, 1).expand(1, 1, 3, 2), torch.tensor([1.0, -1.0]).expand(1, 1, 3, 2)
    mixed = mix_heads_recurrent(one, x2, v, h)
    assert mixed[0, 0].tolist() == [[20, -20], [50, -50], [82, -82]]


@given(st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_short_convolution_by_steps(forms, length, taps, biased, seed):
    x, w = forms.noise(2, length, 3, seed=seed), forms.noise(taps, 3, seed=seed + 1)
    bias = forms.noise(3, seed=seed + 2) if biased else None
    past, outputs = torch.zeros(2, taps - 1, 3, dtype=x.dtype), []
    for t in range(length):
        y, past = convolve_short_step(x[:, t], past, w, bias)
        outputs.append(y)
        expected = sum(w[taps - 1 - i] * x[:, t - i] for i in range(min(taps, t + 1))) + (
            0 if bias is None else bias
        )
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.stack(outputs, dim=1), convolve_short(x, w, bias))


# ---------------------------------------------------------------- rational filters


def rational(channels: int, order: int, taps: int, seed: int, denominators=None) -> RTFFilter:
    """A filter with poles inside the unit disc."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RTFFilter(channels, order, taps, init="montel", denominators=denominators).double()


@given(st.integers(1, 5), st.integers(6, 19), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_taps_are_the_folded_response_of_the_recursion(order, taps, seed):
    filters = rational(3, order, taps, seed)
    impulse = torch.zeros(3, 400 * taps, dtype=torch.float64)
    impulse[:, 0] = 1
    with torch.no_grad():
        response = rtf_recurrent(
            impulse[:, : 60 * taps], filters.poles, filters.zeros, filters.bias
        )
        folded = response.unflatten(1, (60, taps)).sum(dim=1)
        if (response[:, -taps:].abs() < 1e-13).all():  # else the fold is cut off too early
            torch.testing.assert_close(filters(taps), folded, rtol=1e-9, atol=1e-11)
        a, c, direct = filters.companion()
        exact = rtf_recurrent(impulse[:, :taps], a, c, direct)
    torch.testing.assert_close(filters(taps), exact, rtol=1e-9, atol=1e-10)


def test_a_filter_of_one_pole_by_hand():
    filters = rational(1, 1, 8, 0)
    filters.poles.data[:], filters.zeros.data[:], filters.bias.data[:] = -0.5, 3.0, 7.0
    # B/A = 3 z⁻¹/(1 − ½ z⁻¹): taps 0, 3, 3/2, …; folding multiplies by 1/(1 − 2⁻⁸)
    fold = 1 / (1 - 0.5**8)
    expected = [7 + 3 * 0.5**7 * fold, *(3 * 0.5**t * fold for t in range(7))]
    assert filters(8)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_without_poles_the_taps_are_the_numerator():
    filters = RTFFilter(2, 3, 10)
    assert not filters.poles.any()
    filters.zeros.data[:] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    expected = torch.cat([filters.bias[:, None], filters.zeros, torch.zeros(2, 6)], dim=1)
    torch.testing.assert_close(filters(10), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(filters(4), expected[:, :4], rtol=1e-5, atol=1e-6)


def test_montel_keeps_the_poles_in_the_disc():
    filters = rational(50, 4, 16, 3)
    a, _, _ = filters.companion()
    assert (a.abs().sum(dim=1) <= 1).all()
    assert a.any()


@pytest.mark.parametrize(("init", "bound"), [("montel", 1 / 5), ("xavier", 1 / 5), ("zero", 0)])
def test_coefficients_start_within_their_bounds(init, bound):
    filters = RTFFilter(400, 5, 16, init=init)  # √(6/(5 + 1)) = 1
    for part in (filters.poles, filters.zeros):
        assert part.abs().max() <= bound
        assert part.abs().max() >= 0.95 * bound


def test_shared_denominators(forms):
    filters = rational(6, 2, 12, 1, denominators=3)
    assert filters.poles.shape == (3, 2)
    full = rational(6, 2, 12, 1)
    full.zeros.data, full.bias.data = filters.zeros.data, filters.bias.data
    full.poles.data = filters.poles.data[[0, 0, 1, 1, 2, 2]]
    torch.testing.assert_close(filters(12), full(12))
    for shared, own in zip(filters.companion(), full.companion(), strict=True):
        torch.testing.assert_close(shared, own)


def test_rational_parameters_are_registered(forms):
    names = dict(forms.make("hyena,filter=rtf").named_parameters())
    assert {"filter.poles", "filter.zeros", "filter.bias"} <= set(names)


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
        ("hyena,filter=fir", "expected implicit or rtf"),
        ("hyena,kernel=direct", "expected auto, toeplitz or fft"),
        ("hyena,filter=rtf,rtf_denominators=7", "not divisible by rtf_denominators=7"),
        ("hyena,filter=rtf,filter_order=24", "less than max_length=24"),
        ("hyena,filter=rtf,rtf_init=ones", "expected zero, xavier or montel"),
        ("hyena,filter_order=0", "at least 1"),
        ("hyena,short_filter=0", "at least 1"),
        ("hyena,inner_factor=0", "at least 1"),
        ("mh-hyena,layout=figure", "expected code or paper"),
    ],
)
def test_impossible_options_are_refused(forms, text, message):
    with pytest.raises(ConfigError, match=message):
        forms.make(text)


@pytest.mark.parametrize("text", ["hyena", "hyena,filter=rtf"])
def test_a_row_longer_than_the_filter_is_refused(forms, text):
    with pytest.raises(ConfigError, match="max_length=24"):
        forms.make(text)(torch.zeros(1, 25, 16))


def test_a_history_longer_than_the_filter_is_refused(forms):
    layer = forms.make("hyena")
    state = layer.initial_state(1) | {"inputs": torch.zeros(1, 24, 64)}
    with pytest.raises(ConfigError, match="max_length=24"):
        layer.step(torch.zeros(1, 16), state)
