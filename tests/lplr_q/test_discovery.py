import pytest
import torch
from torch import nn

from lplr_q.activation_aware.discovery import (
    UnfusedExperts,
    decoder_blocks,
    fused_experts,
    is_linear,
    linear_names,
    linear_shape,
    linear_weight,
    unfuse_experts,
    unfused_names,
)
from lplr_q.activation_aware.hessian import collect_hessians
from tests.lplr_q.families import FAMILIES, MOE, family_model
from workbench.errors import ConfigError, DataError

EXPECTED = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "mamba2": {"in_proj", "out_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "qwen2_moe": {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_matrix_of_the_blocks_is_found(family):
    model = family_model(family)
    assert bool(unfuse_experts(model)) == (family in MOE)
    found = linear_names(model)
    names = [name for block in found.values() for name in block]
    assert {name.rpartition(".")[2] for name in names} == EXPECTED[family]
    assert set(found) == {0, 1}
    assert not any("lm_head" in name for name in names)
    for name in names:
        module = model.get_submodule(name)
        weight = linear_weight(module)
        assert weight.shape == linear_shape(module)
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), x @ weight.T + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_experts_apart_compute_the_same(family):
    model = family_model(family)
    tokens = torch.randint(3, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        names = unfuse_experts(model)
        after = model(input_ids=tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert len(names) == 2
    for name in names:
        assert isinstance(model.get_submodule(name), UnfusedExperts)
    assert not fused_experts(model)
    assert unfuse_experts(model) == []
    assert unfused_names([f"{names[0]}.3.down_proj", "model.layers.0.self_attn.q_proj"]) == [
        names[0]
    ]


def test_routers_and_gates_of_one_column_are_left_alone():
    model = family_model("qwen2_moe")
    unfuse_experts(model)
    names = [name for block in linear_names(model).values() for name in block]
    assert not any(name.endswith(("mlp.gate", "shared_expert_gate")) for name in names)
    assert any(".shared_expert.down_proj" in name for name in names)


def test_experts_of_another_form_are_reported_and_kept():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 24))
            self.down_proj = nn.Parameter(torch.zeros(4, 12, 8))
            self.act_fn = nn.SiLU()

    model = nn.ModuleDict({"experts": Transposed()})
    assert fused_experts(model) == {"experts": False}
    assert unfuse_experts(model) == []


def test_on_the_meta_device_nothing_is_allocated():
    model = family_model("mixtral").to("meta")
    (first, *_) = unfuse_experts(model)
    expert = model.get_submodule(f"{first}.0.down_proj")
    assert expert.weight.is_meta
    assert expert.weight.shape == (64, 48)


def test_an_expert_that_saw_too_little_takes_the_pooled_moment():
    model = family_model("mixtral")
    unfuse_experts(model)
    tokens = torch.randint(3, 200, (3, 42), generator=torch.Generator().manual_seed(1))
    calibration = collect_hessians(model, tokens, include=r"layers\.0\.")
    own = calibration.of("model.layers.0.self_attn.q_proj")
    assert own.count == tokens.numel()
    pooled = calibration.moments.get("0.mlp.experts.pooled.gate_up_proj")
    assert pooled is not None
    assert pooled.count == 2 * tokens.numel()  # two experts per token
    counts = {}
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}.gate_up_proj"
        key = calibration.key_of[name]
        counts[key] = calibration.moments[key].count
        assert ".pooled." in key or counts[key] >= 64
    up = pooled.matrix()
    x = []
    handle = model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(
        lambda _m, args: x.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    seen = torch.cat(x)
    torch.testing.assert_close(up, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-6)


def test_padding_does_not_reach_the_experts_moments():
    model = family_model("mixtral")
    unfuse_experts(model)
    tokens = torch.randint(3, 200, (4, 40), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.long)], dim=1)
    mask = (torch.arange(49) < 40).expand(4, 49)
    only = {"include": r"layers\.0\.mlp"}
    plain = collect_hessians(model, tokens, **only)
    masked = collect_hessians(model, padded, mask=mask, **only)
    for key, moment in plain.moments.items():
        assert masked.moments[key].count == moment.count
        torch.testing.assert_close(
            masked.moments[key].matrix(), moment.matrix(), rtol=1e-4, atol=1e-6
        )


def test_bad_input():
    with pytest.raises(DataError, match="no linear layer"):
        linear_weight(nn.LayerNorm(3))
    with pytest.raises(ConfigError, match="no list of decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="regular expression"):
        linear_names(family_model("llama"), exclude="[")
    assert not is_linear(nn.Embedding(2, 2))
