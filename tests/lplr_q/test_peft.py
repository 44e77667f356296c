import copy
import json

import pytest
import torch
from torch import nn

from lplr_q.activation_aware.components import (
    add_components,
    drop_components,
    release_components,
    take_factors,
)
from lplr_q.activation_aware.quantized_layer import quantised_layers
from lplr_q.peft import (
    enable,
    export_adapter,
    get_peft_model,
    import_adapter,
    load_adapter,
    read_adapter,
    without_factors,
)
from tests.lplr_q.test_layer import compressed
from workbench.errors import ConfigError, DataError


class Pair(nn.Module):
    """Two compressed layers of different rank and an ordinary one between them."""

    def __init__(self, **options):
        super().__init__()
        self.down = compressed(24, 40, rank=3, **options)[1]
        self.norm = nn.Linear(24, 24)
        self.up = compressed(40, 24, rank=2, seed=1)[1]
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        return self.up(self.norm(self.down(x)))


X = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))


def test_factors_travel_as_an_adapter_that_peft_loads(tmp_path):
    model = Pair(ft_rank=1)
    before = model(X)
    assert export_adapter(model, tmp_path, base_model="somewhere") == {"down": 3, "up": 2}
    bare = without_factors(model)
    assert torch.equal(model(X), before)
    assert not torch.allclose(bare(X), before, rtol=1e-2)
    wrapped = load_adapter(bare, tmp_path)
    torch.testing.assert_close(wrapped(X), before, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "somewhere"
    assert config["rank_pattern"] == config["alpha_pattern"] == {"up": 2}


def test_the_exported_adapter_fits_a_dense_model_with_the_weights_of_q(tmp_path):
    from peft import PeftModel

    model = Pair()
    export_adapter(model, tmp_path)
    dense = without_factors(model)
    for name, layer in list(quantised_layers(dense)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = layer.dequantize()
        setattr(dense, name, plain)
    wrapped = PeftModel.from_pretrained(dense, str(tmp_path))
    torch.testing.assert_close(wrapped(X), model(X), rtol=1e-4, atol=1e-4)


def test_an_adapter_folder_comes_back_as_parameters(tmp_path):
    model = Pair()
    export_adapter(model, tmp_path)
    bare = without_factors(model)
    assert import_adapter(bare, tmp_path) == ["down", "up"]
    assert bare.down.form.ft_rank == bare.down.rank == 3
    torch.testing.assert_close(bare(X), model(X), rtol=0.1, atol=0.1)
    for layer, own in ((bare.down, model.down), (bare.up, model.up)):
        error = (layer.dequantize() - own.dequantize()).norm() / own.dequantize().norm()
        assert float(error) < 4e-3  # bfloat16


@pytest.mark.parametrize("plain", [False, True])
def test_one_step_of_an_adapter_on_compressed_layers_lowers_the_loss(plain, monkeypatch):
    import peft
    from peft.tuners.lora.model import LoraModel

    own = LoraModel.__dict__["_create_new_module"]
    monkeypatch.setattr(LoraModel, "_create_new_module", own)  # put back afterwards
    model = Pair()
    config = peft.LoraConfig(r=2, target_modules=["down", "up"], lora_alpha=4)
    if plain:
        enable()
        enable()
    wrapped = (peft.get_peft_model if plain else get_peft_model)(model, config)
    codes = copy.deepcopy(dict(model.named_buffers()))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    target = torch.randn(6, 40)
    losses = []
    for _ in range(3):
        loss = (wrapped(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(v, codes[k]) for k, v in model.named_buffers())


def test_merging_adds_parameters_and_unmerging_takes_them_out():
    import peft

    wrapped = get_peft_model(Pair(), peft.LoraConfig(r=2, target_modules=["down"], lora_alpha=6))
    layer = wrapped.base_model.model.down
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    before, plain = wrapped(X), layer.get_base_layer().dequantize()
    layer.merge(safe_merge=True)
    assert layer.get_base_layer().form.ft_rank == 2
    torch.testing.assert_close(wrapped(X), before, rtol=5e-2, atol=5e-2)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().dequantize(), plain)
    torch.testing.assert_close(wrapped(X), before)
    merged = wrapped.merge_and_unload()
    assert type(merged.down).__name__ == "LPLRQuantizedLinear"
    torch.testing.assert_close(merged(X), before, rtol=5e-2, atol=5e-2)


def test_a_variant_of_lora_is_not_merged():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["down"], use_dora=True)
    wrapped = get_peft_model(Pair(), config)
    wrapped(X)
    with pytest.raises(ConfigError, match="no plain LoRA"):
        wrapped.base_model.model.down.merge()


def test_foreign_and_damaged_adapters_are_refused(tmp_path):
    import peft

    model = Pair()
    wrapped = get_peft_model(model, peft.LoraConfig(r=2, target_modules=["norm"]))
    wrapped.save_pretrained(str(tmp_path / "norm"))
    with pytest.raises(DataError, match="norm .* is no compressed layer"):
        import_adapter(Pair(), tmp_path / "norm")
    with pytest.raises(DataError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    export_adapter(Pair(), tmp_path / "own")
    file = tmp_path / "own" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"peft_type": "IA3"}), encoding="utf-8")
    with pytest.raises(DataError, match="only plain LoRA"):
        read_adapter(tmp_path / "own")
    with pytest.raises(ConfigError, match="nothing to export"):
        export_adapter(without_factors(Pair()), tmp_path / "none")


# ---------------------------------------------------------------- components of one layer


@pytest.mark.parametrize("form", [{}, {"rotated": False}, {"m": 13, "n": 21}], ids=str)
def test_added_components_are_added_to_the_matrix(form):
    _, layer = compressed(rank=2, ft_rank=1, **form)
    before, packed = layer.dequantize(), layer.stored_bits()
    left, right = torch.randn(layer.out_features, 3), torch.randn(3, layer.in_features)
    layer.trainable()  # float32 parameters: nothing is rounded
    add_components(layer, left, right)
    torch.testing.assert_close(layer.dequantize(), before + left @ right, rtol=1e-4, atol=1e-4)
    assert layer.rank == 5
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_L", "lora_R"}
    width = layer.in_features + layer.out_features
    assert layer.stored_bits().total - packed.total == 3 * 16 * width
    drop_components(layer, 3)
    torch.testing.assert_close(layer.dequantize(), before)
    with pytest.raises(ConfigError, match="do not fit"):
        add_components(
            layer, torch.randn(layer.out_features, 40), torch.randn(40, layer.in_features)
        )
    with pytest.raises(ConfigError, match="shapes"):
        add_components(layer, right.T, left.T)
    with pytest.raises(ConfigError, match="cannot be taken out"):
        drop_components(layer, 3)


@pytest.mark.parametrize("bits", [3, 4, 16, (3, 5), (16, 4), (4, 16)])
def test_released_components_leave_their_codes(bits):
    result, layer = compressed(rank=4, factor_bits=bits)
    expected = copy.deepcopy(layer)
    assert release_components(layer, 2) is layer
    assert (layer.form.ft_rank, layer.form.coded_rank, layer.rank) == (2, 2, 4)
    for name in ("l", "r"):
        assert torch.equal(layer.factor(name), expected.factor(name)[2:])
    torch.testing.assert_close(layer.dequantize(), result.dequantize(), rtol=2e-2, atol=2e-2)
    assert layer.buffer_bytes() * 8 == layer.stored_bits().total
    release_components(layer, 9)  # all there are
    assert layer.form.coded_rank == 0
    assert layer.form.ft_rank == 4
    assert not any(name.startswith(("l_", "r_")) for name, _ in layer.named_buffers())
    torch.testing.assert_close(layer.dequantize(), result.dequantize(), rtol=2e-2, atol=2e-2)


def test_factors_are_taken_as_they_are():
    _, layer = compressed(rank=3, ft_rank=1)
    whole = layer.dequantize()
    pair = take_factors(layer)
    assert layer.rank == 0
    rest = layer.dequantize()
    torch.testing.assert_close(rest + pair["lora_B"] @ pair["lora_A"], whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no factors"):
        layer.lora_state()
