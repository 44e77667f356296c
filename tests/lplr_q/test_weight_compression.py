import pytest
import torch

from lplr_q import compat
from lplr_q.activation_aware.dataclasses import DataParameters, LPLRParams, ModelParameters
from lplr_q.activation_aware.weight_compression import (
    ActivationAwareWeightCompressor,
    bias_of,
    layer_index,
    shape_of,
    short_name,
)
from lplr_q.weights import FolderWeights, ModuleWeights
from tests.lplr_q.families import family_model
from workbench.errors import ConfigError, DataError
from workbench.tiny import byte_tokenizer, tiny_model

DATA = DataParameters("microworld:world", devset_size=4, context_length=32, batch_size=2)
PARAMS = LPLRParams(rank=2, iters=1, lplr_iters=1, L_bits=4, R_bits=4, hadamard_transform=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved two-layer model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("mistral", num_hidden_layers=2).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A compressor that collected its Hessians, and their folder."""
    hessians = tmp_path_factory.mktemp("hessians") / "h"
    return ActivationAwareWeightCompressor(
        ModelParameters(str(folder)), DATA, PARAMS, hessians
    ), hessians


def again(folder, hessians, **options):
    return ActivationAwareWeightCompressor(
        ModelParameters(str(folder)), DATA, PARAMS, hessians, compute_hessians=False, **options
    )


def test_construction_collects_the_hessians_of_every_layer(made):
    compressor, hessians = made
    assert compressor.layers == [0, 1]
    files = {p.name for p in hessians.glob("*.safetensors")}
    assert "000.mlp.down_proj.safetensors" in files
    assert len(files) == 8  # four inputs in each of two layers
    quantizer = compressor.get_layer_quantizer(1, label="second")
    assert quantizer.label == "second"
    assert "self_attn.q_proj" in quantizer.sublayers
    assert len(quantizer.sublayers) == 7
    keys = {quantizer.info(s).key for s in ("q_proj", "k_proj", "v_proj")}
    assert len(keys) == 1
    assert quantizer.info("q_proj").tokens > 0


def test_stored_hessians_give_the_same_result_without_loading_the_model(made, folder, monkeypatch):
    compressor, hessians = made
    expected = compressor.get_layer_quantizer(0).compress_sublayer("down_proj")

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lplr_q.activation_aware.weight_compression.load_model", refuse)
    stored = again(folder, hessians)
    result = stored.get_layer_quantizer(0).compress_sublayer("down_proj")
    assert torch.equal(result.dequantize(), expected.dequantize())
    assert result.error == expected.error


def test_the_signs_depend_on_the_seed_alone(made, folder):
    _, hessians = made
    one = again(folder, hessians, seed=1).get_layer_quantizer(0)
    two = again(folder, hessians, seed=1).get_layer_quantizer(0)
    two.compress_sublayer("up_proj")  # another one first
    a, b = one.compress_sublayer("v_proj"), two.compress_sublayer("v_proj")
    assert torch.equal(a.dequantize(), b.dequantize())
    other = again(folder, hessians, seed=2).get_layer_quantizer(0).compress_sublayer("v_proj")
    assert not torch.equal(a.signs_in, other.signs_in)


def test_a_part_of_the_layers(made, folder, tmp_path):
    _, hessians = made
    part = again(folder, hessians, start_layer=1)
    assert part.layers == [1]
    with pytest.raises(ConfigError, match="layer 0 is not among"):
        part.get_layer_quantizer(0)
    collected = ActivationAwareWeightCompressor(
        ModelParameters(str(folder), include="down_proj"), DATA, PARAMS, tmp_path / "h",
        start_layer=1, stop_layer=2,
    )  # fmt: skip
    assert list(collected.calibration.key_of) == ["model.layers.1.mlp.down_proj"]
    whole = again(folder, hessians).calibration.of("model.layers.1.mlp.down_proj")
    mine = collected.calibration.of("model.layers.1.mlp.down_proj")
    assert torch.equal(whole.centred, mine.centred)


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (1, 1), (2, 1)])
def test_no_layer_between_start_and_stop(start, stop, folder, tmp_path):
    with pytest.raises(ConfigError, match="no layer lies between"):
        ActivationAwareWeightCompressor(
            ModelParameters(str(folder)), DATA, PARAMS, tmp_path, start, stop
        )


def test_layers_that_the_model_does_not_have(folder, made, tmp_path):
    with pytest.raises(ConfigError, match="has layers 0 to 1"):
        ActivationAwareWeightCompressor(
            ModelParameters(str(folder)), DATA, PARAMS, tmp_path / "h", start_layer=5
        )
    with pytest.raises(DataError, match=r"Hessians of layers \[0, 1\], none from 5"):
        again(folder, made[1], start_layer=5)


def test_missing_hessians_name_the_command(folder, tmp_path):
    with pytest.raises(DataError, match=r"lplr_q\.save_hessians"):
        again(folder, tmp_path / "none")


def test_a_lost_hessian_names_layer_key_path_and_command(folder, made, tmp_path):
    import shutil

    copy = tmp_path / "h"
    shutil.copytree(made[1], copy)
    (copy / "001.mlp.down_proj.safetensors").unlink()
    compressor = again(folder, copy)
    quantizer = compressor.get_layer_quantizer(1)
    quantizer.compress_sublayer("v_proj")
    with pytest.raises(DataError) as caught:
        quantizer.compress_sublayer("down_proj")
    text = str(caught.value)
    for word in ("layer 1", "mlp.down_proj", str(copy), "save_hessians"):
        assert word in text


def test_hessians_of_another_model_are_refused(made, tmp_path):
    wide = tmp_path / "wide"
    tiny_model("mistral", num_hidden_layers=2, intermediate_size=96).save_pretrained(wide)
    byte_tokenizer().save_pretrained(wide)
    compressor = again(wide, made[1])
    with pytest.raises(DataError, match=r"mlp\.down_proj.*another model"):
        compressor.get_layer_quantizer(0)


def test_a_model_given_without_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="without tokenizer"):
        ActivationAwareWeightCompressor(
            ModelParameters("mine"), DATA, PARAMS, tmp_path, model=tiny_model("mistral")
        )


def test_a_given_model_of_another_family_and_its_transposed_layers(tmp_path):
    model = tiny_model("gpt2", n_layer=1)
    compressor = ActivationAwareWeightCompressor(
        ModelParameters("mine"), DATA, PARAMS, tmp_path / "h", model=model,
        tokenizer=byte_tokenizer(),
    )  # fmt: skip
    quantizer = compressor.get_layer_quantizer(0)
    name = next(s for s in quantizer.sublayers if s.endswith("c_attn"))
    quantizer.compress_sublayer(name)
    layer = quantizer.get_quantized_linear_layer(name)
    assert layer.bias is not None
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    original = model.get_submodule(quantizer.info(name).name)
    expected = original(x)
    assert (layer(x) - expected).norm() < 0.6 * expected.norm()
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    files = FolderWeights.open(tmp_path / "m")
    full = quantizer.info(name).name
    for weights in (files, ModuleWeights(model)):
        assert shape_of(weights, full) == tuple(files(full).shape)
        assert torch.equal(bias_of(weights, full), original.bias.detach())


def test_experts_are_taken_apart_and_calibrated_one_by_one(tmp_path):
    folder = tmp_path / "mixtral"
    family_model("mixtral").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    quantizer = ActivationAwareWeightCompressor(
        ModelParameters(str(folder), include="experts"), DATA, PARAMS, tmp_path / "h"
    ).get_layer_quantizer(0)
    name = "mlp.experts.1.down_proj"
    assert name in quantizer.sublayers
    result = quantizer.compress_sublayer(name)
    stored = again(folder, tmp_path / "h").get_layer_quantizer(0)
    assert torch.equal(stored.compress_sublayer(name).dequantize(), result.dequantize())


def test_a_compressed_model_is_not_compressed_again(made, tmp_path):
    quantizer = made[0].get_layer_quantizer(0)
    quantizer.compress_sublayer("up_proj")
    model = tiny_model("mistral", num_hidden_layers=2)
    model.model.layers[0].mlp.up_proj = quantizer.get_quantized_linear_layer("up_proj")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj is compressed already"):
        ActivationAwareWeightCompressor(
            ModelParameters("mine"), DATA, PARAMS, tmp_path / "h", model=model,
            tokenizer=byte_tokenizer(),
        )  # fmt: skip


def test_names():
    assert layer_index("transformer.h.11.attn.c_attn") == 11
    assert short_name("transformer.h.11.attn.c_attn") == "attn.c_attn"
    assert short_name("model.layers.2.mlp.experts.3.down_proj") == "mlp.experts.3.down_proj"


@pytest.mark.parametrize("name", sorted(compat.RENAMED))
def test_published_names_are_here(name):
    assert getattr(compat, name) is not None
    assert name in dir(compat)


def test_the_published_function():
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    params = compat.ActivationAwareQuantParams(rank=4, iters=1)
    kept = weight.clone()
    result = compat.LPLRq(params, weight, torch.eye(32) * 3)
    assert isinstance(result, compat.LPLRQInfo)
    assert 0.05 < result.error < 0.6
    assert torch.equal(weight, kept)  # defect 3: the caller's W was scaled in place
    with pytest.raises(AttributeError, match="nothing"):
        _ = compat.nothing
