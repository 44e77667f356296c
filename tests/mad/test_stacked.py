"""Stacked sweeps: each replica is its own training, whatever happens to the others."""

import dataclasses

import pytest
import torch

from mad.protocols import build_optimizer
from mad.stacked import Replicas, fit, train_stacked
from mad.stacked_model import StackedModel, StackedOptimizer
from mad.train import Experiment, main
from workbench.cli import RunOptions
from workbench.errors import ConfigError
from workbench.run import Run
from workbench.seeding import Streams
from workbench.storage import read_safetensors
from workbench.sweep import FAILED

CPU = torch.device("cpu")

BASE = Experiment(
    task="in-context-recall",
    layers=("mh-attention", "swiglu"),
    vocab_size=16,
    seq_len=16,
    num_train_examples=200,
    num_test_examples=48,
    dim=32,
    batch_size=16,
    epochs=4,
    lr=1e-3,
    evaluate_every=25,
    stop_accuracy=2.0,
    run=RunOptions(device="cpu", threads=1),
)  # 13 steps per epoch, the last of 8 rows


def vary(base=BASE, **settings):
    """The same experiment with other settings."""
    return dataclasses.replace(base, **settings)


def three(**settings):
    """Replicas that differ in all that a sweep varies."""
    return [
        vary(**settings, lr=1e-4, weight_decay=0.0, seed=1),
        vary(**settings, lr=1e-3, weight_decay=0.1, seed=1),
        vary(**settings, lr=5e-4, weight_decay=0.1, seed=2),
    ]


def trained(experiments, steps=None, dtype=torch.float32, poison=None):
    """Replicas after that many steps; the weights of one may be made NaN before."""
    replicas = Replicas(experiments, CPU, dtype)
    if poison is not None:
        replicas.model.weights[poison] = torch.nan
    if steps is None:
        fit(replicas)
    else:
        for step in range(1, steps + 1):
            replicas.train_step(step)
        replicas.look()
    return replicas


# ---------------------------------------------------------------- stacked = solo


@pytest.mark.parametrize(
    "layer", ["mh-attention", "mh-hyena", "mamba", "gated-deltanet", "mlp", "linear-attention"]
)
def test_a_replica_is_its_own_run(layer, tmp_path):
    experiments = three(layers=(layer, "swiglu"))
    replicas = trained(experiments)
    assert replicas.optimizer.count == 52
    results = replicas.results()
    solo = vary(experiments[2], run=dataclasses.replace(BASE.run, root=tmp_path, name="solo"))
    expected = main(solo)
    assert results[2].keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert results[2][name] == pytest.approx(value, abs=1e-4), name
        else:
            assert results[2][name] == value, name
    own = read_safetensors(tmp_path / "mad" / "solo" / "model_last.safetensors")
    last = replicas.last(2)
    assert own.keys() == last.keys()
    for name, value in own.items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("protocol", "kind"), [("lab", "sgd"), ("mad-code", "adamw"), ("mad-paper", "adamw")]
)
def test_in_double_precision_they_agree_to_rounding(tmp_path, protocol, kind):
    settings = {"protocol": protocol, "optimizer": kind, "epochs": 1, "evaluate_every": 4}
    experiments = three(**settings, layers=("mh-attention", "mlp"), plateau_patience=0)
    experiments[1] = vary(experiments[1], scheduler="plateau")
    replicas = trained(experiments, dtype=torch.float64)
    options = dataclasses.replace(BASE.run, root=tmp_path, dtype="float64")
    for r in (1, 2):
        main(vary(experiments[r], run=dataclasses.replace(options, name=f"solo-{r}")))
        own = read_safetensors(tmp_path / "mad" / f"solo-{r}" / "model_last.safetensors")
        for name, value in replicas.last(r).items():
            torch.testing.assert_close(value, own[name], rtol=0, atol=1e-12, msg=name)


def test_the_auto_encoder_is_stacked_too(tmp_path):
    base = vary(task="compression", layers=("mlp", "mh-attention"), seq_len=16, epochs=1)
    results = train_stacked([base, vary(base, seed=3)])
    expected = main(vary(base, run=dataclasses.replace(BASE.run, root=tmp_path)))
    assert results[0]["parameters"] == expected["parameters"]
    assert results[0]["test_nll_nats"] == pytest.approx(expected["test_nll_nats"], abs=1e-4)
    assert results[1]["test_nll_nats"] != results[0]["test_nll_nats"]


def test_updates_are_those_of_torch():
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2).double() for _ in range(2)]
    stack = StackedModel(models)
    weights = stack.weights.clone()
    for kind in ("adamw", "sgd"):
        stack.weights.copy_(weights)
        copies = [torch.nn.Linear(3, 2).double() for _ in range(2)]
        for model, row in zip(copies, (0, 1), strict=True):
            model.load_state_dict(stack.state(row))
        decay = torch.tensor([0.1] * 6 + [0.0] * 2).double() * torch.tensor([[1.0], [3.0]])
        ours = StackedOptimizer(kind, stack.weights, decay, (0.9, 0.98), 0.0)
        theirs = [
            build_optimizer(model, kind, lr=lr, weight_decay=wd, protocol="lab")
            for model, lr, wd in zip(copies, (0.1, 0.01), (0.1, 0.3), strict=True)
        ]
        alive, rates = torch.tensor([True, True]), torch.tensor([0.1, 0.01]).double()
        for _ in range(5):
            gradient = torch.randn(2, 8).double()
            ours.update(stack.weights, gradient, ours.norm(gradient), rates, alive)
            for model, optimizer, g in zip(copies, theirs, gradient, strict=True):
                model.weight.grad, model.bias.grad = g[:6].view(2, 3).clone(), g[6:].clone()
                optimizer.step()
        for row, model in enumerate(copies):
            torch.testing.assert_close(stack.state(row)["weight"], model.weight.detach())
            torch.testing.assert_close(stack.state(row)["bias"], model.bias.detach())


# ---------------------------------------------------------------- isolation


def test_a_replica_of_nans_touches_no_other():
    good = three()
    alone = trained(good, 12)
    mixed = trained([good[0], vary(seed=7), *good[1:]], 12, poison=1)
    assert mixed.died == {1: 1}
    assert mixed.active == [0, 2, 3]
    for r, q in ((0, 0), (1, 2), (2, 3)):
        for name, value in alone.last(r).items():
            torch.testing.assert_close(mixed.last(q)[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_learning_rate_of_a_million_touches_no_other():
    good = three(protocol="mad-code")
    wild = [vary(good[0], lr=1e6), vary(good[0], lr=1e12)]
    alone, mixed = trained(good, 12), trained([*good, *wild], 12)
    assert mixed.model.weights[:3].abs().max() < 10
    assert 4 in mixed.died
    assert mixed.died[4] > 1
    assert all(value.isfinite().all() for value in mixed.last(4).values()), "the last finite ones"
    for r in range(3):
        for name, value in alone.last(r).items():
            torch.testing.assert_close(mixed.last(r)[name], value, rtol=0, atol=1e-6, msg=name)


def test_bit_equality_next_to_a_diverging_replica_or_a_sound_one():
    """In a stack of equal size the other replicas are the same to the last bit."""
    sound, bad = trained(three(), 12), trained(three(), 12, poison=1)
    for r in (0, 2):
        for name, value in sound.last(r).items():
            assert torch.equal(bad.last(r)[name], value), name


def test_results_name_the_replica_that_diverged():
    results = train_stacked([vary(epochs=1), vary(epochs=1, lr=1e12)])
    assert results[0]["test_accuracy"] >= 0
    assert "lr 1000000000000.0" in results[1][FAILED]
    assert "not finite at step" in results[1][FAILED]


# ---------------------------------------------------------------- ends of their own


def test_a_finished_replica_leaves_and_the_others_go_on():
    """Three stop for three reasons; their curves end where they stopped."""
    experiments = [
        vary(stop_accuracy=0.0, seed=1),
        vary(early_stop=True, stop_patience=1, lr=1e-9, min_lr=0.0, seed=2),
        vary(seed=3),
    ]
    replicas = trained(experiments)
    ends = [progress.curve[-1]["step"] for progress in replicas.progress]
    assert ends[0] == 25
    assert ends[2] == 52
    assert replicas.active == [2]
    results = replicas.results()
    assert [one["steps"] for one in results] == ends
    alone = trained([experiments[2]])
    for name, value in alone.last(0).items():
        torch.testing.assert_close(replicas.last(2)[name], value, rtol=0, atol=1e-5, msg=name)


def test_targets_and_noise_may_differ():
    base = vary(task="noisy-in-context-recall", noise_vocab_size=4, frac_noise=0.2, epochs=1)
    experiments = [base, vary(base, frac_noise=0.6), vary(base, train_targets="answers")]
    replicas = Replicas(experiments, CPU, torch.float32)
    assert replicas.rows.source == [0, 1, 0]
    _, targets = replicas.batch(1)
    scored = (targets != -100).flatten(1).sum(1)
    assert scored[2] < scored[0]
    together = [one["train_nll_nats"] for one in train_stacked(experiments)]
    for one, nats in zip(experiments, together, strict=True):
        assert train_stacked([one])[0]["train_nll_nats"] == pytest.approx(nats, abs=1e-5)


# ---------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A run of stacked trainings."""

    run: RunOptions
    seed: int = 0


class Stop(Exception):
    """Stands for a kill."""


def run_stack(folder, name, experiments, stop_at=None):
    """The results of a run under that name, which a kill may end before a step."""
    step, options = Replicas.train_step, dataclasses.replace(BASE.run, root=folder, name=name)

    def interrupted(self, at):
        if at == stop_at:
            raise Stop
        return step(self, at)

    with Run.open("mad.stacked", Sweep(options)) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicas, "train_step", interrupted)
        return train_stacked(experiments, opened)


def test_a_stopped_run_continues_to_the_same_results(tmp_path):
    experiments = [
        *three(save_every=10, epochs=2),
        vary(stop_accuracy=0.0, save_every=10, epochs=2),
    ]
    whole = run_stack(tmp_path, "whole", experiments)
    with pytest.raises(Stop):
        run_stack(tmp_path, "stopped", experiments, stop_at=26)
    assert run_stack(tmp_path, "stopped", experiments) == whole
    assert (tmp_path / "mad" / "stopped" / "model_3.safetensors").is_file()


def test_the_step_of_a_divergence_survives_a_kill_before_it_was_looked_at(tmp_path):
    """The checkpoint at step 7 is younger than the divergence and older than the look at 10."""
    settings = {"save_every": 7, "epochs": 1}
    experiments = [*three(**settings), vary(**settings, lr=1e12)]
    whole = run_stack(tmp_path, "whole", experiments)
    died = trained(experiments, 9).died[3]
    assert 1 < died <= 7
    assert f"not finite at step {died} " in whole[3][FAILED]
    with pytest.raises(Stop):
        run_stack(tmp_path, "stopped", experiments, stop_at=9)
    assert run_stack(tmp_path, "stopped", experiments) == whole


def test_orders_and_data_are_those_of_the_streams():
    replicas = Replicas(three(), CPU, torch.float32)
    assert replicas.rows.source == [0, 0, 1]
    ids, _ = replicas.batch(14)  # the first of the second epoch
    for r, seed in enumerate((1, 1, 2)):
        rows = Streams(seed)("order", index=1).permutation(200)[:16]
        expected = replicas.rows.splits[replicas.rows.source[r]]["train"][0][torch.from_numpy(rows)]
        assert torch.equal(ids[r], expected)


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        ([], "at least one"),
        ([BASE, vary(dim=16)], "experiment 1 has dim=16"),
        ([BASE, vary(layers=("mlp",))], "experiment 1 has layers"),
        ([BASE, vary(vocab_size=32)], "rows of one shape"),
        ([BASE, vary(num_train_examples=300)], "rows of one shape"),
    ],
)
def test_what_is_no_single_program_is_refused(experiments, message):
    with pytest.raises(ConfigError, match=message):
        train_stacked(experiments)
