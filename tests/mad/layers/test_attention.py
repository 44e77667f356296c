"""Attention: every option as parallel form, single step and equation; replicas under vmap."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.layers.attention import (
    alibi_slopes,
    attend_eager,
    attend_flash,
    attend_sdpa,
    attend_step,
    rotate,
    xpos_decay,
)
from mad.registry import parse_layer
from workbench import engines
from workbench.errors import ConfigError, MissingExtra
from workbench.run import RunOptions

VARIANTS = [
    "attention",
    "mh-attention,num_heads=4",
    "attention,num_heads=4,num_heads_kv=2",
    "attention,num_heads=4,num_heads_kv=1,window=3",
    "sliding-attention,window=3",
    "mh-sliding-attention,num_heads=2,window=0",
    "attention,rotary_interleaved=true,rotary_dim=6",
    "attention,num_heads=2,xpos=true",
    "attention,xpos=true,rotary_interleaved=true,rotary_dim=4,window=4",
    "attention,num_heads=4,alibi=true",
    "attention,num_heads=2,alibi=true,window=2,rotary_dim=4",
    "attention,softmax_scale=0.7,rotary_dim=0",
    "attention,dwconv=true,num_heads=2,num_heads_kv=1",
    "canon-attention",
    "mh-canon-attention,num_heads=4,canon=b",
    "canon-attention,canon=ab,canon_taps=3,window=5,dwconv=true",
    "attention,backend=eager",
]


def make(text: str, width: int = 16, seed: int = 0) -> torch.nn.Module:
    """A layer with its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return parse_layer(text).make(width, 64)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers from their own seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("attention", 66_048),
        ("mh-attention,num_heads_kv=4", 128 * (128 + 2 * 32) + 192 + 128 * 129),
        ("canon-attention", 66_048 + 4 * 128),
        ("mh-canon-attention,canon=ab", 66_048 + 4 * 128 + 4 * 384),
        ("attention,dwconv=true", 66_048 + 3 * 384),
    ],
)
def test_parameters_at_the_published_width(text, params):
    assert make(text, width=128).accounting(128).params == params


def test_grouped_cache_is_smaller_by_the_share():
    full, shared = make("attention,num_heads=4"), make("attention,num_heads=4,num_heads_kv=1")
    assert full.state_floats(10) == 2 * 16 * 10 == 4 * shared.state_floats(10)
    assert full.kv_bytes(10) == 2 * full.state_floats(10)
    assert make("attention,window=3").state_floats(10) == 2 * 16 * 4
    assert make("canon-attention,canon=ab").state_floats(10) == 2 * 16 * 10 + 3 * 16 + 3 * 48
    assert make("canon-attention,canon=ab").matrix_state_floats(10) == 2 * 16 * 10


def test_interleaved_rotation_is_the_half_split_one_of_reordered_dimensions():
    x = noise(1, 2, 9, 8)
    order = torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])  # evens, odds, rest
    expected = rotate(x[..., order], 6)
    torch.testing.assert_close(rotate(x, 6, interleaved=True)[..., order], expected)
    assert not torch.allclose(rotate(x, 6), rotate(x, 6, interleaved=True))


def test_xpos_multiplies_each_pair_by_its_rate():
    decay = xpos_decay(torch.tensor([0.0, 512.0, 1024.0]), 4, 5)
    rates = torch.tensor([0.4 / 1.4, 0.9 / 1.4, 0.4 / 1.4, 0.9 / 1.4, 1.0])
    torch.testing.assert_close(decay, torch.stack([rates**0, rates, rates**2]))
    pairs = xpos_decay(torch.tensor([512.0]), 4, 4, interleaved=True)[0]
    torch.testing.assert_close(pairs, rates[[0, 0, 1, 1]])


def test_xpos_scores_decay_with_the_distance_alone():
    """q·k of equal unrotated vectors at distance δ is Σ_n |pair_n|² ζ_n^(δ/512) cos(δ θ_n)."""
    layer = make("attention,xpos=true,rotary_dim=4", width=4).double()
    index = torch.arange(7, dtype=torch.float64) - 3
    ones = torch.ones(1, 1, 7, 4, dtype=torch.float64)
    q, k = rotate(ones, 4) * layer._decay(index), rotate(ones, 4) / layer._decay(index)
    scores = (q @ k.transpose(-1, -2))[0, 0]
    for i, j in ((6, 0), (3, 1), (5, 5)):
        expected = sum(
            2 * rate ** ((i - j) / 512) * math.cos((i - j) * angle)
            for rate, angle in ((0.4 / 1.4, 1.0), (0.9 / 1.4, 0.01))
        )
        assert scores[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_alibi_by_hand():
    assert alibi_slopes(8).tolist() == pytest.approx([2.0**-h for h in range(1, 9)])
    zero, v = torch.zeros(1, 2, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    mixed = attend_eager(zero, zero, v, slopes=torch.tensor([0.5, 2.0]))
    assert mixed[0, :, 1, 0].tolist() == pytest.approx(
        [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.0))]
    )


def test_shared_key_heads_are_repeated_heads():
    q, k, v = noise(1, 4, 6, 3), noise(1, 2, 6, 3, seed=1), noise(1, 2, 6, 3, seed=2)
    shared = attend_eager(q, k, v)
    for head in range(4):
        own = attend_eager(q[:, [head]], k[:, [head // 2]], v[:, [head // 2]])
        torch.testing.assert_close(shared[:, [head]], own)


def test_canon_adds_the_convolution_it_names():
    x = noise(2, 6, 16)
    plain = make("attention").double()
    for point in ("a", "b"):
        layer = make(f"canon-attention,canon={point}").double()
        layer.load_state_dict(plain.state_dict(), strict=False)
        taps = layer.before if point == "a" else layer.after
        torch.nn.init.zeros_(taps)
        torch.testing.assert_close(layer(x), plain(x))
        taps.data[-2] = 1.0  # x_t + x_{t−1}
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        if point == "a":
            torch.testing.assert_close(layer(x), plain(x + before))
        else:
            p = plain.qkv(x)
            shifted = torch.cat([torch.zeros_like(p[:, :1]), p[:, :-1]], dim=1)
            torch.testing.assert_close(layer.project(x), p + shifted)


# ---------------------------------------------------------------- one form equals another


@given(
    st.integers(1, 17), st.one_of(st.none(), st.integers(0, 20)), st.booleans(), st.integers(0, 9)
)
@settings(max_examples=25, deadline=None)
def test_fused_and_single_query_attention_are_the_eager_one(length, window, biased, seed):
    q = noise(2, 4, length, 5, seed=seed).requires_grad_()
    k, v = (noise(2, 2, length, 5, seed=seed + n).requires_grad_() for n in (10, 20))
    options = {"scale": 0.3, "slopes": alibi_slopes(4).double() if biased else None}
    slow = attend_eager(q, k, v, window, **options)
    fast = attend_sdpa(q, k, v, window, **options)
    first = 0 if window is None else -(window + 1)
    steps = torch.stack(
        [
            attend_step(q[:, :, t], *(z[:, :, : t + 1][:, :, first:] for z in (k, v)), **options)
            for t in range(length)
        ],
        dim=2,
    )
    expected = torch.autograd.grad(slow.square().sum(), (q, k, v))
    for other in (fast, steps):
        torch.testing.assert_close(other, slow, rtol=1e-9, atol=1e-12)
        gradients = torch.autograd.grad(other.square().sum(), (q, k, v))
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("text", VARIANTS)
def test_forms(forms, text):
    forms.parallel_is_recurrent(text)
    forms.state_is_as_stated(text)
    forms.causal(text)
    forms.replicas(text)
    forms.half_precision(text)


def test_sequences_of_a_batch_may_stand_at_different_positions():
    layer = make("attention,num_heads=2,xpos=true").double()
    x = noise(2, 6, 16)
    state = layer.initial_state(2, dtype=torch.float64)
    state["position"] = torch.tensor([0, 1000])  # a rotation sees distances alone
    outputs = []
    for t in range(6):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), layer(x), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- what a Canon filter is for


@pytest.mark.slow
def test_a_canon_filter_spares_recall_its_plateau(tmp_path):
    """Recall with V = 16, L = 32 is solved within 200 steps; without the filter it is not begun.

    The plateau is the share of a context's commonest value, about .35.
    """
    train = importlib.import_module("mad.train")  # the name in `mad` is the function
    scores = {}
    for name in ("mh-canon-attention", "mh-attention"):
        experiment = train.Experiment(
            task="in-context-recall",
            layers=(f"{name},num_heads=4", "swiglu") * 2,
            vocab_size=16,
            seq_len=32,
            num_test_examples=512,
            dim=64,
            batch_size=64,
            lr=2e-3,
            epochs=1,
            run=RunOptions(root=tmp_path, device="cpu", threads=1),
        )
        scores[name] = train.main(experiment)["test_accuracy"]
    assert scores["mh-canon-attention"] > 0.95
    assert scores["mh-attention"] < 0.5


# ---------------------------------------------------------------- bad input, other backends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention,num_heads=4,num_heads_kv=3", "num_heads=4 is not divisible by num_heads_kv=3"),
        ("attention,num_heads_kv=0", "not divisible"),
        ("attention,xpos=true,rotary_dim=0", "rotary_dim is 0"),
        ("attention,backend=fused", "expected auto, sdpa, flash or eager"),
        ("attention,canon=c", "expected none, a, b or ab"),
        ("canon-attention,canon_taps=1", "sees no other position"),
    ],
)
def test_impossible_options_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        make(text)


def test_flash_says_what_it_lacks(monkeypatch):
    q = noise(1, 1, 4, 8, dtype=torch.float32)
    with pytest.raises(ConfigError, match="float16 or bfloat16"):
        attend_flash(q, q, q)
    monkeypatch.setitem(engines.ENGINES, "flash-attn", engines.Engine("no_such", "cuda", "a", "b"))
    q = q.bfloat16()
    with pytest.raises(MissingExtra, match="flash-attn"):
        attend_flash(q, q, q)


@pytest.mark.gpu
@pytest.mark.skipif(not engines.available("flash-attn"), reason="flash-attn is not here")
@pytest.mark.parametrize(("window", "biased"), [(None, False), (5, False), (None, True)])
def test_flash_agrees_with_the_written_out_form(window, biased):
    q = noise(2, 4, 33, 16).to("cuda", torch.bfloat16)
    k, v = (noise(2, 2, 33, 16, seed=n).to("cuda", torch.bfloat16) for n in (1, 2))
    slopes = alibi_slopes(4, q.device) if biased else None
    fast = attend_flash(q, k, v, window, slopes=slopes)
    slow = attend_eager(q.float(), k.float(), v.float(), window, slopes=slopes)
    torch.testing.assert_close(fast.float(), slow, rtol=2e-2, atol=2e-2)
