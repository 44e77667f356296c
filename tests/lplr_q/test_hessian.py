import pytest
import torch
from torch import nn

from lplr_q.activation_aware.hessian import (
    Calibration,
    SecondMoment,
    SecondMomentAccumulator,
    collect_hessians,
    decoder_blocks,
    linear_names,
)
from workbench.errors import ConfigError, DataError
from workbench.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("mistral")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(0))


def inputs(count=9001, n=7):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(1)) + 3


def accumulate(*parts):
    sums = SecondMomentAccumulator(parts[0].shape[-1])
    for part in parts:
        sums.add(part)
    return sums


def test_streaming_is_the_batch_formula():
    x = inputs()
    moment = accumulate(*x.split(1000)).finish()
    expected = x.double().T @ x.double() / len(x)
    assert moment.count == len(x)
    torch.testing.assert_close(moment.matrix(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moment.mean.double(), x.double().mean(0), rtol=1e-6, atol=1e-6)


def test_two_halves_merge_to_the_whole():
    x = inputs()
    left, right = accumulate(x[:4096]), accumulate(x[4096:])
    left.merge(right)
    whole = accumulate(x)
    torch.testing.assert_close(left.finish().matrix(), whole.finish().matrix())
    assert left.count == whole.count


def test_a_large_mean_costs_no_precision_in_storage():
    x = inputs() * 1e-2 + 100
    moment = accumulate(x.double()).finish()
    tree = moment.to_tree()
    back = SecondMoment.from_tree(tree)
    assert torch.equal(back.matrix(), moment.matrix())
    variance = torch.var(x.double(), dim=0, unbiased=False)
    torch.testing.assert_close(back.centred.diagonal().double(), variance, rtol=1e-5, atol=0)


def test_the_layerwise_pass_sees_what_a_full_forward_sees(model, tokens):
    calibration = collect_hessians(model, tokens, batch_size=4)
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
        for name in calibration.key_of
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, parts in seen.items():
        x = torch.cat(parts).flatten(0, -2).double()
        expected = x.T @ x / len(x)
        ours = calibration.of(name)
        assert ours.count == tokens.numel()
        torch.testing.assert_close(ours.matrix(), expected, rtol=1e-4, atol=1e-6)


def test_sublayers_with_one_input_share_one_hessian(model, tokens):
    calibration = collect_hessians(model, tokens)
    keys = {
        name.rpartition(".")[2]: key for name, key in calibration.key_of.items() if ".0." in name
    }
    assert keys["q_proj"] == keys["k_proj"] == keys["v_proj"]
    assert keys["gate_proj"] == keys["up_proj"]
    assert len(set(keys.values())) == 4
    assert len(calibration.moments) == 4 * len(decoder_blocks(model)[1])


def test_padding_leaves_no_trace(model, tokens):
    plain = collect_hessians(model, tokens)
    padded = torch.cat([tokens, torch.zeros(6, 5, dtype=torch.long)], dim=1)
    mask = torch.arange(17)[None] < torch.full((6, 1), 12)
    masked = collect_hessians(model, padded, mask=mask)
    for key, moment in plain.moments.items():
        assert masked.moments[key].count == moment.count
        torch.testing.assert_close(
            masked.moments[key].matrix(), moment.matrix(), rtol=1e-4, atol=1e-6
        )


def test_batch_size_and_storage_change_nothing(model, tokens):
    first = collect_hessians(model, tokens, batch_size=6)
    second = Calibration.from_tree(collect_hessians(model, tokens, batch_size=1).to_tree())
    assert first.key_of == second.key_of
    for key, moment in first.moments.items():
        torch.testing.assert_close(
            second.moments[key].matrix(), moment.matrix(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", ["llama", "phi3", "mamba", "mamba2"])
def test_other_families(family, tokens):
    calibration = collect_hessians(tiny_model(family), tokens)
    assert calibration.key_of
    for moment in calibration.moments.values():
        assert moment.count == tokens.numel()


def test_patterns_choose_layers(model, tokens):
    only = collect_hessians(model, tokens, include="down_proj")
    assert {name.rpartition(".")[2] for name in only.key_of} == {"down_proj"}
    without = linear_names(model, exclude="mlp")
    assert not any("mlp" in name for names in without.values() for name in names)
    with pytest.raises(DataError, match="no Hessian for"):
        only.of("model.layers.0.self_attn.q_proj")


def test_bad_input(model, tokens):
    with pytest.raises(ConfigError, match="matches include"):
        linear_names(model, include="no_such_layer")
    with pytest.raises(ConfigError, match="regular expression"):
        linear_names(model, include="(")
    with pytest.raises(ConfigError, match="no list of decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))
    with pytest.raises(DataError, match="expected rows x length"):
        collect_hessians(model, tokens[:0])
    with pytest.raises(DataError, match="2 non-finite inputs"):
        accumulate(torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]]))
    with pytest.raises(DataError, match="no calibration token"):
        SecondMomentAccumulator(3).finish()
    with pytest.raises(DataError, match="cannot be merged"):
        SecondMomentAccumulator(3).merge(SecondMomentAccumulator(4))


def test_non_finite_weights_are_named(tokens):
    model = tiny_model("mistral", seed=1)
    model.get_submodule("model.layers.0.self_attn.v_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match="layers.0.self_attn.o_proj"):
        collect_hessians(model, tokens)


def test_damaged_storage_is_named():
    tree = accumulate(inputs()).finish().to_tree()
    with pytest.raises(DataError, match="flat missing"):
        SecondMoment.from_tree({k: v for k, v in tree.items() if k != "flat"}, name="0.q")
    with pytest.raises(DataError, match="27 entries, 28 expected"):
        SecondMoment.from_tree({**tree, "flat": tree["flat"][:-1]})
