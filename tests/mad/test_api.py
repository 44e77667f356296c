"""Public functions, configuration objects, the auto-encoder, names that are function and module."""

import importlib
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

import mad
from mad import MADConfig, MADModelConfig
from mad.model import AutoEncoder, build_model, rms_norm, sinusoids
from mad.protocols import Plateau, build_optimizer, build_schedule, observe
from mad.registry import LAYERS, LayerSpec
from mad.tasks.memorization import Memorization
from mad.train import Experiment, task_options
from mad.train import main as train_one
from tests.conftest import ROOT, child_environment
from workbench.errors import ConfigError
from workbench.run import RunOptions

TINY = {
    "task": "memorization",
    "vocab_size": 16,
    "seq_len": 8,
    "num_train_examples": 64,
    "num_test_examples": 32,
    "batch_size": 16,
    "epochs": 3,
    "lr": 1e-2,
    "accelerator": "cpu",
    "precision": "32",
    "seed": 0,
}


def tiny_model(seed: int = 0) -> torch.nn.Module:
    return MADModelConfig(
        layers=("mh-attention,num_heads=2", "mlp"), dim=8, max_length=8, seed=seed
    ).build_model_from_registry()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "statements",
    [
        "from mad import train",
        "import mad.train; from mad import train",
        "from mad import train; import mad.train; from mad import train",
        "import mad.train; train = mad.train",
        "import mad.train as train",
        "from mad.train import main; import mad; train = mad.train",
        "import importlib; importlib.import_module('mad.train'); from mad import train",
    ],
)
def test_the_function_keeps_its_name_in_any_order_of_imports(statements):
    code = f"""{statements}
import importlib, sys
assert type(train).__name__ == "function" and train.__module__ == "mad.api", train
module = importlib.import_module("mad.train")
assert module is sys.modules["mad.train"] and callable(module.main) and module.EXPERIMENT
assert "torch" not in sys.modules, "a name costs nothing before it is called"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=child_environment(), capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_script_is_still_a_module():
    assert isinstance(mad.train, FunctionType)
    assert isinstance(importlib.import_module("mad.train"), ModuleType)
    assert isinstance(mad.registry, ModuleType)
    mad.something = 1  # other names are as in any module
    assert mad.something == 1
    del mad.something
    assert {name: getattr(mad, name) for name in mad.__all__}["train"] is mad.train


# ---------------------------------------------------------------- configuration


def test_published_fields_in_their_order():
    names = [f.name for f in fields(MADConfig)]
    assert names[:5] == ["task", "vocab_size", "seq_len", "frac_noise", "noise_vocab_size"]
    assert len(names) == 31
    assert [f.name for f in fields(MADModelConfig)][:8] == [
        "layers", "backbone", "dim", "max_length", "vocab_size", "norm", "position_embeds",
        "embed_drop_rate",
    ]  # fmt: skip
    config = MADConfig()
    assert (config.batch_size, config.epochs, config.lr, config.seed) == (128, 200, 5e-4, 12345)


def test_the_published_directory_name():
    path = MADConfig(data_path="data").train_dataset_path
    name = "t-CR_vs-16_sl-128_ntr-12800_nte-1280_km-1_vm-1_mq-1_fn-0#0_nvs-0_ntc-0_s-12345"
    assert path == Path("data") / name / "train"
    assert "mq-0" in str(MADConfig(multi_query=False).dataset_path)


def test_unknown_fields_are_errors_and_known_ones_are_checked():
    config = MADConfig()
    with pytest.raises(ConfigError, match="nearest: vocab_size"):
        config.update_from_kwargs({"seq_len": 64, "vocabsize": 3})
    assert config.seq_len == 128, "nothing is changed by a refused update"
    assert config.update_from_kwargs({"seq_len": 64}) is config
    assert config.seq_len == 64
    with pytest.raises(ConfigError, match="even"):
        config.update_from_kwargs({"seq_len": 63})
    assert config.seq_len == 64
    with pytest.raises(ConfigError, match="no option --num-tokens-to-copy"):
        MADConfig(num_tokens_to_copy=4)
    with pytest.raises(ConfigError, match="one device"):
        MADConfig(devices=2)
    with pytest.raises(ConfigError, match="nearest: mh-attention"):
        MADModelConfig().update_from_kwargs({"layers": ("mh-atention",)})
    with pytest.raises(ConfigError, match="leave it at -100"):
        MADConfig(target_ignore_index=-1)


def test_a_config_says_the_same_as_the_flags():
    same = MADConfig(**TINY).experiment()
    assert same.task == "memorization"
    assert same.run.device == "cpu"
    assert same.run.dtype == "float32"
    assert same.scheduler is None
    assert task_options(same)["vocab_size"] == 16
    assert MADConfig(scheduler="plateau").experiment().scheduler == "plateau"
    assert MADConfig(multi_query=False).build_task().multi_query is False


def test_a_model_config_builds_what_it_says():
    model = MADModelConfig(
        layers=("mlp",), dim=8, vocab_size=5, max_length=6, norm=torch.nn.LayerNorm,
        position_embeds=torch.nn.Embedding, embed_drop_rate=0.5,
    ).build_model_from_registry()  # fmt: skip
    assert isinstance(model.norm, torch.nn.LayerNorm)
    assert model.positions.shape == (6, 8)
    ids = torch.zeros(1, 6, dtype=torch.long)
    assert not torch.equal(model(ids), model(ids)), "dropout"
    model.eval()
    y = model(ids)
    assert not torch.allclose(y[:, 0], y[:, 1]), "positions tell equal tokens apart"
    with pytest.raises(ConfigError, match="raise max_length"):
        model(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"shape \(3, 8\)"):
        MADModelConfig(
            layers=("mlp",), dim=8, position_embeds=lambda n, d: torch.zeros(3, d)
        ).build_model_from_registry()
    with pytest.raises(ConfigError, match="nearest: autoencoder"):
        MADModelConfig(backbone="autoencode").build_model_from_registry()


class Placed(torch.nn.Module):
    def __init__(self, width: int, layer_id: int, n_layers: int, scale: float = 1.0) -> None:
        super().__init__()
        self.place = (layer_id, n_layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_layer_that_asks_learns_its_place(monkeypatch):
    monkeypatch.setattr("mad.layers.channel.Placed", Placed, raising=False)
    model = build_model(
        ["mlp", "mad.layers.channel:Placed", "mad.layers.channel:Placed,scale=2.0"],
        vocab_size=4, width=4, max_length=4, seed=0,
    )  # fmt: skip
    assert [layer.place for layer in model.layers[1:]] == [(1, 3), (2, 3)]


# ---------------------------------------------------------------- auto-encoder


def test_sinusoids_by_hand():
    table = sinusoids(3, 7)
    rates = [1.0, 10000**-0.5, 1e-4]
    expected = [*(torch.tensor(2 * w).sin() for w in rates)]
    expected += [*(torch.tensor(2 * w).cos() for w in rates), torch.tensor(0.0)]
    torch.testing.assert_close(table[2], torch.stack(expected))


def auto_encoder(pool: str, **options) -> AutoEncoder:
    model = build_model(
        ["mh-attention,num_heads=2", "mlp"], vocab_size=9, width=8, max_length=6, seed=0,
        backbone="autoencoder", global_pool=pool, **options,
    )  # fmt: skip
    assert isinstance(model, AutoEncoder)
    return model


@pytest.mark.parametrize("pool", ["last", "cls", "avg"])
def test_everything_goes_through_one_vector(pool):
    model, ids = auto_encoder(pool), torch.arange(6)[None] % 9
    code = model.encode(ids)
    assert code.shape == (1, 8)
    logits = model(ids)
    torch.testing.assert_close(logits, model.decode(code, 6))
    assert model(ids[:, :4]).shape == (1, 4, 9), "as many positions as were read"

    x = code + sinusoids(6, 8)[3]  # position 3 by the equation
    for linear in (model.decoder[1], model.decoder[4]):
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = torch.nn.functional.gelu(scaled @ linear.weight.T + linear.bias)
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(logits[:, 3], scaled @ model.head.weight.T + model.head.bias)

    changed = ids.clone()
    changed[0, 0] = 8
    assert not torch.allclose(model(changed)[:, 5], logits[:, 5]), "every token reaches the code"
    pooled = {
        "last": model.mix(model.embed(ids))[:, -1],
        "avg": model.mix(model.embed(ids)).mean(1),
    }
    if pool in pooled:
        torch.testing.assert_close(code, pooled[pool])


def test_hyena_filters_reach_the_pooled_position():
    model = build_model(
        ["mh-hyena,num_heads=4"], vocab_size=9, width=8, max_length=6, seed=0,
        backbone="autoencoder", global_pool="cls",
    )  # fmt: skip
    assert model(torch.zeros(1, 6, dtype=torch.long)).shape == (1, 6, 9)


class Kept(torch.nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        torch.nn.init.constant_(self.weight, 7.0)
        torch.nn.init.constant_(self.bias, 3.0)
        self.weight.no_reinit = self.bias.no_reinit = True


def test_initialisation_of_the_auto_encoder_keeps_what_is_marked():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = torch.nn.Linear(256, 256)
        model = AutoEncoder(9, 256, [Kept(256), plain])
    assert (model.layers[0].weight == 7).all()
    assert (model.layers[0].bias == 3).all()
    for linear in (plain, model.decoder[1], model.decoder[4], model.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()


def test_bad_backbones_are_refused():
    with pytest.raises(ConfigError, match="nearest: last"):
        auto_encoder("lst")
    with pytest.raises(ConfigError, match="unknown option of backbone"):
        build_model(["mlp"], vocab_size=4, width=4, max_length=4, seed=0, global_pool="avg")


class Squeezed(Memorization):
    backbone = "autoencoder"


def test_a_task_may_ask_for_the_auto_encoder(monkeypatch, tmp_path):
    monkeypatch.setattr("mad.tasks.memorization.Squeezed", Squeezed, raising=False)
    one = MADConfig(**TINY | {"task": "mad.tasks.memorization:Squeezed"}).experiment(
        layers=("mlp",), dim=8, run=RunOptions(root=tmp_path, device="cpu")
    )
    through = train_one(one)
    (log,) = tmp_path.glob("mad/train-*/log.txt")
    assert "autoencoder" in log.read_text(encoding="utf-8")
    plain = train_one(replace(one, backbone="language-model"))
    assert through["parameters"] - plain["parameters"] == 2 * (8 + 8 * 8 + 8)


# ---------------------------------------------------------------- schedule, marks, flags


def test_plateau_lowers_the_rate_when_the_loss_stays():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = build_schedule(
        optimizer, "plateau", epochs=9, steps_per_epoch=1, floor=0.3, plateau_patience=1,
        plateau_factor=0.5,
    )  # fmt: skip
    used = []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        used.append(schedule.get_last_lr()[0])
        observe(schedule, loss)
        optimizer.step()
        schedule.step()
    assert used == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.3, 0.3]

    again = build_schedule(
        torch.optim.SGD([weight], lr=1.0), "plateau", epochs=9, steps_per_epoch=1, floor=0.3
    )
    again.load_state_dict(schedule.state_dict())
    assert vars(again.lr_lambdas[0]) == vars(schedule.lr_lambdas[0])
    assert isinstance(again.lr_lambdas[0], Plateau)


def test_lab_respects_marks_and_the_published_protocols_do_not():
    model = torch.nn.Linear(4, 4)
    model.weight.no_weight_decay = True
    for protocol, expected in (("lab", 0.0), ("mad-code", 0.1)):
        optimizer = build_optimizer(model, "adamw", lr=1.0, weight_decay=0.1, protocol=protocol)
        (decay,) = (
            g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
            if p is model.weight
        )  # fmt: skip
        assert decay == expected


def test_published_names_of_flags_are_the_flags_here():
    one = Experiment(accelerator="gpu", precision="bf16-mixed", log_to_wandb=True)
    assert (one.run.device, one.run.dtype, one.run.wandb) == ("cuda", "bfloat16", True)
    assert one.accelerator is None
    same = Experiment(run=RunOptions(device="cuda", dtype="bfloat16", wandb=True))
    assert one == same


def test_options_without_a_flag_reach_the_task():
    one = Experiment(task="memorization", options=("map_seed=7",))
    assert task_options(one) == {"map_seed": 7}
    with pytest.raises(ConfigError, match="no option --map-sed"):
        Experiment(task="memorization", options=("map_sed=7",))
    with pytest.raises(ConfigError, match="option=value"):
        Experiment(task="memorization", options=("map_seed",))
    with pytest.raises(ConfigError, match="no option --k-motif-size"):
        Experiment(task="memorization", k_motif_size=2)


def test_patience_ends_a_run_that_does_not_improve(tmp_path):
    one = MADConfig(**TINY | {"epochs": 50, "lr": 1e-9, "min_lr": 1e-9}).experiment(
        layers=("mlp",), dim=8, early_stop=True, stop_patience=4,
        run=RunOptions(root=tmp_path, device="cpu"),
    )  # fmt: skip
    result = train_one(one)
    assert len(result["curve"]) == 5
    assert result["steps"] == 5 * 4


def test_the_optimistic_score_is_the_best_seen_on_test(tmp_path):
    one = MADConfig(**TINY).experiment(
        layers=("mh-attention,num_heads=2", "mlp"), dim=8, epochs=8,
        run=RunOptions(root=tmp_path, device="cpu"),
    )  # fmt: skip
    result = train_one(one)
    seen = [point["test"] for point in result["curve"]]
    assert result["test_accuracy_max_optimistic"] == max(seen)
    at_best = next(p for p in result["curve"] if p["step"] == result["steps_selected"])
    assert result["test_accuracy_selected"] == at_best["test"]
    assert result["test_accuracy_last"] == seen[-1]
    blind = train_one(replace(one, test_curve=False, save_checkpoints=False))
    assert "test_accuracy_max_optimistic" not in blind
    assert blind["test_accuracy"] == result["test_accuracy"]
    kept = list(tmp_path.glob("mad/train-*/model*.safetensors"))
    assert sorted(p.name for p in kept) == ["model.safetensors", "model_last.safetensors"]


# ---------------------------------------------------------------- the function


def test_train_returns_one_row_and_finds_it_again(tmp_path):
    config, model = MADConfig(**TINY), tiny_model()
    before = model.head.weight.detach().clone()
    frame = mad.train(model, config, tmp_path, model_id="A-M")
    assert len(frame) == 1
    row = frame.iloc[0]
    assert row["task"] == "memorization"
    assert row["stack"] == "A-M"
    assert row["test_acc"] == row["test_accuracy"]
    assert row["test_ppl"] == pytest.approx(torch.tensor(row["test_loss"]).exp().item())
    assert {"train_acc", "train_ppl", "train_loss"} <= set(frame.columns)
    assert not torch.equal(model.head.weight, before), "trained in place"
    (written,) = tmp_path.glob("mad/train-*/results.csv")

    again = tiny_model()
    assert mad.train(again, config, tmp_path, model_id="A-M").equals(frame)
    assert torch.equal(again.head.weight, model.head.weight), "the trained weights are put in"
    mad.train(tiny_model(seed=1), config, tmp_path, model_id="A-M")
    mad.train(tiny_model(), replace(config, epochs=2), tmp_path, model_id="A-M")
    assert len(list(tmp_path.glob("mad/train-*/results.csv"))) == 3
    assert written.is_file()


def test_train_equals_the_script_with_the_same_model(tmp_path):
    named = MADConfig(**TINY).experiment(
        layers=("mh-attention,num_heads=2", "mlp"), dim=8,
        run=RunOptions(root=tmp_path / "script", device="cpu", dtype="float32"),
    )  # fmt: skip
    from workbench.seeding import Streams

    seed = Streams(0).integer("init")
    script = train_one(named)
    frame = mad.train(
        tiny_model(seed), MADConfig(**TINY), tmp_path / "function", save_checkpoints=False
    )
    assert frame["test_nll_nats"][0] == script["test_nll_nats"]
    assert not list((tmp_path / "function").rglob("model*.safetensors"))


def test_train_refuses_what_is_no_model_and_settings_that_are_the_models(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module"):
        mad.train("mlp", MADConfig(**TINY), tmp_path)
    with pytest.raises(ConfigError, match="decided by the model"):
        mad.train(tiny_model(), MADConfig(**TINY), tmp_path, layers=("mlp",))


def test_any_norm_of_a_width_will_do():
    assert isinstance(rms_norm(4), torch.nn.RMSNorm)
    assert LAYERS["mlp"].kind == "channel"
    assert isinstance(LAYERS["mlp"], LayerSpec)
