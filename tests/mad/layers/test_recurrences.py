"""Layers with a decaying state: published counts, forward = step by step, gradients, precision."""

import pytest
import torch
import torch.nn.functional as F

from mad.registry import parse_layer
from workbench.errors import ConfigError

# name, parameters and floats of state at width 128, and those the iso-state rule counts
COUNTS = [
    ("mamba", 107_264, 1_024 + 768, 1_024),
    ("gated-linear-attention", 86_272, 16_384, 16_384),
    ("mh-gated-linear-attention", 86_160, 2_048, 2_048),
    ("mamba2", 103_016, 2_048 + 3 * 272, 2_048),
    ("retnet", 82_176, 2_048, 2_048),
]
VARIANTS = [
    *(name for name, *_ in COUNTS),
    "mamba,d_state=1,d_conv=1,expand=1,dt_rank=3",
    "mh-gated-linear-attention,num_heads=4,form=pairwise,clamp_min=-0.5",
    "mamba2,head_dim=8,groups=2,chunk=5,d_state=3",
    "retnet,num_heads=2,xpos=false",
]


def make(text: str, width: int = 32, seed: int = 0) -> torch.nn.Module:
    """A layer with its own seed, its parameters moved off their special starting values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = parse_layer(text).make(width, 64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers from their own seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def outputs_and_gradients(function, layer, x):
    """y, and the gradients of a weighted sum of it to x and every parameter."""
    x = x.detach().requires_grad_()
    y = function(x)
    loss = (y * noise(*y.shape, seed=3, dtype=y.dtype)).sum()
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def worst(found, expected):
    """Largest error of any tensor, as a share of its largest number or a hundredth of all's.

    Gradients that a norm cancels to rounding have no size of their own to be compared with.
    """
    sizes = [float(b.detach().abs().max()) for b in expected]
    return max(
        float((a - b).detach().abs().max()) / max(size, 1e-2 * max(sizes), 1e-9)
        for a, b, size in zip(found, expected, sizes, strict=True)
    )


@pytest.mark.parametrize(("name", "params", "state", "matrix"), COUNTS)
def test_published_counts(name, params, state, matrix):
    layer = parse_layer(name).make(128, 64)
    cost = layer.accounting(64)
    assert cost.params == sum(p.numel() for p in layer.parameters()) == params
    assert (cost.state_floats, cost.matrix_state_floats) == (state, matrix)
    held = layer.initial_state(1).values()
    assert sum(s.numel() for s in held if s.is_floating_point()) == state


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 29])
def test_the_parallel_form_is_the_step_form(text, length):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = make(text).to(dtype)
        x = noise(2, length, 32, dtype=dtype)
        fast = outputs_and_gradients(layer, layer, x)
        slow = outputs_and_gradients(layer.recurrent, layer, x)
        assert worst(fast, slow) < tolerance


@pytest.mark.parametrize("text", VARIANTS)
def test_inputs_that_drive_every_gate_to_its_end(text):
    layer = make(text)
    x = 300 * noise(2, 70, 32)
    fast = outputs_and_gradients(layer, layer, x)
    assert all(part.isfinite().all() for part in fast)
    double = outputs_and_gradients(layer.double(), layer, x.double())
    slow = outputs_and_gradients(layer.recurrent, layer, x.double())
    assert worst(double, slow) < 1e-8


@pytest.mark.parametrize("text", VARIANTS)
def test_a_step_leaves_its_state_alone_and_states_are_not_below_single_precision(text):
    layer = make(text)
    state = layer.initial_state(2)
    _, state = layer.step(noise(2, 32), state)
    kept = {key: value.clone() for key, value in state.items()}
    layer.step(noise(2, 32, seed=1), state)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer.step(noise(2, 32), layer.initial_state(2, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert {s.dtype for s in state.values() if s.is_floating_point()} == {torch.float32}
        rough, slow = layer(noise(2, 40, 32)), layer.recurrent(noise(2, 40, 32))
    exact = layer(noise(2, 40, 32))
    assert rough.dtype == torch.bfloat16
    assert worst([rough.float()], [exact]) < 0.05
    assert worst([slow.float()], [exact]) < 0.05
    halved = layer.to(torch.bfloat16)
    assert halved(noise(2, 9, 32).bfloat16()).dtype == torch.bfloat16
    assert halved.recurrent(noise(2, 9, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("text", VARIANTS)
def test_a_stack_under_vmap_is_the_layers_one_by_one(text):
    layers = [make(text, seed=seed).double() for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = noise(2, 11, 32, dtype=torch.float64)
    weight = noise(2, 11, 32, seed=3, dtype=torch.float64)

    def loss(parameters, buffers):
        y = torch.func.functional_call(layers[0], (parameters, buffers), (x,))
        return (y * weight).sum()

    found = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    outside = torch.autograd.grad(
        torch.func.vmap(loss)(parameters, buffers).sum(), list(parameters.values())
    )
    for index, layer in enumerate(layers):
        _, _, *expected = outputs_and_gradients(layer, layer, x)
        assert worst([g[index] for g in found.values()], expected) < 1e-9
        assert worst([g[index] for g in outside], expected) < 1e-9


# ---------------------------------------------------------------- mamba


def test_mamba_with_no_forgetting_and_constant_steps_is_a_running_sum():
    layer = make("mamba,d_state=1,d_conv=1,expand=1,dt_rank=1", width=1).double()
    with torch.no_grad():
        layer.input.weight.copy_(torch.tensor([[1.0], [2.0]]))
        layer.convolution.taps.fill_(1.0)
        layer.convolution.bias.zero_()
        layer.maps.weight.zero_()
        layer.dt.weight.zero_()
        layer.dt.bias.fill_(0.5)
        layer.A_log.fill_(-60.0)  # A → 0⁻
        layer.D.fill_(0.25)
        layer.out.weight.fill_(1.0)
        layer.maps.weight[1:].fill_(1.0)  # B_t = C_t = u_t
    x = noise(1, 9, 1, dtype=torch.float64)
    u = F.silu(x)
    delta = F.softplus(torch.tensor(0.5, dtype=torch.float64))
    y = u * (delta * u * u).cumsum(1) + 0.25 * u
    torch.testing.assert_close(layer(x), y * F.silu(2 * x))


def test_mamba_starts_as_published():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = parse_layer("mamba").make(128, 64)
    steps = F.softplus(layer.dt.bias)
    assert 1e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1
    assert layer.dt.weight.abs().max() <= 8**-0.5
    torch.testing.assert_close(layer.A_log.exp()[7], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (layer.D == 1).all()
    spared = {n for n, p in layer.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert spared == {"A_log", "D", "dt.bias"}
    assert layer.dt.bias.no_reinit, "the model's zeroing of biases leaves the step sizes alone"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mamba,d_state=0", "d_state=0"),
        ("gated-linear-attention,num_heads=3", "not divisible"),
        ("gated-linear-attention,clamp_min=0.5", "clamp_min=0.5"),
        ("mamba2,head_dim=24", "head_dim=24"),
        ("mamba2,head_dim=32,groups=4", "groups=4"),
        ("retnet,num_heads=32", "cannot be rotated"),
        ("mamba,dt_min=0.5", "dt_min=0.5 to dt_max=0.1"),
    ],
)
def test_impossible_options_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layer(text).make(32, 64)


def test_the_compiled_kernel_is_refused_where_it_cannot_run():
    from workbench.errors import MissingExtra

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(MissingExtra, match="mamba-ssm"):
        make("mamba,kernel=cuda")(noise(1, 3, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["mamba", "mamba2"])
def test_the_compiled_kernels_agree(text):
    pytest.importorskip("mamba_ssm")
    x = noise(2, 70, 64).cuda()
    ours = make(f"{text},kernel=torch", width=64).cuda()
    compiled = make(f"{text},kernel=cuda", width=64).cuda()
    found = outputs_and_gradients(compiled, compiled, x)
    assert worst(found, outputs_and_gradients(ours, ours, x)) < 1e-3
