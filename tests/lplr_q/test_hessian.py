import pytest
import torch
from torch import nn

from lplr_q.activation_aware.hessian import (
    Calibration,
    SecondMoment,
    SecondMomentAccumulator,
    collect_hessians,
    corrected_weight,
    decoder_blocks,
    linear_names,
    load_hessians,
    save_hessians,
    stream_blocks,
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


# ---------------------------------------------------------------- sums, shards, files


def test_products_in_float32_are_as_good_even_about_a_large_mean():
    x = inputs() * 0.1 + 50
    exact = accumulate(x.double()).finish()
    sums = SecondMomentAccumulator(x.shape[-1], single=True)
    for part in x.split(700):
        sums.add(part)
    single = sums.finish()
    scale = exact.centred.diagonal().mean()
    assert float((single.centred - exact.centred).abs().max() / scale) < 1e-6
    torch.testing.assert_close(single.matrix(), exact.matrix(), rtol=1e-6, atol=0)


def test_shards_about_different_means_merge_to_the_whole():
    x = inputs()
    parts = (x[:3000] + 5, x[3000:5000] - 20, x[5000:])
    whole = accumulate(torch.cat(parts).double()).finish()
    total = SecondMomentAccumulator(x.shape[-1])
    for part in parts:
        shard = SecondMomentAccumulator(x.shape[-1], single=True)
        shard.add(part)
        total.merge(shard)
    assert total.count == len(x)
    torch.testing.assert_close(total.finish().matrix(), whole.matrix(), rtol=1e-6, atol=1e-5)


def test_sums_continue_from_their_stored_state():
    x = inputs()
    half = accumulate(x[:5000])
    again = SecondMomentAccumulator.from_tree(half.to_tree())
    again.add(x[5000:])
    half.add(x[5000:])
    assert torch.equal(again.finish().matrix(), half.finish().matrix())


def test_dead_channels_stay_zero_and_are_mended_by_regularisation():
    from lplr_q.linalg.ldl import regularise

    x = inputs()
    x[:, 3] = 0
    h = accumulate(x).finish().matrix()
    assert not bool(h[3].any())
    fixed = regularise(h, sigma=0.01)
    assert float(fixed[3, 3]) == pytest.approx(1.01)


def test_files_hold_what_was_collected_and_are_read_one_at_a_time(model, tokens, tmp_path):
    plain = collect_hessians(model, tokens)
    stored = collect_hessians(model, tokens, folder=tmp_path / "a", fingerprint={"x": 1})
    save_hessians(plain, tmp_path / "b", {"x": 1})
    assert stored.key_of == plain.key_of
    assert list(stored.moments) == list(plain.moments)
    for key, moment in plain.moments.items():
        assert torch.equal(stored.moments[key].matrix(), moment.matrix())
        assert stored.moments[key].count == moment.count
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"fingerprint.json", "000.json", "000.mlp.gate_proj.safetensors"} <= names
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert stored.digest() == load_hessians(tmp_path / "b").digest()
    assert stored.warnings() == plain.warnings()
    assert [w.split(":")[0] for w in stored.warnings()] == [f"{i}.mlp.down_proj" for i in range(4)]
    assert "72 tokens for width 172" in stored.warnings()[0]


def test_an_interrupted_collection_goes_on_at_the_next_block(model, tokens, tmp_path):
    whole = collect_hessians(model, tokens, folder=tmp_path / "whole")

    class Stopped(Exception):
        pass

    def two(items):
        yield from items[:2]
        raise Stopped

    with pytest.raises(Stopped):
        collect_hessians(model, tokens, folder=tmp_path / "cut", progress=two)
    with pytest.raises(DataError, match=r"layer 2 are missing.*save_hessians"):
        load_hessians(tmp_path / "cut")
    kept = (tmp_path / "cut" / "001.json").stat().st_mtime_ns
    damaged = tmp_path / "cut" / "000.mlp.down_proj.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = collect_hessians(model, tokens, folder=tmp_path / "cut")
    assert again.digest() == whole.digest()
    assert (tmp_path / "cut" / "001.json").stat().st_mtime_ns == kept


def test_missing_damaged_and_foreign_files_are_named(model, tokens, tmp_path):
    found = collect_hessians(model, tokens, folder=tmp_path, fingerprint={"seed": 0})
    file = tmp_path / "001.self_attn.o_proj.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        found.of("model.layers.1.self_attn.o_proj")
    file.write_bytes((tmp_path / "000.self_attn.o_proj.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"layer 1, self_attn\.o_proj was altered.*save_hessians"):
        found.of("model.layers.1.self_attn.o_proj")
    file.unlink()
    with pytest.raises(DataError, match=r"Hessian of layer 1, self_attn\.o_proj is missing"):
        found.of("model.layers.1.self_attn.o_proj")
    with pytest.raises(ConfigError, match="seed: 0 → 1"):
        collect_hessians(model, tokens, folder=tmp_path, fingerprint={"seed": 1})
    with pytest.raises(DataError, match="no Hessians here; make them with"):
        load_hessians(tmp_path / "elsewhere")


# ---------------------------------------------------------------- compressed inputs


def test_compressed_inputs_are_what_the_changed_blocks_give(tokens):
    model = tiny_model("mistral", num_hidden_layers=2)
    seen = []
    for block in stream_blocks(model, tokens, inputs="compressed", batch_size=3):
        seen.append(block)
        for name in block.calibration.key_of:
            linear = model.get_submodule(name)
            linear.weight.data *= 0.5
    name = "model.layers.1.self_attn.q_proj"
    x = []
    model.get_submodule(name).weight.data /= 0.5
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, a: x.append(a[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    rows = x[0].flatten(0, -2).double()
    expected = rows.T @ rows / len(rows)
    ours = seen[1].calibration.of(name).matrix()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_cross_moment_pairs_original_with_compressed_inputs(tokens):
    model = tiny_model("mistral", num_hidden_layers=2)
    untouched = tiny_model("mistral", num_hidden_layers=2)
    crosses = {}
    for block in stream_blocks(model, tokens, inputs="compressed", cross=True, batch_size=4):
        crosses |= block.cross
        if block.index == 0:
            for key, cross in block.cross.items():  # nothing is compressed before block 0
                matrix = block.calibration.moments[key].matrix()
                torch.testing.assert_close(cross, matrix, rtol=1e-5, atol=1e-6)
            for name in block.calibration.key_of:
                model.get_submodule(name).weight.data *= 0.7
    name = "model.layers.1.self_attn.q_proj"
    rows = {}
    for label, network in (("x", untouched), ("y", model)):
        handle = network.get_submodule(name).register_forward_pre_hook(
            lambda _m, a, label=label: rows.__setitem__(label, a[0].flatten(0, -2).double())
        )
        with torch.no_grad():
            network(input_ids=tokens, use_cache=False)
        handle.remove()
    expected = rows["x"].T @ rows["y"] / tokens.numel()
    torch.testing.assert_close(crosses["1.self_attn.q_proj"], expected, rtol=1e-4, atol=1e-6)


def test_the_corrected_weight_undoes_a_linear_distortion():
    """X^ = A X: with a = 1 and no damping W* = W A^-1, and W* X^ = W X."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=g, dtype=torch.float64)
    a = torch.eye(6, dtype=torch.float64) + 0.2 * torch.randn(6, 6, generator=g).double()
    y = x @ a.T
    weight = torch.randn(5, 6, generator=g)
    moment = accumulate(y).finish()
    cross = x.T @ y / len(x)
    full = corrected_weight(weight, moment, cross, alpha=1.0, sigma=0.0)
    torch.testing.assert_close(full.double() @ y.T, weight.double() @ x.T, rtol=1e-3, atol=1e-3)
    half = corrected_weight(weight, moment, cross, alpha=0.5, sigma=0.0)
    torch.testing.assert_close(half, (weight + full) / 2, rtol=1e-4, atol=1e-5)
    assert corrected_weight(weight, moment, cross, alpha=0.0) is weight


def test_stream_refuses_what_it_cannot_do(model, tokens):
    with pytest.raises(ConfigError, match="choose from original, compressed"):
        next(iter(stream_blocks(model, tokens, inputs="both")))
    with pytest.raises(ConfigError, match="cross needs those"):
        next(iter(stream_blocks(model, tokens, cross=True)))


SHARE = """
import sys, torch
from lplr_q import distributed
from lplr_q.activation_aware.hessian import collect_hessians
from workbench.tiny import tiny_model
torch.set_num_threads(1)
tokens = torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(0))
with distributed.group():
    model = tiny_model("mistral")
    found = collect_hessians(model, tokens, batch_size=2, folder=sys.argv[1])
    print(distributed.rank(), found.digest(), flush=True)
"""


@pytest.mark.slow
def test_two_processes_collect_what_one_does(model, tokens, tmp_path):
    """All-reduced sums of rank-strided batches = the sums of all batches, to 1e-6."""
    from tests.lplr_q.test_distributed import run_two

    done = run_two(["-c", SHARE, str(tmp_path)])
    assert len({out.split()[1] for _, out, _ in done}) == 1
    ours, whole = load_hessians(tmp_path), collect_hessians(model, tokens, batch_size=2)
    assert ours.key_of == whole.key_of
    for key, moment in whole.moments.items():
        assert ours.moments[key].count == moment.count
        scale = float(moment.matrix().abs().max())
        difference = float((ours.moments[key].matrix() - moment.matrix()).abs().max())
        assert difference <= 1e-6 * scale
