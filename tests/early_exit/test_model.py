"""Saving and loading exits, generating, and the messages for what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from early_exit.model import EarlyExitModel, load_exits, sampler
from workbench import storage
from workbench.errors import ConfigError, DataError
from workbench.tiny import byte_tokenizer, tiny_model


def build(family: str = "mistral", **options) -> EarlyExitModel:
    model = EarlyExitModel.from_backbone(
        tiny_model(family), byte_tokenizer(), name=f"tiny:{family}", **options
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.exits.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("emission", ["lens", "affine"])
@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_every_exit_keeps_its_own_weights(family, emission, tmp_path):
    model = build(family, exits=(0, 1, 2), emission=emission)
    model.save_exits(tmp_path)
    saved = storage.read_safetensors(tmp_path / "exits.safetensors")
    assert not torch.equal(saved["exit_0.gate.weight"], saved["exit_1.gate.weight"])
    assert not torch.equal(saved["exit_1.gate.weight"], saved["exit_2.gate.weight"])
    assert saved["exit_0.gate.weight"].shape == (2, 128 if family == "mamba2" else 64)
    again = EarlyExitModel.from_pretrained(exits_dir=tmp_path)  # backbone from the config
    for name, value in model.exits.tensors().items():
        assert torch.equal(again.exits.tensors()[name], value)
    first = model.generate("a prompt", max_new_tokens=9, threshold=0.5)
    second = again.generate("a prompt", max_new_tokens=9, threshold=0.5)
    assert (first.tokens, first.exit_layers) == (second.tokens, second.exit_layers)
    assert len(first.pieces) == len(first.tokens)


def test_sampling_goes_through_the_usual_processors():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert sampler()(logits, [1]) == 3
    assert sampler(repetition_penalty=2.0)(logits, [3]) == 2
    draw = sampler(temperature=1.0, top_k=2, generator=torch.Generator().manual_seed(0))
    drawn = [draw(logits, [1]) for _ in range(200)]
    assert set(drawn) == {2, 3}
    assert 0.6 < drawn.count(3) / 200 < 0.86  # e/(1+e) = .731; 4.8 standard errors
    model = build()
    runs = [
        model.generate(
            "x",
            max_new_tokens=12,
            threshold=0.5,
            choose=sampler(temperature=1.0, generator=torch.Generator().manual_seed(7)),
        ).tokens
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    with pytest.raises(ConfigError, match="temperature=-1"):
        sampler(temperature=-1)


def test_exits_of_another_backbone_are_refused(tmp_path):
    build(exits=(1,)).save_exits(tmp_path)
    deeper = EarlyExitModel.from_backbone(
        tiny_model("mistral", num_hidden_layers=5), byte_tokenizer()
    )
    with pytest.raises(ConfigError, match=r"trained for backbone 'tiny:mistral' with 4 blocks"):
        load_exits(tmp_path, deeper.adapter)
    exits, _ = load_exits(tmp_path, deeper.adapter, force=True)
    assert exits.exits == (1,)


def test_damage_is_named(tmp_path):
    model = build(exits=(1, 2))
    with pytest.raises(DataError, match="python -m early_exit.train"):
        load_exits(tmp_path, model.adapter)
    model.save_exits(tmp_path)
    file = tmp_path / "exits.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        load_exits(tmp_path, model.adapter)
    storage.write_safetensors(file, {"exit_1.gate.weight": torch.zeros(2, 64)})
    with pytest.raises(ConfigError, match=r"missing \['exit_1.gate.bias', 'exit_2.gate.weight'"):
        load_exits(tmp_path, model.adapter)
    config = json.loads((tmp_path / "exit_config.json").read_text(encoding="utf-8"))
    del config["exits"]
    storage.write_json(tmp_path / "exit_config.json", config)
    with pytest.raises(DataError, match="field 'exits' is missing"):
        load_exits(tmp_path, model.adapter)


def test_gates_must_be_trained_before_use():
    model = EarlyExitModel.from_backbone(tiny_model("mistral"), byte_tokenizer())
    assert model.exits.exits == (1, 2)
    with pytest.raises(ConfigError, match="without trained gates"):
        model.generate("text", max_new_tokens=3)
    assert len(model.generate("text", max_new_tokens=3, criterion="margin", stop=False).tokens) == 3
