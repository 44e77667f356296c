import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lplr_q.activation_aware.discovery import linear_weight, unfuse_experts
from lplr_q.activation_aware.hessian import collect_hessians
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from lplr_q.hf import (
    exact_dtype,
    replace_linears,
    require_uncompressed,
    save_compressed,
    storage_report,
)
from lplr_q.quantize_model import (
    CompressionSettings,
    candidates,
    compress_sublayer,
    install,
    prepare_sublayer,
    result_tree,
)
from tests.lplr_q.families import family_model
from workbench.errors import ConfigError, DataError
from workbench.models import load_model, quiet_transformers
from workbench.seeding import Streams
from workbench.storage import read_safetensors
from workbench.tiny import FAMILIES, byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TOKENS = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
SETTINGS = CompressionSettings(bits=2.8, rounds=1, inner_iterations=1, sweeps=0, q_bits=2)


def compress(family, settings=SETTINGS, **overrides):
    return compress_model(tiny_model(family, **overrides), settings)


def compress_model(model, settings=SETTINGS):
    unfuse_experts(model)
    calibration = collect_hessians(model, TOKENS)
    compressed = copy.deepcopy(model)
    streams = Streams(0)
    for name in calibration.key_of:
        weight = linear_weight(model.get_submodule(name))
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


def other_family(name):
    """One block of a family that the tiny models lack."""
    import transformers

    shape = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name == "mixtral":
        shape |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{name.capitalize()}Config")(**shape)
    torch.manual_seed(0)
    return getattr(transformers, f"{name.capitalize()}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "mamba2",
        "qwen2",
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "phi3", "mamba")),
    ],
)
def test_p10_other_families_reload_with_the_same_logits(family, tmp_path):
    if family in FAMILIES:
        layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
        model, compressed = compress(family, **{layers: 1})
    else:
        model, compressed = compress_model(other_family(family))
    save_compressed(compressed, byte_tokenizer(), tmp_path)
    loaded = load_model(tmp_path)[0]
    assert torch.equal(logits(loaded), logits(compressed))
    names = [name for name, _ in quantised_layers(loaded)]
    assert names == [name for name, _ in quantised_layers(compressed)]
    assert not torch.equal(logits(loaded), logits(model))
    if family == "mixtral":
        assert sum(".experts." in name for name in names) == 6
    again = tmp_path / "again"
    save_compressed(loaded, byte_tokenizer(), again)
    assert torch.equal(logits(load_model(again)[0]), logits(compressed))


@pytest.mark.parametrize(
    "order",
    [
        "import lplr_q, transformers",
        pytest.param("import transformers, lplr_q", marks=pytest.mark.slow),
    ],
)
def test_plain_from_pretrained_after_the_import(saved, order):
    """The lines of the model card, as they stand there."""
    _, _, folder, _ = saved
    card = (folder / "README.md").read_text(encoding="utf-8")
    lines = card.split("```python\n")[1].split("```")[0]
    assert lines.startswith("import lplr_q")
    code = (
        f"{order}\n{lines.replace('this folder', str(folder))}\n"
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
    with pytest.raises(DataError, match="no linear layer"):
        install(model, "a", result_tree(result))


# ---------------------------------------------------------------- trained parts, shards, refusals


def one_block(**form):
    """A Mistral block whose layers have the given form, filled from decompositions."""
    from lplr_q.activation_aware.decompose import decompose, prepare_hessian

    ft_rank = form.pop("ft_rank", 0)
    model = tiny_model("mistral", num_hidden_layers=1)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            prepared = prepare_hessian(None, module.in_features, generator=generator)
            options = {"rounds": 1, "inner_iterations": 1, "sweeps": 0, **form}
            result = decompose(module.weight, prepared, generator=generator, **options)
            parent, _, last = name.rpartition(".")
            layer = LPLRQuantizedLinear.from_decomposition(result, ft_rank=ft_rank)
            setattr(model.get_submodule(parent), last, layer)
    return model


FORMS = [
    {"rank": 3, "ft_rank": 2},
    {"rank": 2, "ft_rank": 2, "factor_bits": 16},
    {"codebook": "tcq-8", "rank": 2},
    {"codebook": "lloyd-max", "q_bits": 3, "rank": 1, "factor_codebook": "e8p"},
    {"rank": 1, "rescale": True},
    {"rank": 3, "factor_bits": (3, 5)},
    {"rank": 3, "factor_bits": (16, 2), "ft_rank": 1},
    {"rank": 2, "factor_bits": (4, 16), "factor_codebook": "e8p"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_reloads_and_fills_the_bytes_it_reports(form, tmp_path):
    model = one_block(**form)
    report = save_compressed(model, byte_tokenizer(), tmp_path)
    counted = [layer.stored_bits() for _, layer in quantised_layers(model)]
    expected = sum(b.total for b in counted) / sum(b.weights for b in counted)
    assert report["bits_per_weight"] == pytest.approx(expected, rel=1e-12)
    loaded, _ = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    own = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == own[name].dtype
    for dtype in (torch.bfloat16, torch.float16):
        cast, _ = load_model(tmp_path, dtype=dtype)
        for (_, a), (_, b) in zip(quantised_layers(cast), quantised_layers(model), strict=True):
            assert torch.equal(a.dequantize(), b.dequantize())


def test_a_tuned_model_reloads(tmp_path):
    from lplr_q.activation_aware.quantized_layer import merge_trained

    model = one_block(rank=2, ft_rank=1)
    for _, layer in quantised_layers(model):
        layer.trainable(signs=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="merge_trained"):
        save_compressed(model, byte_tokenizer(), tmp_path)
    merge_trained(model)
    report = save_compressed(model, byte_tokenizer(), tmp_path)
    loaded, _ = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    counted = [layer.stored_bits() for _, layer in quantised_layers(loaded)]
    assert all(b.signs > b.weights**0.5 * 16 for b in counted)
    assert report["compressed_bytes"] * 8 == sum(b.total for b in counted)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_weights_are_written_in_shards(tmp_path):
    model = one_block(rank=2, ft_rank=1)
    report = save_compressed(model, byte_tokenizer(), tmp_path, max_shard_size="9KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert report == storage_report(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(model))
    save_compressed(model, byte_tokenizer(), tmp_path)  # the shards do not stay behind
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(model))


def test_tied_weights_are_stored_once(tmp_path):
    """Embedding and head that share a tensor take its bytes once, and share it after loading."""
    model, compressed = compress_model(family_model("qwen2"))
    assert model.config.tie_word_embeddings
    report = save_compressed(compressed, None, tmp_path)
    names = set(read_safetensors(tmp_path / "model.safetensors"))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    once = sum(p.numel() for p in compressed.parameters())  # a shared one is counted once
    assert report["other_bytes"] == exact_dtype(compressed).itemsize * once
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded), logits(compressed))


def test_a_model_is_not_compressed_twice(saved, tmp_path):
    model, compressed, _, _ = saved
    require_uncompressed(model)
    with pytest.raises(ConfigError, match="compressed already"):
        require_uncompressed(compressed)
    settings = {name: layer.settings() for name, layer in quantised_layers(compressed)}
    with pytest.raises(DataError, match="compressed already; start from the original"):
        replace_linears(copy.deepcopy(compressed), settings)
    other = tiny_model("mistral", num_hidden_layers=1)
    other.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="quantised already .gptq."):
        require_uncompressed(other)


def test_an_older_configuration_is_read(saved, tmp_path):
    """Version 1 knew no trained parts, rescaling or factor codebooks, version 2 one width for both
    factors."""
    import shutil

    _, compressed, folder, _ = saved
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    config = json.loads((older / "config.json").read_text(encoding="utf-8"))
    own = config["quantization_config"]
    assert own["version"] == 3
    own["version"] = 2
    for settings in own["modules"].values():
        settings["factor_bits"] = settings.pop("l_bits")
        assert settings.pop("r_bits") == settings["factor_bits"] == 4
    (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits(load_model(older)[0]), logits(compressed))
    own["version"] = 1
    del own["experts"]
    for settings in own["modules"].values():
        for key in ("factor_codebook", "rescaled", "ft_rank", "signs"):
            del settings[key]
    (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits(load_model(older)[0]), logits(compressed))
    next(iter(own["modules"].values()))["flavour"] = "sweet"
    (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DataError, match="unknown settings of a compressed layer: flavour"):
        load_model(older)
