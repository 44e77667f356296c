"""Training: batched = separate, exact continuation, splits, and the claim of the method itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdm.model import SDMModel
from sdm.train import Trainer, make_splits
from workbench.errors import DataError
from workbench.seeding import Streams


def gaussians(n: int, seed: int = 0, width: int = 6, shift: float = 1.1):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, width))
    x[:, 0] += np.where(y == 1, shift, -shift)
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def trainer(x, y, splits, **changes) -> Trainer:
    settings = {"n_classes": 2, "exemplar_dim": 8, "learning_rate": 1e-2, "batch_size": 16}
    return Trainer(x, y, splits, Streams(0), **(settings | changes))


class Shifted(Streams):
    """The streams of iteration `first` under the index 0."""

    def __init__(self, first: int):
        super().__init__(0)
        self.first = first

    def __call__(self, name, index=0):
        if name == "sdm/order/0":
            return super().__call__(f"sdm/order/{self.first}", index)
        return super().__call__(name, index)

    def torch(self, name, index=0, device="cpu"):
        return super().torch(name, index + self.first, device)


def test_batched_training_equals_separate_runs():
    x, y = gaussians(120)
    splits = make_splits(y, 3, 2, Streams(0))
    together = trainer(x, y, splits)
    for epoch in (1, 2, 3):
        together.run_epoch(epoch)
    for j in range(3):
        alone = Trainer(
            x, y, (splits[0][j : j + 1], splits[1][j : j + 1]), Shifted(j), n_classes=2,
            exemplar_dim=8, learning_rate=1e-2, batch_size=16,
        )  # fmt: skip
        for epoch in (1, 2, 3):
            alone.run_epoch(epoch)
        for name, value in alone.parameters.items():
            assert torch.allclose(value[0], together.parameters[name][j], atol=1e-4)
        assert alone.best_metric[0] == pytest.approx(together.best_metric[j], abs=1e-4)
        assert torch.equal(alone.similarity[0], together.similarity[j])


def test_continuing_from_a_state_gives_the_same_bits():
    x, y = gaussians(80)
    splits = make_splits(y, 2, 2, Streams(0))
    whole = trainer(x, y, splits)
    for epoch in range(1, 6):
        whole.run_epoch(epoch)
    first, second = trainer(x, y, splits), trainer(x, y, splits)
    for epoch in (1, 2):
        first.run_epoch(epoch)
    second.load_state_dict(first.state_dict())
    for epoch in (3, 4, 5):
        second.run_epoch(epoch)
    for name, value in whole.parameters.items():
        assert torch.equal(value, second.parameters[name])
        assert torch.equal(whole.best[name], second.best[name])
    assert whole.best_metric == second.best_metric
    assert torch.equal(whole.distance, second.distance)


def test_warm_up_keeps_the_softmax_and_training_starts_there():
    x, y = gaussians(60)
    one = trainer(x, y, make_splits(y, 1, 2, Streams(0)), warm_up_epochs=2)
    for epoch in (1, 2):
        one.run_epoch(epoch)
        assert one.similarity.unique().tolist() == pytest.approx([np.e - 2])
        assert one.distance.unique().tolist() == [1.0]
    one.run_epoch(3)
    assert len(one.similarity.unique()) > 1


def test_standardisation_is_one_mean_and_one_deviation_of_the_training_half():
    x, y = gaussians(60)
    splits = make_splits(y, 1, 2, Streams(0))
    one = trainer(x, y, splits)
    entries = x[splits[0][0]].double()
    assert float(one.centre[0]) == pytest.approx(float(entries.mean()))
    assert float(one.scale[0]) == pytest.approx(float(entries.std(correction=1)))


def test_halves_are_stratified_disjoint_and_complete():
    y = torch.tensor([0] * 30 + [1] * 11)
    train, calibration = make_splits(y, 4, 2, Streams(3))
    for first, second in zip(train, calibration, strict=True):
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(41))
        assert int((y[first] == 0).sum()) == 15
        assert int((y[first] == 1).sum()) in (5, 6)
    assert not torch.equal(train[0], train[1])
    again, _ = make_splits(y, 4, 2, Streams(3))
    assert torch.equal(train, again)
    plain, rest = make_splits(y, 1, 2, Streams(3), stratify=False)
    assert len(plain[0]) == 20
    assert len(rest[0]) == 21


def test_too_few_points_of_a_class_are_named():
    with pytest.raises(DataError, match="class 1 has"):
        make_splits(torch.tensor([0] * 20 + [1]), 1, 2, Streams(0))


def test_equal_features_are_refused():
    y = torch.tensor([0, 1] * 6)
    with pytest.raises(DataError, match="same value"):
        trainer(torch.ones(12, 3), y, make_splits(y, 1, 2, Streams(0)))


def fit(x, y, epochs: int = 12, alpha: float = 0.9, seed: int = 0) -> SDMModel:
    splits = make_splits(y, 1, 2, Streams(seed))
    one = Trainer(
        x, y, splits, Streams(seed), n_classes=2, exemplar_dim=32, learning_rate=3e-3, batch_size=50
    )
    for epoch in range(1, epochs + 1):
        one.run_epoch(epoch)
    return one.models(alpha)[0]


def test_the_admitted_are_accurate_the_foreign_rejected_and_the_meaningless_not_admitted():
    x, y = gaussians(1600, width=16)
    model = fit(x, y)
    new, truth = gaussians(3000, seed=1, width=16)
    result = model.score(new)
    right = result.prediction == truth.numpy()
    assert 0.1 < result.admitted.mean() < 0.6
    # 300 and more admitted: 0.9 minus four standard errors, false alarm below 1e-4
    for c in (0, 1):
        assert right[result.admitted & (truth.numpy() == c)].mean() > 0.9 - 4 * 0.3 / 12
    assert right[result.admitted].mean() > right.mean() + 0.03
    far = torch.from_numpy(2 + 4 * np.random.default_rng(2).normal(size=(1000, 16))).float()
    assert model.score(far).admitted.mean() <= 0.01
    shuffled = y[torch.from_numpy(np.random.default_rng(3).permutation(len(y)))]
    assert fit(x, shuffled, epochs=6).score(new).admitted.mean() == 0.0


def test_the_decision_follows_from_the_estimates():
    x, y = gaussians(600)
    model = fit(x, y, epochs=6, alpha=0.8)
    new, _ = gaussians(500, seed=5)
    result = model.score(new)
    assert np.allclose(result.probabilities.sum(1), 1)
    assert (result.p_lower[result.admitted] >= 0.8).all()
    assert (result.p_lower <= result.p_centroid + 1e-12).all()
    assert (result.p_centroid <= result.p_upper + 1e-12).all()
    assert (result.rescaled_lower <= result.rescaled_upper + 1e-12).all()
    assert (result.reason_code[result.admitted] == 0).all()
    assert set(result.select(result.similarity == 0).reason) == {"q0"}
    order = np.random.default_rng(0).permutation(500)
    again = model.score(new[torch.from_numpy(order)])
    assert (again.admitted == result.admitted[order]).all()
    assert (again.similarity == result.similarity[order]).all()
    few = [model.score(new[i : i + 7]) for i in range(0, 500, 7)]
    assert np.array_equal(np.concatenate([f.similarity for f in few]), result.similarity)
    assert np.array_equal(np.concatenate([f.admitted for f in few]), result.admitted)
