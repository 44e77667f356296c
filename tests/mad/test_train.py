"""The loop: schedules really applied, exact resume, what is scored, comparison, bad input."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mad import compare
from mad.model import LanguageModel, account, build_model
from mad.protocols import PROTOCOLS, build_optimizer, build_schedule
from workbench.errors import ConfigError, DataError, DivergedError
from workbench.run import RunOptions
from workbench.storage import read_safetensors
from workbench.tables import read_csv, read_published

train = importlib.import_module("mad.train")  # the name in `mad` is the function

TINY = train.Experiment(
    task="memorization",
    layers=("mh-attention,num_heads=2", "swiglu"),
    vocab_size=16,
    seq_len=8,
    num_train_examples=60,  # not a multiple of the batch: the last one of an epoch is smaller
    num_test_examples=40,
    dim=8,
    batch_size=16,
    epochs=6,
    lr=1e-2,
    evaluate_every=4,
    save_every=5,
    stop_accuracy=2.0,
    seed=0,
)


def at(folder: Path, experiment=TINY, **changes):
    """The experiment with its runs in that folder."""
    options = RunOptions(root=folder, device="cpu", threads=1)
    return replace(experiment, run=options, **changes)


def metrics(folder: Path) -> list[dict]:
    """All logged lines of the only training run in a folder, without the seconds."""
    (path,) = folder.glob("mad/train-*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# ---------------------------------------------------------------- schedules


def rates(protocol: str, kind: str, epochs: int = 5, per_epoch: int = 7) -> list[float]:
    """The learning rate of every step that the optimiser really uses."""
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, protocol=protocol)
    schedule = build_schedule(
        optimizer, kind, epochs=epochs, steps_per_epoch=per_epoch, floor=1e-6 / 1e-3
    )
    used = []
    for _ in range(epochs * per_epoch):
        used.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    return used


def test_cosine_per_epoch_is_the_papers():
    used = np.array(rates("mad-paper", "cosine-epochs")).reshape(5, 7)
    for epoch in range(5):
        expected = 1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi * epoch / 5)) / 2
        np.testing.assert_allclose(used[epoch], expected, rtol=1e-12)


def test_lab_warms_up_and_falls_to_the_floor():
    used = rates("lab", "cosine", epochs=40)
    assert used[:7] == pytest.approx([1e-3 * (i + 1) / 7 for i in range(7)])  # one epoch
    assert (np.diff(used[7:]) < 0).all()
    assert used[-1] < 2e-6
    short = rates("lab", "cosine")  # an epoch would be a fifth of it: a tenth is enough
    assert short.index(max(short)) == 3 - 1


def test_published_code_never_changes_its_rate():
    assert set(rates("mad-code", PROTOCOLS["mad-code"].schedule)) == {1e-3}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_run_applies_its_schedule(protocol, tmp_path):
    train.main(at(tmp_path, protocol=protocol, epochs=6, min_lr=1e-4))
    logged = [line["lr"] for line in metrics(tmp_path) if "lr" in line]
    assert len(logged) == 2  # steps 10 and 20 of 24
    if protocol == "mad-code":
        assert logged == [1e-2, 1e-2]
    elif protocol == "mad-paper":
        epochs = np.array([9 // 4, 19 // 4])
        expected = 1e-4 + (1e-2 - 1e-4) * (1 + np.cos(np.pi * epochs / 6)) / 2
        np.testing.assert_allclose(logged, expected, rtol=1e-9)
    else:
        assert 1e-2 > logged[0] > logged[1] > 1e-4


def test_protocols_differ_where_they_should():
    model = build_model(["mlp"], vocab_size=5, width=8, max_length=4, seed=0)
    decays = {}
    for name, spec in PROTOCOLS.items():
        optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, protocol=name)
        assert optimizer.param_groups[0]["betas"] == spec.betas
        decays[name] = {
            id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
        }
    norm = id(model.norm.weight)
    assert decays["lab"][norm] == 0.0
    assert decays["mad-code"][norm] == decays["mad-paper"][norm] == 0.1
    assert PROTOCOLS["lab"].selected
    assert not PROTOCOLS["mad-code"].selected


# ---------------------------------------------------------------- model


def test_initialisation_is_as_stated_and_from_the_seed_alone():
    layers = ["attention", "mlp"]
    before = torch.get_rng_state()
    a, b, c = (
        build_model(layers, vocab_size=4000, width=64, max_length=8, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before), "the global generator is put back"
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(a.embedding.weight, c.embedding.weight)
    assert a.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = 64**-0.5
    for linear in (a.head, a.layers[0].qkv, a.layers[1].up):
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert linear.bias is None or not linear.bias.any()
    assert a.head.bias is not None
    assert a.head.weight is not a.embedding.weight


def test_model_is_a_residual_stack():
    model = build_model(["mlp", "swiglu"], vocab_size=9, width=8, max_length=4, seed=0)
    ids = torch.tensor([[1, 2, 3]])
    x = model.embedding(ids)
    for norm, layer in zip(model.norms, model.layers, strict=True):
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        x = x + layer(scaled)
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model(ids), scaled @ model.head.weight.T + model.head.bias)


def test_a_layer_may_keep_its_bias_and_may_be_unable_to_account():
    inner = torch.nn.Linear(8, 8)
    torch.nn.init.ones_(inner.bias)
    inner.bias.no_reinit = True
    model = LanguageModel(5, 8, [torch.nn.Sequential(inner)])
    assert inner.bias.all()
    assert account(model, 4)[0].params == 72


# ---------------------------------------------------------------- the run


def test_a_run_is_repeatable_and_returns_at_once(tmp_path):
    first = train.main(at(tmp_path / "a"))
    second = train.main(at(tmp_path / "b"))
    assert first == second
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert train.main(at(tmp_path / "a")) == first
    assert train.main(at(tmp_path / "c", seed=1))["curve"] != first["curve"]


@pytest.mark.parametrize("fail_at", [2, 5])
def test_resume_is_bit_equal(fail_at, tmp_path, monkeypatch):
    import mad.evaluate

    whole = train.main(at(tmp_path / "whole"))
    real, calls = mad.evaluate.evaluate, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == fail_at:  # the validation after step 4 · fail_at
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mad.evaluate, "evaluate", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            train.main(at(tmp_path / "cut"))
    resumed = train.main(at(tmp_path / "cut"))
    assert resumed == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    weights = [
        read_safetensors(next((tmp_path / name).glob("mad/train-*/model.safetensors")))
        for name in ("whole", "cut")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_the_best_weights_on_validation_are_scored_and_saved(tmp_path):
    result = train.main(at(tmp_path, epochs=15, lr=0.05))
    best = max(result["curve"], key=lambda point: point["accuracy"])
    assert result["validation_accuracy"] == best["accuracy"]
    assert result["steps_selected"] == best["step"]
    assert result["test_accuracy"] == result["test_accuracy_selected"]
    assert result["steps"] == 60
    last = train.main(at(tmp_path, epochs=15, lr=0.05, protocol="mad-code"))
    assert last["test_accuracy"] == last["test_accuracy_last"]


def test_early_stop(tmp_path):
    result = train.main(at(tmp_path, epochs=400, lr=0.03, stop_accuracy=0.6))
    assert result["steps"] < 1600
    assert result["validation_accuracy"] >= 0.6
    assert all(point["accuracy"] < 0.6 for point in result["curve"][:-1])


def test_attention_memorises_and_a_perceptron_cannot(tmp_path):
    """The value is not in the input of the position that must say it; 1/7 is chance here."""
    common = {"num_train_examples": 256, "epochs": 10, "dim": 16, "num_test_examples": 128}
    common["evaluate_every"] = 40
    attention = train.main(at(tmp_path, layers=("mh-attention,num_heads=2", "swiglu"), **common))
    perceptron = train.main(at(tmp_path, layers=("mlp", "mlp"), **common))
    assert attention["test_accuracy"] > 0.95
    # it sees the insert token only: at best the commonest value
    assert perceptron["test_accuracy"] < 0.22
    assert attention["ceiling"] == pytest.approx(1.0)


def test_answers_can_be_the_only_training_target(tmp_path):
    recall = {"task": "in-context-recall", "seq_len": 8, "epochs": 2, "vocab_size": 8}
    dense = train.main(at(tmp_path, **recall))
    answers = train.main(at(tmp_path, **recall, train_targets="answers"))
    assert dense["curve"] != answers["curve"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path):
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train.main(at(tmp_path, optimizer="sgd", lr=1e30, protocol="mad-code"))
    assert list(tmp_path.glob("mad/train-*/diverged_step_*"))


# ---------------------------------------------------------------- comparison and report

PAIR = compare.Experiment(
    tasks=("memorization,vocab_size=16,seq_len=8,epochs=3", "in-context-recall,seq_len=8,epochs=1"),
    stacks=("mh-attention,num_heads=2 swiglu", "mlp"),
    dim=8,
    batch_size=64,
    lr=1e-2,
    num_test_examples=64,
    evaluate_every=100,
    executor="serial",
)


def test_comparison_trains_every_pair_and_draws_what_it_found(tmp_path):
    experiment = at(tmp_path, PAIR)
    result = compare.main(experiment)
    assert result["runs"] == 4
    (folder,) = tmp_path.glob("mad/compare-*")
    rows = read_csv(folder / "tables/comparison.csv")
    assert [row["stack"] for row in rows] == ["mA(num_heads=2)-Sg", "M"] * 2
    for row in rows:
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert result[f"{row['task']}: {row['stack']}"] == pytest.approx(row["accuracy"])
    assert (folder / "figures/comparison.svg").is_file()
    assert len(list(tmp_path.glob("mad/train-*/results.json"))) == 4
    # the members are the runs that mad.train itself would make and find again
    one = compare.members(experiment)[0]
    assert one.vocab_size == 16
    assert train.main(one)["test_accuracy"] == pytest.approx(rows[0]["accuracy"])


def test_published_figures_are_complete():
    rows = read_published(Path(train.__file__).parent / "published.csv")
    table = {(r["row"], r["column"]): r["value"] for r in rows if r["table"] == "mad_scores"}
    models = {row for row, _ in table}
    assert models == {"Transformer", "Hyena", "MH Hyena", "Mamba", "GLA", "DeltaNet"}
    for model in models:
        tasks = [v for (row, column), v in table.items() if row == model and column != "average"]
        assert len(tasks) == 6
        assert np.mean(tasks) == pytest.approx(table[model, "average"], abs=0.06)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "recall"}, "unknown task"),
        ({"task": "memorization", "vocab_size": 2}, "at least 3"),
        ({"task": "in-context-recall", "seq_len": 7}, "even"),
        ({"multi_query": False}, "no option --multi-query"),
        ({"layers": ("atention",)}, "nearest: attention"),
        ({"layers": ()}, "no layers given"),
        ({"epochs": 0}, "epochs=0"),
        ({"num_train_examples": 0}, "num_train_examples=0"),
        ({"lr": 0.0, "min_lr": 0.0}, "lr > 0"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"weight_decay": -1.0}, "negative"),
    ],
)
def test_bad_experiments_are_refused_before_anything_is_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


def test_a_width_that_does_not_fit_is_one_error(tmp_path):
    with pytest.raises(ConfigError, match="not divisible by num_heads=2"):
        train.main(at(tmp_path, dim=9))


def test_hyena_with_too_short_filters_is_one_error(tmp_path):
    with pytest.raises(ConfigError, match="max_length=4"):
        train.main(at(tmp_path, layers=("mh-hyena,num_heads=4",), max_length=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("memorization,epochs",)}, "setting=value"),
        ({"tasks": ("memorization,epoch=3",)}, "epochs"),
        ({"tasks": ("memorisation",)}, "nearest: memorization"),
        ({"stacks": ("mh-atention",)}, "nearest: mh-attention"),
        ({"stacks": ()}, "nothing to compare"),
    ],
)
def test_bad_comparisons_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(PAIR, **changes)


def test_failed_members_are_named(tmp_path):
    with pytest.raises(DivergedError, match=r"1 of 2 training runs failed.*not divisible"):
        compare.main(
            at(tmp_path, PAIR, tasks=PAIR.tasks[:1], dim=9, stacks=("attention,num_heads=2", "mlp"))
        )


def test_stacks_may_be_named(tmp_path):
    named = replace(PAIR, tasks=PAIR.tasks[:1], stacks=("perceptron: mlp mlp", "mlp"))
    result = compare.main(at(tmp_path, named))
    assert set(result) == {"memorization: perceptron", "memorization: M", "runs"}
    (folder,) = tmp_path.glob("mad/compare-*")
    rows = read_csv(folder / "figures/comparison.csv")
    assert [row["layers"] for row in rows] == ["mlp mlp", "mlp"]


# ---------------------------------------------------------------- published rows


@pytest.fixture
def published(tmp_path):
    """A folder as the published data sets come: dense training targets, answers for the test."""
    from mad.dataset import PUBLISHED_SEED, DataSet
    from mad.registry import build_task
    from mad.tasks.task import generate_splits

    options = {"vocab_size": 8, "seq_len": 8, "num_train_examples": 60}
    experiment = replace(TINY, task="in-context-recall", **options, evaluate_every=20, epochs=2)
    task, n_train = build_task("in-context-recall", options)
    data = DataSet("in-context-recall", task, n_train, 40, PUBLISHED_SEED)
    rows = generate_splits(task, data.sizes, 7, legacy=True)
    for split, targets in (("train", rows["train"].dense), ("test", rows["test"].answers)):
        folder = tmp_path / "zenodo" / data.published_name / split
        folder.mkdir(parents=True)
        np.save(folder / "inputs.npy", rows[split].inputs)
        np.save(folder / "targets.npy", targets)
    return replace(experiment, zenodo=tmp_path / "zenodo"), rows


def test_published_rows_are_trained_on_and_scored(published, tmp_path, monkeypatch):
    experiment, rows = published
    seen = {}
    score = train.score_run

    def spy(experiment, task, model, progress, data):
        seen.update(data)
        return score(experiment, task, model, progress, data)

    monkeypatch.setattr(train, "score_run", spy)
    results = train.main(at(tmp_path, experiment))
    assert results["n_rows"] == 40
    np.testing.assert_array_equal(seen["train"][0].numpy(), rows["train"].inputs)
    np.testing.assert_array_equal(seen["train"][2].numpy(), rows["train"].dense)
    np.testing.assert_array_equal(seen["test"][1].numpy(), rows["test"].answers)
    drawn = {row.tobytes() for row in rows["train"].inputs}
    assert not all(row.astype(np.int64).tobytes() in drawn for row in seen["val"][0].numpy())


def test_published_rows_that_change_or_are_missing_stop_the_run(published, tmp_path):
    experiment, _ = published
    train.main(at(tmp_path, experiment))
    (folder,) = tmp_path.glob("mad/train-*")
    (folder / "results.json").unlink()
    (path,) = tmp_path.glob("zenodo/*/test/inputs.npy")
    changed = np.load(path)
    changed[0, 0] = (changed[0, 0] + 1) % 4
    np.save(path, changed)
    with pytest.raises(ConfigError, match="data has changed since this run began"):
        train.main(at(tmp_path, experiment))
    with pytest.raises(DataError, match="no such published data set"):
        train.main(at(tmp_path, experiment, vocab_size=10))
    with pytest.raises(ConfigError, match="dense training targets only"):
        replace(experiment, train_targets="answers")


def test_the_log_names_the_kernel_of_every_layer_that_has_one(tmp_path):
    train.main(at(tmp_path, layers=("mamba", "swiglu"), epochs=1))
    (log,) = tmp_path.glob("mad/train-*/log.txt")
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if " kernel " in line]
    assert any("selective_scan" in line and "unbind scan" in line for line in lines)
    assert any("causal_conv1d" in line and "torch conv1d" in line for line in lines)
