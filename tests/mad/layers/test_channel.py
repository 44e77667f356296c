"""Perceptrons: published counts, their equations, steps and replicas."""

import pytest
import torch
import torch.nn.functional as F

from workbench.errors import ConfigError

VARIANTS = ["mlp", "mlp,hidden=5,bias=true", "swiglu", "swiglu,multiple_of=5,bias=true"]


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("mlp", 131_072),
        ("mlp,bias=true", 131_072 + 512 + 128),
        ("swiglu", 135_168),
        ("swiglu,hidden=512", 3 * 128 * 512),
    ],
)
def test_parameters_at_the_published_width(forms, text, params):
    cost = forms.make(text, width=128).accounting(64)
    assert (cost.params, cost.params_active, cost.state_floats) == (params, params, 0)
    assert cost.flops_per_token == 2 * sum(
        m.weight.numel()
        for m in forms.make(text, width=128).modules()
        if isinstance(m, torch.nn.Linear)
    )


def test_equations(forms):
    mlp, swiglu, x = forms.make("mlp"), forms.make("swiglu"), forms.noise(2, 3, 16).float()
    u = x @ mlp.up.weight.T
    tanh = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    torch.testing.assert_close(mlp(x), tanh @ mlp.down.weight.T)
    gate, up = swiglu.gate_up.weight.chunk(2)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ swiglu.down.weight.T
    torch.testing.assert_close(swiglu(x), expected)


def test_the_gated_width_is_eight_thirds_rounded_up(forms):
    assert forms.make("swiglu", width=128).down.in_features == 352  # ⌈341/16⌉ · 16
    assert forms.make("swiglu", width=6).down.in_features == 16
    assert forms.make("swiglu,multiple_of=1", width=6).down.in_features == 16


@pytest.mark.parametrize("text", VARIANTS)
def test_forms(forms, text):
    forms.parallel_is_recurrent(text)
    forms.state_is_as_stated(text)
    forms.causal(text)
    forms.replicas(text)
    forms.half_precision(text)


@pytest.mark.parametrize(
    "text", ["mlp,hidden=-1", "mlp,hidden=0", "swiglu,hidden=0", "swiglu,multiple_of=0"]
)
def test_impossible_options_are_refused(forms, text):
    with pytest.raises(ConfigError, match="at least 1"):
        forms.make(text)
