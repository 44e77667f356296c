"""The recovery formula by hand, its interval, and what is measured on a reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sycomode import evaluate
from sycomode.data import Question, encode_pair, pad
from sycomode.students import Prompted
from workbench.seeding import Streams
from workbench.tiny import byte_tokenizer, tiny_model

STREAM = Streams(0)


def test_recovery_by_hand():
    found = evaluate.recovery([1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], STREAM("a"))
    assert found.mean == 0.75
    assert found.low <= 0.75 <= found.high
    assert found.high <= 1.0
    assert found.n == 4


def test_recovery_is_never_clipped():
    over = evaluate.recovery([2.0, 2.0], [0.0, 0.0], [1.0, 1.0], STREAM("a"))
    under = evaluate.recovery([-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], STREAM("a"))
    assert over.mean == 2.0
    assert under.mean == -1.0


@pytest.mark.parametrize(
    ("none", "full"),
    [
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.1]),  # within two standard errors
        ([0.5, 0.5], [0.51, 0.51]),  # below the least effect
        ([0.0], [1.0]),  # one question has no error
    ],
)
def test_no_effect_no_recovery(none: list[float], full: list[float]):
    found = evaluate.recovery(full, none, full, STREAM("a"))
    assert found.mean is None
    assert "n/a" in str(found)


def test_interval_covers_the_truth_in_most_repetitions():
    """A student that is right with p = .8: the 95 % interval covers .8 in at least 88 of 100."""
    covered = 0
    for index in range(100):
        score = STREAM("truth", index=index).random(60) < 0.8
        found = evaluate.recovery(score, np.zeros(60), np.ones(60), STREAM("b", index=index), 300)
        covered += found.low <= 0.8 <= found.high
    assert covered >= 88  # false alarm: P(Binomial(100, .93) < 88) about .02 at worst, fixed stream


def test_perplexity_ratio_by_hand():
    mean, low, high = evaluate.perplexity_ratio(
        np.array([1.5, 2.5]), np.array([1.0, 2.0]), STREAM("c")
    )
    assert mean == pytest.approx(np.exp(0.5))
    assert low == pytest.approx(high)


def test_break_even_by_hand():
    assert evaluate.break_even_requests(10, 1000, 110, 10) == 30.0
    assert evaluate.break_even_requests(10, 1000, 10, 10) is None


@pytest.fixture(scope="module")
def bare() -> Prompted:
    return Prompted(tiny_model("mistral", num_hidden_layers=2), 1)


def test_answers_are_what_greedy_decoding_says(bare: Prompted):
    """The reader's own greedy continuation is graded right, another one wrong."""
    tokenizer = byte_tokenizer()
    question = "who is it?"
    ids, _ = pad([encode_pair(tokenizer, question, "x")[0]])
    with torch.no_grad():
        greedy = tokenizer.decode(bare.logits(ids)[0, -1].argmax())
    wrong = "y" if greedy != "y" else "z"
    got = evaluate.answers(
        bare, tokenizer, [Question(question, greedy or "x"), Question(question, wrong)]
    )
    assert got["correct"].tolist() == [1.0, 0.0]
    assert got["nats"][0] < got["nats"][1]
    assert got["ending"].tolist() == [1.0, 1.0]


def test_answers_do_not_depend_on_the_batch(bare: Prompted):
    tokenizer = byte_tokenizer()
    questions = [Question("a" * n, "b" * (1 + n % 3)) for n in range(1, 8)]
    one = evaluate.answers(bare, tokenizer, questions, batch=1)
    many = evaluate.answers(bare, tokenizer, questions, batch=7)
    assert np.allclose(one["nats"], many["nats"], atol=1e-5)


def test_kl_to_oneself_is_zero(bare: Prompted):
    kl, agree = evaluate.kl_to_teacher(bare, bare, [[5, 6, 7, 8], [9, 10]])
    assert kl == pytest.approx(0.0, abs=1e-6)
    assert agree == 1.0


def test_kinds_are_averaged_apart():
    questions = [Question("a", "b", "x"), Question("c", "d", "y"), Question("e", "f", "x")]
    rows = evaluate.by_kind(questions, np.array([1.0, 0.0, 0.0]), lambda q: True)
    assert rows == [
        {"kind": "x", "n": 2, "score": 0.5},
        {"kind": "y", "n": 1, "score": 0.0},
    ]
