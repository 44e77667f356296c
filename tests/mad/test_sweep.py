"""A sweep: its members, the choice on validation, and the same results stacked or not."""

import dataclasses

import pytest

from mad.sweep import Experiment, main, members
from workbench.cli import RunOptions
from workbench.errors import ConfigError, DivergedError

SMALL = Experiment(
    task="memorization,vocab_size=32,seq_len=8,evaluate_every=8",
    layers=("mh-attention,num_heads=2", "mlp"),
    lrs=(1e-4, 1e-2),
    weight_decays=(0.0, 0.1),
    seeds=(1,),
    dim=16,
    batch_size=32,
    epochs=2,
    num_test_examples=64,
    executor="serial",
    run=RunOptions(device="cpu", threads=1),
)


def test_members_are_the_grid_with_the_tasks_own_settings():
    runs = members(dataclasses.replace(SMALL, seeds=(1, 2)))
    assert len(runs) == 8
    assert {(one.lr, one.weight_decay, one.seed) for one in runs} == {
        (lr, decay, seed) for lr in (1e-4, 1e-2) for decay in (0.0, 0.1) for seed in (1, 2)
    }
    assert {(one.task, one.vocab_size, one.evaluate_every) for one in runs} == {
        ("memorization", 32, 8)
    }


def test_stacked_or_one_by_one_the_sweep_finds_the_same(tmp_path):
    found = []
    for stacked in ("yes", "no"):
        run = dataclasses.replace(SMALL.run, root=tmp_path / stacked)
        found.append(main(dataclasses.replace(SMALL, stacked=stacked, run=run)))
    for one, other in zip(*(results["points"] for results in found), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], abs=0.02), name
    best = found[0]
    assert best["validation_accuracy"] == max(p["validation_accuracy"] for p in best["points"])
    assert best["runs"] == 4
    folder = next((tmp_path / "yes" / "mad").glob("sweep-*"))
    assert (folder / "tables" / "points.csv").is_file()


def test_points_that_diverge_are_no_candidates(tmp_path):
    run = dataclasses.replace(SMALL.run, root=tmp_path)
    wild = dataclasses.replace(SMALL, lrs=(1e-3, 1e15), stacked="yes", run=run)
    results = main(wild)
    assert results["lr"] == 1e-3
    assert results["runs_failed"] == 2
    with pytest.raises(DivergedError, match="not finite at step"):
        main(dataclasses.replace(wild, lrs=(1e15,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrs": ()}, "nothing to sweep"),
        ({"task": "memorisation"}, "nearest: memorization"),
        ({"task": "memorization,vocab=3"}, "vocab"),
        ({"lrs": (-1.0,)}, "lr=-1.0"),
    ],
)
def test_impossible_sweeps_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **settings)
