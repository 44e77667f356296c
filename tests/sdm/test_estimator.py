"""The classifier as scikit-learn users meet it, and its folder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdm import SDMClassifier
from workbench.errors import CheckpointError, ConfigError, DataError


def data(n: int = 160, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 5))
    x[:, 0] += np.where(y == 1, 2.0, -2.0)
    return x, np.array(["no", "yes"])[y]


def small(**changes) -> SDMClassifier:
    settings = {"n_iterations": 2, "epochs": 6, "exemplar_dim": 8, "learning_rate": 1e-2}
    return SDMClassifier(**(settings | {"target_accuracy": 0.8} | changes))


@pytest.fixture(scope="module")
def fitted():
    return small().fit(*data())


def test_it_predicts_labels_probabilities_and_abstentions(fitted):
    x, y = data(seed=1)
    assert fitted.score(x, y) > 0.9
    assert np.allclose(fitted.predict_proba(x).sum(1), 1)
    answers = fitted.predict_selective(x)
    assert set(answers.tolist()) <= {"no", "yes", -1}
    assert np.array_equal(answers != -1, fitted.admitted(x))
    assert 0.2 < fitted.admitted(x).mean() < 1
    assert not fitted.admitted(x * 100).any()


def test_an_explanation_names_the_nearest_training_rows(fitted):
    x, y = data()
    index = fitted.train_index_[fitted.best_iteration_]
    (nearest,) = fitted.explain(x[index[3]][None], k=2)
    assert nearest[0]["row"] == index[3]
    assert nearest[0]["distance"] == 0.0
    assert nearest[0]["label"] == y[index[3]]
    assert nearest[1]["distance"] > 0


def test_it_follows_the_conventions(fitted):
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import cross_val_score

    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "models_")
    assert is_classifier(copy)
    assert "target_accuracy=0.8" in repr(copy)
    scores = cross_val_score(small(n_iterations=1, epochs=12), *data(), cv=2)
    assert scores.min() > 0.8
    with pytest.raises(ConfigError, match="unknown parameter"):
        copy.set_params(epoch=3)


def test_the_same_seed_gives_the_same_model():
    x, _ = data(seed=2)
    a, b = (small(n_iterations=1, epochs=2).fit(*data()).predict_proba(x) for _ in range(2))
    assert np.array_equal(a, b)
    other = small(n_iterations=1, epochs=2, random_state=1).fit(*data()).predict_proba(x)
    assert not np.array_equal(a, other)


def test_saved_and_loaded_it_scores_the_same_bits(fitted, tmp_path):
    x, _ = data(seed=3)
    again = SDMClassifier.load(fitted.save(tmp_path / "model"))
    before, after = fitted.score_result(x), again.score_result(x)
    for name in before.__dataclass_fields__:
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert again.predict(x).tolist() == fitted.predict(x).tolist()
    assert again.explain(x[:2]) == fitted.explain(x[:2])


@pytest.mark.parametrize("name", ["weights.safetensors", "support.safetensors", "splits.json"])
def test_a_damaged_or_missing_file_is_refused(fitted, tmp_path, name):
    folder = fitted.save(tmp_path / "model")
    file = folder / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="altered"):
        SDMClassifier.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        SDMClassifier.load(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        SDMClassifier.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 99}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="format 99"):
        SDMClassifier.load(tmp_path)


def test_the_ensemble_admits_no_more_than_its_best_model():
    x, _ = data(seed=4)
    model = small().fit(*data())
    alone = model.admitted(x)
    together = model.set_params(ensemble=True).admitted(x)
    assert (together <= alone).all()
    other = [m.score(model._features(x)).admitted for m in model.models_]
    assert np.array_equal(together, np.logical_and.reduce(other))


def test_recalibration_needs_no_training_and_equals_a_fit_at_that_target():
    x, _ = data(seed=5)
    moved = small().fit(*data()).recalibrate(0.9)
    direct = small(target_accuracy=0.9).fit(*data())
    assert moved.model_.region == direct.model_.region
    assert np.array_equal(moved.admitted(x), direct.admitted(x))


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.full((8, 2), np.nan), [0, 1] * 4, "not finite; first at row 0, column 0"),
        (np.ones((8, 2, 2)), [0, 1] * 4, "shape"),
        (np.ones((0, 2)), [], "shape"),
        (np.arange(16.0).reshape(8, 2), [1] * 8, "one class"),
        (np.arange(16.0).reshape(8, 2), [0, 1], "8 rows of features but 2 labels"),
        (np.arange(16.0).reshape(8, 2), [0] * 7 + [1], "class 1 has"),
        ([["a", "b"]], [0], "no numeric matrix"),
    ],
)
def test_bad_data_is_named(x, y, match):
    with pytest.raises(DataError, match=match):
        small().fit(x, y)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"target_accuracy": 0.5}, "accuracy wanted, not an error rate"), ({"alpha": 1.0}, "alpha"),
     ({"epochs": 0}, "epochs 0"), ({"learning_rate": -1.0}, "learning_rate")],
)  # fmt: skip
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ConfigError, match=match):
        small(**settings).fit(*data())


def test_another_width_or_an_unfitted_model_is_named(fitted):
    with pytest.raises(DataError, match="X has 3 features"):
        fitted.predict(np.ones((2, 3)))
    with pytest.raises(DataError, match="not fitted"):
        small().predict(np.ones((2, 3)))
