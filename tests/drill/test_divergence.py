"""NaN and infinity in losses, gradients, features, weights, Hessians and labels of every method.

Row 27 of the fault table: the run stops before the update, the batch is saved, every checkpoint is
finite, the state is the one of a run that was stopped a step earlier, and the same command without
the fault ends as if nothing had happened.
"""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch

from tests.drill.jobs import JOBS, Job, stop
from workbench import storage
from workbench.errors import DataError

CONFIG = {module: config for config, module in JOBS.items()}
LOOPS = {
    "mad.train": ("train", 3),
    "early_exit.train": ("translators", 4),
    "early_exit.train ": ("gates", 6),
    "sdm.reexpress": ("train", 2),
    "sycomode.consolidate": ("lora", 3),
}


def tensors_of(tree) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    storage.pack(tree, found)
    return found


def assert_equal_trees(one, two) -> None:
    a, b = {}, {}
    assert storage.pack(one, a) == storage.pack(two, b)
    assert sorted(a) == sorted(b)
    for name, value in a.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[name])), name


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("gradient", "nan"),
        ("loss", "inf"),
        pytest.param("loss", "nan", marks=pytest.mark.slow),
        pytest.param("gradient", "inf", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_stops_before_the_update(name, kind, value, warm, whole, tmp_path):
    (phase, step), config = LOOPS[name], CONFIG[name.strip()]
    job, witness = Job(warm, config, tmp_path / "runs"), tmp_path / "witness"
    poison = ("tests.drill.poison:training", [kind, value, phase, step, str(witness)])
    done = job.run(prepare=(poison,))
    assert done["status"] == 2, done["stderr"]
    assert "Traceback" not in done["stderr"]
    shown = {"loss": "loss = ", "gradient": "gradient_norm = "}[kind]
    # an infinite entry makes the norm after scaling NaN, the norm itself stays infinite
    assert f"{shown}{value} at step {step}; the batch is in" in done["stderr"]
    assert not [p for p in job.folder.rglob("results.json") if phase in p.read_text("utf-8")]

    (batch,) = job.folder.rglob("diverged_step_*")
    assert tensors_of(storage.load_tree(batch)["batch"])
    saved = [p.parent for p in job.folder.glob("*/*/checkpoints/*/step_*/tree.json")]
    assert saved
    for checkpoint in saved:
        for key, tensor in tensors_of(storage.load_tree(checkpoint)).items():
            if torch.as_tensor(tensor).is_floating_point():
                assert torch.as_tensor(tensor).isfinite().all(), f"{checkpoint}: {key}"

    if kind == "gradient":
        stopped = Job(warm, config, tmp_path / "stopped" / "runs")
        stop(stopped, "term", f"step {phase}", step - 1)
        (newest,) = stopped.folder.glob(f"*/*/checkpoints/{phase}/step_{step - 1:08d}")
        assert_equal_trees(storage.load_tree(witness), storage.load_tree(newest)["objects"])

        shutil.rmtree(batch)
        assert job.run()["status"] == 0
        assert job.fingerprints() == whole(config)[0]


@pytest.mark.parametrize(
    ("module", "poison", "words"),
    [
        ("lplr_q.run", "weights", "not finite|non-finite|NaN"),
        ("early_exit.train", "weights", "NaN or infinite"),
        ("sdm.reexpress", "weights", "not finite|NaN"),
        ("sycomode.consolidate", "weights", "not finite|NaN|nan"),
        ("lplr_q.run", "hessians", "non-finite entries"),
        ("sdm.reexpress", "features", "first at row 3, column 1"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_a_method_is_given_is_refused(module, poison, words, value, warm, tmp_path):
    job = Job(warm, CONFIG[module], tmp_path / "runs")
    done = job.run(prepare=((f"tests.drill.poison:{poison}", [value]),))
    assert done["status"] == 2, done["stderr"]
    assert "Traceback" not in done["stderr"]
    assert re.search(words, done["stderr"]), done["stderr"]
    assert not list(job.folder.rglob("results.json"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_labels_that_are_no_classes_are_refused(value):
    from sdm.estimator import SDMClassifier

    x = np.random.default_rng(0).standard_normal((40, 3))
    labels = np.arange(40) % 2 * 1.0
    labels[7] = value
    with pytest.raises(DataError):
        SDMClassifier(n_iterations=1, epochs=1).fit(x, labels)
