import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lplr_q.activation_aware.hessian import collect_hessians
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from lplr_q.hf import save_compressed, storage_report
from lplr_q.quantize_model import (
    CompressionSettings,
    candidates,
    compress_sublayer,
    install,
    prepare_sublayer,
    result_tree,
)
from workbench.errors import ConfigError, DataError
from workbench.models import load_model
from workbench.seeding import Streams
from workbench.tiny import byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TOKENS = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
SETTINGS = CompressionSettings(bits=2.8, rounds=1, inner_iterations=1, sweeps=0, q_bits=2)


def compress(family, settings=SETTINGS, **overrides):
    model = tiny_model(family, **overrides)
    calibration = collect_hessians(model, TOKENS)
    compressed = copy.deepcopy(model)
    streams = Streams(0)
    for name in calibration.key_of:
        weight = model.get_submodule(name).weight.detach()
        prepared = prepare_sublayer(calibration, name, weight.shape[1], settings, streams.torch)
        result = compress_sublayer(weight, prepared, name, settings, streams.torch)
        install(compressed, name, result_tree(result))
    return model, compressed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, compressed = compress("mistral")
    folder = tmp_path_factory.mktemp("model")
    report = save_compressed(compressed, byte_tokenizer(), folder, notes={"why": "test"})
    return model, compressed, folder, report


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def test_reloaded_logits_are_identical(saved):
    _, compressed, folder, _ = saved
    loaded, tokenizer = load_model(folder)
    assert torch.equal(logits(loaded), logits(compressed))
    assert tokenizer.decode(tokenizer.encode("abc")).endswith("abc")
    assert len(list(quantised_layers(loaded))) == len(list(quantised_layers(compressed)))


def test_nothing_is_lost_and_nothing_trains(saved):
    model, _, folder, _ = saved
    loaded, _ = load_model(folder)
    own = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if "proj" not in name:
            assert torch.equal(own[name], parameter), name  # embeddings, norms, head
    assert not any(p.requires_grad for p in loaded.parameters())


def test_bytes_in_the_file_are_the_reported_bits(saved):
    _, compressed, folder, report = saved
    counted = [layer.stored_bits() for _, layer in quantised_layers(compressed)]
    expected = sum(b.total for b in counted) / sum(b.weights for b in counted)
    assert report["bits_per_weight"] == pytest.approx(expected, rel=1e-12)
    assert report == storage_report(folder)
    total = report["compressed_bytes"] + report["other_bytes"] + report["header_bytes"]
    assert total == report["file_bytes"]
    assert expected <= SETTINGS.bits


def test_a_wide_layer_fills_its_file_to_half_a_percent(tmp_path):
    """With headers included, once a matrix is not tiny."""
    from workbench import storage

    layer = LPLRQuantizedLinear(2048, 2048, rank=32)
    path = storage.write_safetensors(tmp_path / "layer.safetensors", layer.state_dict())
    bits = 8 * path.stat().st_size / 2048**2
    assert bits == pytest.approx(layer.stored_bits().per_weight, rel=5e-3)


def test_model_can_be_saved_again(saved, tmp_path):
    _, compressed, folder, report = saved
    loaded, tokenizer = load_model(folder)
    again = save_compressed(loaded, tokenizer, tmp_path)
    assert again["compressed_bytes"] == report["compressed_bytes"]
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(compressed))


def test_half_precision_load_keeps_codes_and_scales(saved):
    _, compressed, folder, _ = saved
    loaded, _ = load_model(folder, dtype=torch.bfloat16)
    for (_, a), (_, b) in zip(quantised_layers(loaded), quantised_layers(compressed), strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())
    assert logits(loaded).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "phi3", "mamba2"])
def test_other_families_reload(family, tmp_path):
    _, compressed = compress(family)
    save_compressed(compressed, byte_tokenizer(), tmp_path)
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(compressed))


@pytest.mark.parametrize("order", ["import lplr_q, transformers", "import transformers, lplr_q"])
def test_plain_from_pretrained_after_the_import(saved, order):
    _, _, folder, _ = saved
    code = (
        f"{order}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("LPLRQuantizedLinear"), done.stderr[-2000:]


def test_importing_the_package_is_light():
    code = "import sys, lplr_q; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_damaged_folders_are_named(saved, tmp_path):
    import shutil

    _, _, folder, _ = saved
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated"):
        load_model(cut)
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    config = json.loads((newer / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["version"] = 99
    (newer / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DataError, match="format version 99"):
        load_model(newer)
    config["quantization_config"]["version"] = 1
    modules = config["quantization_config"]["modules"]
    next(iter(modules.values()))["out_features"] += 1
    (newer / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DataError, match="the file holds a"):
        load_model(newer)


def test_nothing_to_save():
    with pytest.raises(ConfigError, match="holds no compressed layer"):
        save_compressed(tiny_model("mistral"), None, "unused")


def test_candidates_fill_the_budget():
    assert candidates(128, 128, CompressionSettings(bits=2.1)) == [(2, 1)]
    both = candidates(128, 128, CompressionSettings(bits=3.15, try_widths=9))
    assert [q for q, _ in both] == [3, 2]
    assert candidates(128, 128, CompressionSettings(bits=3.15)) == both[:1]
    assert candidates(64, 64, CompressionSettings(bits=1.0, q_bits=0))[0][0] == 0
    with pytest.raises(ConfigError, match="raise --bits or --overhead"):
        candidates(64, 64, CompressionSettings(bits=1.5))


def test_a_bias_is_kept():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 8)})
    from lplr_q.activation_aware.decompose import decompose, prepare_hessian

    weight = model["a"].weight.detach()
    bias = model["a"].bias.detach().clone()
    result = decompose(weight, prepare_hessian(None, 16, generator=None), rounds=1)
    layer = install(model, "a", result_tree(result))
    assert torch.equal(layer.bias, bias)
    with pytest.raises(DataError, match="not a linear layer"):
        install(model, "a", result_tree(result))
