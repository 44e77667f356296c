"""Driving blocks one by one gives the model's own logits; states continue and roll back exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.adapters.base import ADAPTERS, adapt
from early_exit.adapters.mamba import chunked_scan
from workbench.errors import ConfigError
from workbench.tiny import tiny_model

FAMILIES = ("mistral", "llama", "phi3", "mamba", "mamba2")


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


def text(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (batch, length), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_models_own_forward(family: str):
    model = tiny_model(family)
    assert adapt(model).disagreement(text(41, batch=2)) <= 1e-5


@pytest.mark.parametrize("config", ["qwen2", "qwen3"])
def test_biases_and_head_norms_are_followed(config: str):
    import transformers

    name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[config]
    settings_ = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**settings_)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert adapt(model.eval()).disagreement(text(30) % 97) <= 1e-4


def test_a_sliding_window_is_followed():
    adapter = adapt(tiny_model("mistral", sliding_window=5))
    ids = text(24)
    assert adapter.disagreement(ids) <= 1e-5
    state = adapter.new_cache(1, 24)
    with torch.no_grad():
        parts = [
            adapter.run(adapter.embed(ids[:, low:high]), 0, 4, state, low)
            for low, high in ((0, 9), (9, 10), (10, 24))
        ]
        joined = adapter.logits(torch.cat(parts, dim=1))
    assert torch.allclose(joined, adapter.full(ids), atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["mistral", "mamba", "mamba2"]),
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    seed=st.integers(0, 99),
)
def test_a_text_in_pieces_equals_the_whole(family: str, cuts: list[int], seed: int):
    adapter = adapt(tiny_model(family).double(), check=False)
    ids = text(40, batch=2, seed=seed)
    state = adapter.new_cache(2, 40)
    edges = [0, *sorted(cuts), 40]
    with torch.no_grad():
        parts = [
            adapter.run(adapter.embed(ids[:, a:b]), 0, 4, state, a) for a, b in pairwise(edges)
        ]
    error = (adapter.logits(torch.cat(parts, dim=1)) - adapter.full(ids)).abs().max()
    assert float(error) <= 1e-11


def test_chunked_scan_equals_the_recurrence():
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, 70, 3, 4, generator=generator, dtype=torch.double)
    b, c = (torch.randn(2, 70, 3, 5, generator=generator, dtype=torch.double) for _ in range(2))
    a = -torch.rand(2, 70, 3, generator=generator, dtype=torch.double) * 3
    state = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.double)
    fast, last = chunked_scan(u, a, b, c, state)
    for t in range(70):
        state = a[:, t].exp()[..., None, None] * state + u[:, t, :, :, None] * b[:, t, :, None]
        expected = torch.einsum("bhpn,bhn->bhp", state, c[:, t])
        assert torch.allclose(fast[:, t], expected, atol=1e-12)
    assert torch.allclose(last, state, atol=1e-12)


@pytest.mark.parametrize("family", ["mistral", "mamba", "mamba2"])
def test_rollback_is_bit_exact(family: str):
    adapter = adapt(tiny_model(family), check=False)
    state = adapter.new_cache(1, 40)
    with torch.no_grad():
        adapter.run(adapter.embed(text(11)), 0, 4, state, 0)
        before = [{k: v.clone() for k, v in state.entries(j).items()} for j in range(4)]
        snapshot = state.snapshot()
        adapter.run(adapter.embed(text(7, seed=5)), 0, 4, state, 11)
        state.rollback(snapshot)
    for j in range(4):
        for name, value in state.entries(j).items():
            assert torch.equal(value, before[j][name])


def test_propagated_keys_and_values_have_the_closed_form():
    """k_j = R(t) W^K_j norm_j(h), v_j = W^V_j norm_j(h), with the model's own modules."""
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    model = tiny_model("mistral")
    adapter = adapt(model, check=False)
    hidden, position = torch.randn(1, 1, 64), 13
    states = [adapter.new_cache(1, 32) for _ in range(2)]
    with torch.no_grad():
        for state, kernel in zip(states, ("fused", "reference"), strict=True):
            adapter.run(adapter.embed(text(position)), 0, 4, state, 0)
            adapter.fill(hidden, 1, 4, state, position, "propagate", kernel=kernel)  # type: ignore[call-arg]
        cos, sin = model.model.rotary_emb(hidden, torch.tensor([[position]]))
        for j in range(1, 4):
            block = model.model.layers[j]
            normed = block.input_layernorm(hidden)
            k = block.self_attn.k_proj(normed).view(1, 1, 2, 16).transpose(1, 2)
            v = block.self_attn.v_proj(normed).view(1, 1, 2, 16).transpose(1, 2)
            k, _ = apply_rotary_pos_emb(k, k, cos, sin)
            for state in states:
                entries = state.entries(j)
                assert torch.allclose(entries["k"][:, :, -1:], k, atol=1e-5)
                assert torch.allclose(entries["v"][:, :, -1:], v, atol=1e-5)
        assert states[0].lengths == [13, 14, 14, 14]


def test_propagated_mamba2_state_has_the_closed_form():
    """S ← exp(ΔA) S + Δ x ⊗ B with the conv over norm_j(h), no output computed."""
    import torch.nn.functional as F

    model = tiny_model("mamba2").double()
    adapter = adapt(model, check=False)
    hidden = torch.randn(1, 1, 64, dtype=torch.double)
    state = adapter.new_cache(1, 32)
    with torch.no_grad():
        adapter.run(adapter.embed(text(6)), 0, 4, state, 0)
        before = {k: v.clone() for k, v in state.entries(2).items()}
        adapter.fill(hidden, 2, 3, state, 6, "propagate")
        mixer = model.backbone.layers[2].mixer
        unit = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        projected = mixer.in_proj(unit * model.backbone.layers[2].norm.weight)[0, 0]
        xbc, dt = projected[128 : 128 + 160], projected[-8:]
        window = torch.cat([before["conv"][0], xbc[:, None]], dim=1)
        mixed = F.silu((window * mixer.conv1d.weight[:, 0]).sum(1) + mixer.conv1d.bias)
        x, b = mixed[:128].view(8, 16), mixed[128:144]
        step = F.softplus(dt + mixer.dt_bias)
        decay = torch.exp(-step * mixer.A_log.exp())
        expected = decay[:, None, None] * before["recurrent"][0]
        expected = expected + (step[:, None] * x)[:, :, None] * b
    assert torch.allclose(state.entries(2)["recurrent"][0], expected, atol=1e-10)
    assert torch.allclose(state.entries(2)["conv"][0], window[:, 1:], atol=1e-12)


def test_copying_the_token_before_turns_its_key_on_by_one():
    adapter = adapt(tiny_model("mistral").double(), check=False)
    state = adapter.new_cache(1, 16)
    hidden = adapter.embed(text(1)).detach()
    with torch.no_grad():
        for position in range(2):  # the same stream at two positions, as a reference
            adapter.fill(hidden, 0, 4, state, position, "propagate")
        snapshot = state.snapshot()
        reference = [state.entries(j)["k"][:, :, 1].clone() for j in range(4)]
        state.rollback([1] * 4)
        adapter.fill(hidden, 0, 4, state, 1, "copy_token")
    assert state.lengths == snapshot
    for j in range(4):
        assert torch.allclose(state.entries(j)["k"][:, :, 1], reference[j], atol=1e-6)


def test_published_sizes_of_the_two_backbones():
    import transformers

    with torch.device("meta"):
        mistral = transformers.MistralForCausalLM(
            transformers.MistralConfig(
                vocab_size=32768, num_hidden_layers=1, sliding_window=None, head_dim=128
            )
        )
        mamba = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                vocab_size=32768, hidden_size=4096, num_hidden_layers=1, n_groups=8, state_size=128
            )
        )
    costs = adapt(mistral, check=False).costs()
    assert costs.block == 218_103_808
    assert costs.kappa == pytest.approx(1 / 26)
    assert costs.vocabulary / costs.block == pytest.approx(8 / 13)
    adapter = adapt(mamba, check=False)
    costs = adapter.costs()
    assert costs.block == 109_617_152
    assert costs.kappa == pytest.approx(0.3877886, abs=1e-7)
    assert costs.vocabulary / costs.block == pytest.approx(1.2244227, abs=1e-7)
    assert adapter.gate_width == 8192


def test_an_unknown_layout_names_the_missing_attribute():
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no attribute 'model'"):
        adapt(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="unknown adapter 'atention'; nearest: attention"):
        adapt(tiny_model("mistral"), name="atention")
    assert set(ADAPTERS) == {"attention", "mamba"}


def test_a_layout_that_only_looks_familiar_is_refused():
    model = tiny_model("mistral")
    model.model.layers[1].mlp.forward = lambda x: (
        x
    )  # another feed-forward part than the weights say
    adapt(model)  # called as a module, it is still followed

    class Scaled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, *args: object, **kwargs: object):
            out = self.inner(*args, **kwargs)
            out.logits = out.logits * 3
            return out

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    with pytest.raises(ConfigError, match="computes something else"):
        adapt(Scaled(model))
