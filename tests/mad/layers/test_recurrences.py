"""Layers with a decaying state: published counts, forward = step by step, gradients, precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.decay import channel_decay_chunked, channel_decay_recurrent
from mad.layers.mlstm import mlstm_chunked, mlstm_recurrent
from mad.layers.retnet import retention_chunked, retention_recurrent
from mad.model import build_model
from mad.registry import parse_layer
from workbench.errors import ConfigError

# name, parameters and floats of state at width 128, and those the iso-state rule counts
COUNTS = [
    ("mamba", 107_264, 1_024 + 768, 1_024),
    ("gated-linear-attention", 86_272, 16_384, 16_384),
    ("mh-gated-linear-attention", 86_160, 2_048, 2_048),
    ("mamba2", 103_016, 2_048 + 3 * 272, 2_048),
    ("retnet", 82_176, 2_048, 2_048),
    ("mlstm", 84_240, 2_048 + 136, 2_048),
    ("rwkv5-time-mixer", 82_944, 2_048 + 128, 2_048),
    ("rwkv6-time-mixer", 140_544, 2_048 + 128, 2_048),
    ("rwkv5-channel-mixer", 147_712, 128, 0),
    ("rwkv6-channel-mixer", 147_712, 128, 0),
]
VARIANTS = [
    *(name for name, *_ in COUNTS),
    "mamba,d_state=1,d_conv=1,expand=1,dt_rank=3",
    "mh-gated-linear-attention,num_heads=4,form=halved,clamp_min=-0.5",
    "mamba2,head_dim=8,groups=2,chunk=5,d_state=3",
    "retnet,num_heads=2,xpos=false",
    "mlstm,num_heads=2,chunk=5",
    "rwkv5-time-mixer,head_dim=8,form=halved,divisor=2.0",
    "rwkv6-time-mixer,head_dim=4,form=factored,mix_rank=2,decay_rank=3",
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
    wanted = [x, *layer.parameters()]  # in a single step a decay touches no output
    return [y, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


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


# ---------------------------------------------------------------- the operations


def heads(*sizes: int, length: int, dtype=torch.float64, seed: int = 0):
    """Noise (2, 3, length, size) for every size."""
    return [noise(2, 3, length, n, seed=seed + i, dtype=dtype) for i, n in enumerate(sizes)]


def operation(function, *inputs):
    """Both outputs and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [y for y in function(*leaves) if isinstance(y, torch.Tensor)]
    loss = sum((y * noise(*y.shape, seed=9, dtype=y.dtype)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@given(
    length=st.integers(1, 37),
    spread=st.sampled_from([0.01, 1.0, 30.0, 1e4, 1e30]),
    form=st.sampled_from(["factored", "halved"]),
    bonus=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_channel_decay_in_chunks_is_the_recurrence(length, spread, form, bonus, seed):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        q, k, v = heads(5, 5, 4, length=length, dtype=dtype, seed=seed)
        g = -spread * noise(2, 3, length, 5, seed=seed + 7, dtype=dtype).square()
        u = noise(3, 5, seed=seed, dtype=dtype) if bonus else None
        state = noise(2, 3, 5, 4, seed=seed + 8, dtype=dtype)
        given = (q, k, v, g, state, *([u] if bonus else []))

        def chunked(q, k, v, g, state, u=None):
            return channel_decay_chunked(q, k, v, g, u, state, form)

        def recurrent(q, k, v, g, state, u=None):
            return channel_decay_recurrent(q, k, v, g, u, state)

        assert worst(operation(chunked, *given), operation(recurrent, *given)) < tolerance


@pytest.mark.parametrize("rate", [0.0, -1e-3, -50.0, -3e4, -torch.inf])
@pytest.mark.parametrize("form", ["factored", "halved"])
def test_one_forgetful_step_among_lasting_ones(rate, form):
    """What came before is gone, what came after stays to rounding."""
    q, k, v = heads(5, 5, 4, length=33, dtype=torch.float32)
    g = torch.full((2, 3, 33, 5), -1e-3)
    g[:, :, 11] = rate
    found, _ = channel_decay_chunked(q, k, v, g, form=form)
    exact, _ = channel_decay_recurrent(q.double(), k.double(), v.double(), g.double())
    assert worst([found], [exact]) < 1e-5


def test_no_decay_is_linear_attention_and_a_unit_bonus_changes_nothing():
    q, k, v = heads(5, 5, 4, length=21)
    zero, one = torch.zeros_like(q), torch.ones(3, 5, dtype=q.dtype)
    expected = (q @ k.mT).tril() @ v
    for form in ("factored", "halved"):
        for bonus in (None, one):
            found, _ = channel_decay_chunked(q, k, v, zero, bonus, form=form)
            torch.testing.assert_close(found, expected)


@given(length=st.integers(1, 30), chunk=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_retention_in_chunks_is_the_recurrence(length, chunk, seed):
    q, k, v = heads(6, 6, 4, length=length, seed=seed)
    gamma = torch.tensor([0.9, 0.5, 1e-3], dtype=q.dtype)
    zeta = torch.linspace(0.7, 1.0, 6, dtype=q.dtype)
    state = noise(2, 3, 6, 4, seed=seed + 8, dtype=q.dtype)

    def chunked(q, k, v, state):
        return retention_chunked(q, k, v, gamma, zeta, state, chunk)

    def recurrent(q, k, v, state):
        return retention_recurrent(q, k, v, gamma[:, None] * zeta, state)

    assert worst(operation(chunked, q, k, v, state), operation(recurrent, q, k, v, state)) < 1e-9


@given(
    length=st.integers(1, 30),
    chunk=st.integers(1, 12),
    spread=st.sampled_from([1.0, 30.0, 1e3]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_mlstm_in_chunks_is_the_recurrence(length, chunk, spread, seed):
    q, k, v = heads(5, 5, 4, length=length, seed=seed)
    gates = [spread * noise(2, 3, length, seed=seed + i, dtype=q.dtype) for i in (5, 6)]
    given = (q, k, v, gates[0], F.logsigmoid(gates[1]))

    def chunked(*parts):
        h, memory = mlstm_chunked(*parts, chunk=chunk)
        return h, *memory[:2]

    def recurrent(*parts):
        h, memory = mlstm_recurrent(*parts)
        return h, *memory[:2]

    # a running sum of thousands keeps fewer digits behind the point
    tolerance = 1e-9 if spread < 1e3 else 1e-7
    assert worst(operation(chunked, *given), operation(recurrent, *given)) < tolerance


@pytest.mark.parametrize("form", [mlstm_recurrent, mlstm_chunked])
def test_mlstm_with_its_unit_is_the_plain_equation(form):
    q, k, v = heads(5, 5, 4, length=13)
    i, f = (noise(2, 3, 13, seed=s, dtype=q.dtype) for s in (5, 6))
    S, n = torch.zeros(2, 3, 5, 4, dtype=q.dtype), torch.zeros(2, 3, 5, dtype=q.dtype)
    outputs = []
    for t in range(13):
        keep, take = torch.sigmoid(f[:, :, t]), torch.exp(i[:, :, t])
        new = k[:, :, t, :, None] * v[:, :, t, None]
        S = keep[..., None, None] * S + take[..., None, None] * new
        n = keep[..., None] * n + take[..., None] * k[:, :, t]
        size = (n * q[:, :, t]).sum(-1).abs().clamp_min(1)
        outputs.append((q[:, :, t, None] @ S)[:, :, 0] / size[..., None])
    h, (scaled, _, m) = form(q, k, v, i, F.logsigmoid(f))
    torch.testing.assert_close(h, torch.stack(outputs, dim=2))
    torch.testing.assert_close(scaled * torch.exp(m)[..., None, None], S)


# ---------------------------------------------------------------- closed forms of the layers


def test_an_open_gla_gate_is_linear_attention_that_halves_little():
    """Zero gate weights: g = log(1/2)/16, so a step keeps 2^(−1/16) of the state."""
    layer = make("mh-gated-linear-attention,num_heads=4").double()
    for parameter in (layer.decay_in.weight, layer.decay_out.weight, layer.decay_out.bias):
        torch.nn.init.zeros_(parameter)
    x = noise(2, 19, 32, dtype=torch.float64)
    q, k, v = (part(x).view(2, 19, 4, 8).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
    age = torch.arange(19)[:, None] - torch.arange(19)
    o = (q @ k.mT * 2.0 ** (-age / 16)).tril() @ v / 8**0.5
    o = F.rms_norm(o, (8,), layer.norm.weight, 1e-5).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(x), layer.out(o * F.silu(layer.gate(x))))


def test_retnet_scores_depend_on_distance_only():
    layer = make("retnet,num_heads=2").double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for linear in (layer.q, layer.k, layer.v, layer.gate, layer.out):
            linear.weight.copy_(torch.eye(32))
    e = 16
    rates = layer._rates(torch.zeros(1, dtype=torch.float64))
    index = torch.arange(e // 2, dtype=torch.float64)
    zeta = ((2 * index / e + 0.4) / 1.4) ** (1 / 512)
    torch.testing.assert_close(rates["zeta"], zeta.repeat(2))
    assert rates["gamma"].tolist() == [1 - 2**-5, 1 - 2**-6]
    q, k, v = layer._parts(torch.ones(1, 30, 32, dtype=torch.float64), torch.arange(30))
    o, _ = retention_chunked(q, k, v, **rates, chunk=7)
    # all inputs one: 2 cos(age·θ) per pair of channels, decayed, summed over the ages seen
    age = torch.arange(30, dtype=torch.float64)[:, None, None]
    turned = torch.cos(age * 10_000.0 ** (-index / (e // 2)))
    weights = rates["gamma"][:, None] ** age * (zeta**age)
    expected = (2 * turned * weights).sum(-1).cumsum(0) / e**0.5
    torch.testing.assert_close(o[0, :, :, 0].T, expected)


def test_rwkv5_without_decay_and_unit_bonus_is_linear_attention():
    layer = make("rwkv5-time-mixer,head_dim=8").double()
    with torch.no_grad():
        layer.decay.fill_(-80.0)
        layer.bonus.fill_(1.0)
        layer.mix.fill_(1.0)  # the shifted token has no part
    x = noise(2, 19, 32, dtype=torch.float64)
    r, k, v = (part(x).view(2, 19, 4, 8).transpose(1, 2) for part in (layer.r, layer.k, layer.v))
    o = ((r @ k.mT).tril() @ v).transpose(1, 2) / 8
    normal = F.layer_norm(o, (8,), eps=1e-5).flatten(-2) * layer.norm.weight + layer.norm.bias
    torch.testing.assert_close(layer(x), layer.out(normal * F.silu(layer.gate(x))))


@pytest.mark.parametrize("version", [5, 6])
def test_rwkv_starts_by_its_place_in_the_stack(version):
    first, last = (
        parse_layer(f"rwkv{version}-time-mixer").make(128, 64, layer_id=i, n_layers=4)
        for i in (0, 3)
    )
    i = torch.arange(128)
    assert first.decay.flatten()[0] == last.decay.flatten()[0] == -6
    torch.testing.assert_close(first.decay.flatten(), -6 + 5 * (i / 127) ** 0.7)
    torch.testing.assert_close(last.decay.flatten(), -6 + 5 * (i / 127) ** 2.0)
    zigzag = 0.1 * ((i + 1) % 3 - 1)
    torch.testing.assert_close(first.bonus.flatten(), zigzag)
    torch.testing.assert_close(last.bonus.flatten(), 1 - i / 127 + zigzag)
    k, v, r = (0, 1, 2) if version == 5 else (1, 2, 3)
    for layer, exponent, lift in ((first, 1.0, 0.0), (last, 0.25, 0.3)):
        expected = (i / 128) ** exponent, (i / 128) ** exponent + lift, (i / 128) ** (exponent / 2)
        for row, value in zip((k, v, r), expected, strict=True):
            torch.testing.assert_close(layer.mix[row], value if version == 5 else 1 - value)
    with pytest.raises(ConfigError, match="layer_id=4 of n_layers=4"):
        parse_layer(f"rwkv{version}-time-mixer").make(32, 64, layer_id=4, n_layers=4)


def test_rwkv6_decays_follow_the_input_by_hand():
    layer = make("rwkv6-time-mixer,head_dim=8").double()
    x = noise(1, 3, 32, dtype=torch.float64)
    before, now = x[0, 1], x[0, 2]
    base = now + (before - now) * layer.mix_base
    low = torch.tanh(base @ layer.mix_in)[:32]  # the first of five: w
    w = now + (before - now) * (layer.mix[0] + low @ layer.mix_out[0])
    rate = torch.exp(layer.decay.flatten() + torch.tanh(w @ layer.decay_in) @ layer.decay_out)
    *_, g = layer._parts(x, F.pad(x[:, :-1], (0, 0, 1, 0)))
    torch.testing.assert_close(g[0, :, 2].flatten(), -rate)


def test_rwkv_channel_mixers_by_hand():
    for version in (5, 6):
        layer = make(f"rwkv{version}-channel-mixer,hidden=7", width=6).double()
        assert isinstance(layer.mix, torch.Tensor)
        x = noise(1, 4, 6, dtype=torch.float64)
        before, now = x[0, 2], x[0, 3]
        mix = layer.mix if version == 5 else 1 - layer.mix
        k, r = (now * m + before * (1 - m) for m in mix.unbind(0))
        expected = torch.sigmoid(layer.r(r)) * layer.v(layer.k(k).clamp_min(0) ** 2)
        torch.testing.assert_close(layer(x)[0, 3], expected)


def test_mlstm_gates_survive_the_model_s_zeroing_of_biases():
    model = build_model(["mlstm", "mamba"], vocab_size=9, width=32, max_length=16, seed=0)
    torch.testing.assert_close(model.layers[0].gates.bias[8:], torch.linspace(3, 6, 8))
    assert (model.layers[1].dt.bias < -2).all(), "softplus⁻¹ of steps up to .1"


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
        ("mlstm,chunk=0", "chunk=0"),
        ("rwkv5-time-mixer,head_dim=5", "not a multiple of head_dim=5"),
        ("rwkv6-time-mixer,mix_rank=0", "mix_rank=0"),
        ("rwkv6-channel-mixer,hidden=0", "hidden=0"),
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
        make("mamba,kernel=fused")(noise(1, 3, 32))
