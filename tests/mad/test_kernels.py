"""CUDA kernels in layers: what they are given and what is made of their answer, without a GPU.

Each stand-in below is the plain recurrence that its package documents, in that package's axes and
conventions, written from its documentation alone. A layer that calls it must equal its reference.
"""

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mad.layers import kernels
from mad.layers.mamba import Mamba
from mad.registry import parse_layer
from workbench.engines import ENGINES, available
from workbench.errors import ConfigError, MissingExtra
from workbench.integrations.kernels import KERNELS

WIDTH, LENGTH = 24, 11


def make(text, width=WIDTH, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return parse_layer(text).make(width, 64)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- stand-ins, as documented


def matrix_states(k, v):
    """Checks (B, T, H, K) and (B, T, H, V), and gives an empty [B, H, K, V]."""
    assert k.shape[:3] == v.shape[:3]
    batch, time, heads, width = k.shape
    assert (batch, time, heads) == (2, LENGTH, 3), "time stands before heads"
    return k.new_zeros(batch, heads, width, v.shape[-1])


def decayed(q, k, v, g, scale, bonus=None):
    """h = exp(g) h + k v; o = scale · q h, the bonus case before the update."""
    assert q.shape == k.shape
    h, outputs = matrix_states(k, v), []
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    for t in range(k.shape[1]):
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        after = h * g[:, t].exp().unsqueeze(-1) + kv
        seen = after if bonus is None else h + bonus[None, :, :, None] * kv
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, seen))
        h = after
    return torch.stack(outputs, 1)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape == g.shape
    return decayed(q, k, v, g, scale), None


def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    assert r.shape == w.shape
    assert u.shape == r.shape[2:]
    return decayed(r, k, v, w, scale, u), None


def chunk_retention(q, k, v, scale=None, initial_state=None, output_final_state=False):
    g = (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2], dtype=q.dtype))).log()
    return decayed(q, k, v, g[None, None, :, None].expand_as(k), scale), None


def chunk_linear_attn(
    q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True
):
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    o = decayed(q, k, v, torch.zeros_like(k), scale)
    if normalize:
        o = o / ((q * scale * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10)
    return o, None


def parallel_based(q, k, v, scale=None, use_norm=True):
    matrix_states(k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    weights = (1 + scores + scores.square() / 2).tril()
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    if use_norm:
        o = o / (weights.sum(-1).transpose(1, 2)[..., None] + 1e-6)
    return o


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False
):
    assert g.shape == beta.shape == q.shape[:3]
    h, outputs = matrix_states(k, v), []
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    for t in range(k.shape[1]):
        h = h * g[:, t].exp()[..., None, None]
        gap = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], h)
        h = h + torch.einsum("bhk,bhv->bhkv", k[:, t], gap * beta[:, t, :, None])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, h))
    return torch.stack(outputs, 1), None


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    assert q.dtype == k.dtype == v.dtype
    return chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, scale)


def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False):
    h, outputs = matrix_states(k, v), []
    for t in range(k.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], h)
        h = h * w[:, t].exp().unsqueeze(-1)
        h = h + torch.einsum("bhk,bhv->bhkv", b[:, t], read)
        h = h + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t] * scale, h))
    return torch.stack(outputs, 1), None


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    batch, channels, time = u.shape
    assert (batch, time) == (2, LENGTH), "channels stand before time"
    assert delta.shape == u.shape
    assert B.shape == C.shape == (batch, A.shape[1], time)
    h, outputs = u.new_zeros(batch, channels, A.shape[1]), []
    for t in range(time):
        d = delta[..., t, None]
        h = torch.exp(d * A) * h + d * B[:, None, :, t] * u[..., t, None]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None):
    batch, time, heads, width = x.shape
    assert chunk_size >= 16
    assert chunk_size & (chunk_size - 1) == 0, "a power of two"
    assert (batch, time) == (2, LENGTH)
    assert dt.shape == (batch, time, heads)
    B, C = (p.repeat_interleave(heads // p.shape[2], dim=2) for p in (B, C))
    h, outputs = x.new_zeros(batch, heads, width, B.shape[-1]), []
    for t in range(time):
        d = dt[:, t, :, None, None]
        h = torch.exp(d * A[:, None, None]) * h + d * x[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    channels, taps = weight.shape
    assert x.shape == (2, channels, LENGTH)
    assert 2 <= taps <= 4
    y = F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=channels)[..., :LENGTH]
    assert activation in (None, "silu")
    return y if activation is None else F.silu(y)


STAND_INS = {
    "gla": chunk_gla,
    "rwkv6": chunk_rwkv6,
    "rwkv7": chunk_rwkv7,
    "retention": chunk_retention,
    "linear_attention": chunk_linear_attn,
    "based": parallel_based,
    "delta_rule": chunk_delta_rule,
    "gated_delta_rule": chunk_gated_delta_rule,
    "selective_scan": selective_scan_fn,
    "ssd": mamba_chunk_scan_combined,
    "causal_conv1d": causal_conv1d_fn,
}


def pretend(monkeypatch, *, without=()):
    """Packages with these functions under their own names, on a device that calls itself CUDA."""
    calls = []
    for name, function in STAND_INS.items():
        engine, where = KERNELS[name]
        module, _, attribute = where.partition(":")
        assert function.__name__ == attribute
        if engine in without:
            continue

        def counted(*args, _function=function, _name=name, **options):
            calls.append(_name)
            return _function(*args, **options)

        for depth in range(1, len(module.split(".")) + 1):
            part = ".".join(module.split(".")[:depth])
            if not isinstance(sys.modules.get(part), types.ModuleType):
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setattr(sys.modules[module], attribute, counted, raising=False)
        exact = replace(kernels.FUSED[name], dtypes=(torch.float64,), auto=(torch.float64,))
        monkeypatch.setitem(kernels.FUSED, name, exact)
    for engine in without:
        monkeypatch.setitem(sys.modules, ENGINES[engine].module, None)
    real = kernels.fused_kernel
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "fused_kernel", lambda name, kernel, device: real(name, kernel))
    return calls


LAYERS = {
    "gated-linear-attention,num_heads=3": ["gla"],
    "gated-linear-attention,num_heads=3,clamp_min=-0.01": ["gla"],
    "linear-attention,num_heads=3": ["linear_attention"],
    "linear-attention,num_heads=3,feature_map=elu,normalize=sum,norm_k=true": ["linear_attention"],
    "linear-attention,num_heads=3,feature_map=taylor,norm_q=true": ["linear_attention"],
    "linear-attention,num_heads=3,feature_map=taylor": ["based"],
    "based,num_heads=3,feature_width=5": ["based"],
    "retnet,num_heads=3": ["gla"],
    "retnet,num_heads=3,xpos=false": ["retention"],
    "deltanet,num_heads=3,negative_eigenvalues=true": ["causal_conv1d", "delta_rule"],
    "deltanet,num_heads=3,short_conv=5": ["delta_rule"],
    "gated-deltanet,num_heads=3,short_conv=2": ["causal_conv1d", "gated_delta_rule"],
    "rwkv5-time-mixer,head_dim=8": ["rwkv6"],
    "rwkv6-time-mixer,head_dim=8": ["rwkv6"],
    "rwkv7,head_dim=8": ["rwkv7"],
    "mamba,d_conv=3": ["causal_conv1d", "selective_scan"],
    "mamba,d_conv=1": ["selective_scan"],
    "mamba2,head_dim=8,groups=2,chunk=20": ["causal_conv1d", "ssd"],
}


def compare(layer, other, x, rtol, atol, context=None):
    """Outputs and gradients of two layers with the same parameters."""
    results = []
    for one in (layer, other):
        one.zero_grad()
        given = x.clone().requires_grad_()
        if context is None:
            y = one(given)
        else:
            with context():
                y = one(given)
        names, parameters = zip(*one.named_parameters(), strict=True)
        weights = torch.linspace(-1, 2, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
        gradients = torch.autograd.grad((y * weights).sum(), (given, *parameters))
        results.append(dict(zip(("y", "x", *names), (y, *gradients), strict=True)))
    for name, found in results[0].items():
        wanted = results[1][name]
        largest = max(atol, rtol * float(wanted.detach().abs().max()))
        torch.testing.assert_close(
            found, wanted, rtol=rtol, atol=largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def agitated(layer, dtype=torch.float64):
    """The layer with parameters that hide nothing: no zeros, no ones, decays that matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return layer.to(dtype)


@pytest.mark.parametrize(("text", "expected"), LAYERS.items(), ids=list(LAYERS))
def test_a_layer_on_its_kernel_is_its_reference(text, expected, monkeypatch):
    fused, plain = (agitated(make(f"{text},kernel={k}")) for k in ("fused", "reference"))
    x = noise(2, LENGTH, WIDTH, seed=1)
    calls = pretend(monkeypatch)
    # the filter follows `auto`, which asks whether its input lies on a GPU
    monkeypatch.setattr(kernels, "filter_kernel", lambda kernel: kernel)
    monkeypatch.setattr("mad.layers.convolution.filter_kernel", lambda kernel: kernel)
    compare(fused, plain, x, 1e-9, 1e-10)
    assert calls == expected
    calls.clear()
    plain(x)
    assert calls == [], "kernel=reference asks for none"


def test_every_kernel_of_a_layer_is_tried():
    tried = {name for names in LAYERS.values() for name in names}
    assert tried == set(kernels.FUSED) == set(STAND_INS)


def sequences(layer):
    return [m for m in layer.modules() if hasattr(m, "kernels")]


@pytest.mark.parametrize("text", LAYERS)
def test_auto_without_a_gpu_asks_for_nothing_and_changes_no_bit(text, monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *rest: pytest.fail("asked for a kernel"))
    auto, plain = make(text), make(f"{text},kernel=reference")
    x = noise(2, LENGTH, WIDTH, dtype=torch.float32)
    assert torch.equal(auto(x), plain(x))
    assert all(part.kernel == "auto" for part in sequences(auto))


@pytest.mark.parametrize("text", LAYERS)
def test_a_kernel_that_is_not_here_is_refused_with_its_install_line(text, monkeypatch):
    layer = make(f"{text},kernel=fused")
    name = sequences(layer)[0].kernels
    engine = KERNELS[next(n for n, kernel in name.items() if kernel == "fused")][0]
    monkeypatch.setitem(sys.modules, ENGINES[engine].module, None)
    with pytest.raises(MissingExtra, match=rf"{engine} is not installed .*\[cuda\]"):
        layer(noise(2, LENGTH, WIDTH, dtype=torch.float32))


@pytest.mark.parametrize(
    "text",
    ["gated-linear-attention", "linear-attention", "based", "retnet", "deltanet", "gated-deltanet",
     "rwkv5-time-mixer", "rwkv6-time-mixer", "rwkv7", "mamba", "mamba2"],
)  # fmt: skip
def test_a_choice_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="reference"):
        parse_layer(f"{text},kernel=cuda").make(64, 64)


def test_fused_asks_for_the_recurrence_and_leaves_the_filter_to_what_is_here(monkeypatch):
    calls = pretend(monkeypatch, without=("causal-conv1d",))
    layer = make("mamba,kernel=fused").double()
    layer(noise(2, LENGTH, WIDTH))
    assert calls == ["selective_scan"]


# ---------------------------------------------------------------- the choice


def chosen(name, kernel, dtype, head=0):
    function, why = kernels.choose(name, kernel, "cuda", dtype, head)
    return function is not None, why


def restored(monkeypatch):
    """Stand-ins under the true limits."""
    limits = dict(kernels.FUSED)
    pretend(monkeypatch)
    for name, use in limits.items():
        monkeypatch.setitem(kernels.FUSED, name, use)


@pytest.mark.parametrize("name", kernels.FUSED)
def test_auto_takes_a_kernel_where_it_loses_nothing(name, monkeypatch):
    restored(monkeypatch)
    exact_in_single = name in ("selective_scan", "ssd", "causal_conv1d")
    assert chosen(name, "auto", torch.bfloat16)[0]
    assert chosen(name, "auto", torch.float16)[0]
    taken, why = chosen(name, "auto", torch.float32)
    assert taken == exact_in_single
    assert taken or why == f"kernel {name}: reference (the layer computes in float32)"
    assert not chosen(name, "auto", torch.float64)[0]
    assert not chosen(name, "reference", torch.bfloat16)[0]


def test_fused_says_what_the_kernel_cannot_do(monkeypatch):
    restored(monkeypatch)
    assert chosen("gla", "fused", torch.float32)[0]
    with pytest.raises(ConfigError, match="computes in float32; set --dtype to bfloat16 or float"):
        chosen("delta_rule", "fused", torch.float32)
    with pytest.raises(ConfigError, match="computes in float64"):
        chosen("gla", "fused", torch.float64)
    assert chosen("rwkv7", "fused", torch.bfloat16, 256)[0]
    with pytest.raises(ConfigError, match="a head is 257 wide, the kernel takes 256"):
        chosen("rwkv7", "fused", torch.bfloat16, 257)
    assert not chosen("rwkv7", "auto", torch.bfloat16, 257)[0]


def test_the_precision_of_a_layer_is_that_of_its_products():
    x = torch.zeros(1)
    assert kernels.working_dtype(x) == torch.float32
    assert kernels.working_dtype(x.half()) == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.working_dtype(x) == torch.bfloat16


def test_half_precision_reaches_the_kernel_and_sums_stay_fine(monkeypatch):
    seen = {}

    def spy(*parts, scale):
        seen["dtypes"] = [part.dtype for part in parts]
        return parts[2], None

    monkeypatch.setattr(kernels, "fused_kernel", lambda *rest, **options: (spy, "here"))
    half, single = torch.bfloat16, torch.float32
    x = noise(1, 5, 32, dtype=single)
    for text, dtypes in {
        "gated-linear-attention": [half, half, half, single],
        "rwkv6-time-mixer": [half, half, half, single, single],
        "rwkv7": [half, single, half, half, half, half],
        "deltanet": [half, half, half, half],
        "gated-deltanet": [half, half, half, single, half],
    }.items():
        with torch.autocast("cpu", dtype=half):
            y = make(f"{text},kernel=fused", width=32)(x)
        assert seen["dtypes"] == dtypes, text
        assert y.dtype == half


def test_stacked_replicas_keep_the_reference(monkeypatch):
    pretend(monkeypatch)
    layer = make("gated-linear-attention,num_heads=3,kernel=fused").double()
    with pytest.raises(ConfigError, match="kernel gla: it cannot run under vmap"):
        torch.func.vmap(layer)(noise(2, 2, LENGTH, WIDTH))


def test_notes_name_each_kernel_once(monkeypatch):
    model = nn.Sequential(make("mamba"), make("mamba"), make("rwkv7,head_dim=8,kernel=reference"))
    notes = kernels.kernel_notes(model, "cpu", torch.float32)
    assert len(notes) == 3
    assert notes[0].startswith("kernel selective_scan: ")
    assert notes[2] == "kernel rwkv7: reference (asked for)"
    restored(monkeypatch)
    assert kernels.kernel_notes(nn.Sequential(make("deltanet")), "cuda", torch.float32)[0] == (
        "kernel delta_rule: reference (the layer computes in float32)"
    )
    assert isinstance(model[0], Mamba)


# ---------------------------------------------------------------- on a GPU


def missing(names):
    """Why these kernels cannot be tried here, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    engines = {KERNELS[name][0] for name in names}
    return ", ".join(f"{engine} is not here" for engine in engines if not available(engine))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize(("text", "names"), LAYERS.items(), ids=list(LAYERS))
def test_compiled_kernels_agree(text, names, length, dtype):
    if reason := missing(names):
        pytest.skip(reason)
    if dtype not in kernels.FUSED[names[-1]].dtypes:
        pytest.skip("the kernel refuses this precision")
    text = text.replace("num_heads=3", "num_heads=4").replace("head_dim=8", "head_dim=16")
    layers = (make(f"{text},kernel={k}", width=64).cuda() for k in ("fused", "reference"))
    x = noise(2, length, 64, dtype=torch.float32).cuda()
    half = dtype is torch.bfloat16
    rtol = 5e-2 if half else 5e-3  # bfloat16 has 8 bits, TF32 has 11

    def context():
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=half)

    compare(*layers, x, rtol, 1e-4, context)
