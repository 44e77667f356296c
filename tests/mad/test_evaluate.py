"""Metrics against hand tables, and the interval against simulation."""

import math

import numpy as np
import pytest
import torch

from mad.evaluate import evaluate, macro_accuracy, row_interval
from mad.tasks.memorization import Memorization
from mad.tasks.task import IGNORE, generate
from workbench.errors import DataError


class Oracle(torch.nn.Module):
    """Puts `margin` nats of logit on `table[input token]`."""

    def __init__(self, table: torch.Tensor, vocab_size: int, margin: float = 30.0) -> None:
        super().__init__()
        self.table, self.vocab_size, self.margin = table, vocab_size, margin

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, vocab)."""
        guess = self.table[ids.long()]
        return self.margin * torch.nn.functional.one_hot(guess, self.vocab_size).float()


def test_macro_accuracy_of_the_worked_example():
    predictions, targets = torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1])
    # class 0: 1; class 1: 0 of 1; class 2: predicted, no target, counts as 0; mean 1/3
    assert macro_accuracy(predictions, targets, 5) == pytest.approx(1 / 3)
    assert (predictions == targets).float().mean() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("predictions", "targets", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], 1.0),
        ([0, 0, 0, 0], [0, 0, 0, 1], 0.5),
        ([1, 1], [0, 0], 0.0),
        ([0, 0, 1, 1], [0, 1, 1, 1], (1 + 2 / 3) / 2),
    ],
)
def test_macro_accuracy_by_hand(predictions, targets, expected):
    got = macro_accuracy(torch.tensor(predictions), torch.tensor(targets), 4)
    assert got == pytest.approx(expected)


def test_scores_of_a_small_table():
    model = Oracle(torch.tensor([0, 0, 1, 3]), 4, margin=2.0)
    inputs = torch.tensor([[0, 1, 2], [3, 0, 2], [0, 0, 0]])
    targets = torch.tensor([[0, 1, 1], [3, 2, IGNORE], [IGNORE, IGNORE, IGNORE]])
    score = evaluate(model, inputs, targets, batch_size=2)
    assert (score.n_scored, score.n_rows) == (5, 3)
    assert score.accuracy == pytest.approx(3 / 5)
    assert score.accuracy_sequence == 0.0  # the row without targets is not asked
    # first batch: class 0 right, 1 half right, 2 wrong, 3 right; second batch scores nothing
    assert score.accuracy_macro_batch == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    right = math.log(math.exp(2) + 3) - 2
    assert score.nll_nats == pytest.approx((3 * right + 2 * (right + 2)) / 5, rel=1e-6)
    assert score.low < 0.6 < score.high


def test_all_right_is_one_and_nothing_scored_is_not_a_number():
    model = Oracle(torch.arange(4), 4)
    inputs = torch.tensor([[0, 1], [2, 3]])
    score = evaluate(model, inputs, inputs)
    assert score.accuracy == score.accuracy_sequence == score.accuracy_macro_batch == 1.0
    assert score.high == 1.0
    empty = evaluate(model, inputs, torch.full_like(inputs, IGNORE))
    assert empty.n_scored == 0
    for name in ("accuracy", "accuracy_sequence", "accuracy_macro_batch", "nll_nats", "low"):
        assert math.isnan(getattr(empty, name))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_and_the_batch_size_leaves_micro_accuracy(training):
    model = Oracle(torch.tensor([0, 0, 1, 3]), 4).train(training)
    inputs = torch.randint(0, 4, (37, 5), generator=torch.Generator().manual_seed(0))
    targets = inputs.roll(1, dims=0)
    a, b = (evaluate(model, inputs, targets, batch_size=size) for size in (4, 100))
    assert (a.accuracy, a.accuracy_sequence) == (b.accuracy, b.accuracy_sequence)
    assert a.nll_nats == pytest.approx(b.nll_nats, rel=1e-6)
    assert model.training is training


def test_macro_and_micro_of_a_perfect_memoriser_with_unseen_keys():
    """V = 8192, 256 training rows: micro .63 and macro .50, as published figures imply."""
    task = Memorization(vocab_size=8192)
    seen = np.unique(generate(task, 256, "train", 5).inputs[:, ::2])
    test = generate(task, 1280, "test", 5)
    rng = np.random.default_rng(0)
    predicted = test.answers.copy()
    unseen = ~np.isin(np.repeat(test.inputs[:, ::2], 2, axis=1), seen) & (predicted != IGNORE)
    predicted[unseen] = rng.integers(task.n_keys, task.content_size, int(unseen.sum()))
    scored = test.answers != IGNORE
    micro = (predicted == test.answers)[scored].mean()
    macro = np.mean(
        [
            macro_accuracy(
                torch.from_numpy(predicted[at : at + 128][scored[at : at + 128]]),
                torch.from_numpy(test.answers[at : at + 128][scored[at : at + 128]]),
                task.vocab_size,
            )
            for at in range(0, 1280, 128)
        ]
    )
    assert micro == pytest.approx(task.ceiling(256), abs=0.02)
    assert macro == pytest.approx(0.497, abs=0.02)


# ---------------------------------------------------------------- interval


def test_interval_of_independent_answers_is_wilsons():
    correct = torch.tensor([1] * 30 + [0] * 70)
    low, high = row_interval(correct, torch.ones(100, dtype=torch.long))
    # Wilson's formula for 30 of 100, z = 1.959964; the design effect of n/(n−1) rounds away
    z, p, n = 1.959964, 0.3, 99
    centre = (round(p * n) / n + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (low + high) / 2 == pytest.approx(centre, abs=2e-3)
    assert (low, high) == pytest.approx((0.219, 0.396), abs=4e-3)


def test_interval_covers_when_the_answers_of_a_row_go_together():
    """Rows of 10 equal answers: 95 % cover; an interval that ignores rows covers about half."""
    rng = np.random.default_rng(3)
    covered, trials, truth = 0, 400, 0.7
    for _ in range(trials):
        rows = torch.from_numpy((rng.random(120) < truth).astype(np.int64)) * 10
        low, high = row_interval(rows, torch.full((120,), 10))
        covered += low <= truth <= high
    assert 0.91 <= covered / trials <= 0.985  # binomial: five sigma below, three above .95


def test_interval_at_the_ends():
    full = torch.full((50,), 4)
    low, high = row_interval(full, full)
    assert 0.97 < low < high == 1.0
    low, high = row_interval(torch.zeros_like(full), full)
    assert 0.0 == low < high < 0.03
    assert all(map(math.isnan, row_interval(full * 0, full * 0)))


# ---------------------------------------------------------------- bad input


def test_shapes_that_do_not_fit_are_refused():
    model = Oracle(torch.arange(4), 4)
    with pytest.raises(DataError, match="two equal shapes"):
        evaluate(model, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(DataError, match="at least one row"):
        evaluate(model, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long))
