"""lm-evaluation-harness and the built-in choice scorer give the same answers to the same items."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.evaluate import choice_scores
from workbench.models import built_in_names, load_model

pytestmark = pytest.mark.extras
pytest.importorskip("lm_eval")

ITEMS = [
    {"query": "Q where is the ball ? A", "choices": [" park", " hill", " old mill"], "gold": 0},
    {"query": "Q who owns the kite ? A", "choices": [" Finn", " Ann"], "gold": 1},
    {"query": "True or false ? one and one is two . A", "choices": [" true", " false"], "gold": 0},
] + [
    {"query": f"Q {a} + {b} = ? A", "choices": [f" {a + b}", f" {a + b + 1}"], "gold": (a + b) % 2}
    for a in range(1, 5)
    for b in range(1, 5)
]


@pytest.mark.parametrize("spec", ["tiny:mistral", "tiny:gpt2", *built_in_names()[:1]])
def test_harness_and_built_in_scorer_agree(tmp_path, monkeypatch, spec):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from workbench.integrations.lm_eval import evaluate_items

    model, tokenizer = load_model(spec)
    theirs = evaluate_items(model, tokenizer, ITEMS, folder=tmp_path / "task")
    ours = choice_scores(model, tokenizer, ITEMS)
    assert len(theirs["log_likelihoods"]) == len(ITEMS)
    # a scorer that cuts or frames by one token more would differ by nats
    for one, other in zip(ours.items, theirs["log_likelihoods"], strict=True):
        np.testing.assert_allclose(one["log_likelihoods"], other, atol=2e-3)
    assert ours.accuracy == pytest.approx(theirs["accuracy"])


def test_unknown_task_is_one_clear_error(tmp_path):
    from workbench.errors import DataError
    from workbench.integrations.lm_eval import evaluate_tasks, write_choice_task

    model, tokenizer = load_model("tiny:mistral")
    folder = write_choice_task(ITEMS, tmp_path)
    with pytest.raises(DataError, match="no_such_task"):
        evaluate_tasks(model, tokenizer, ["no_such_task"], task_folder=folder)
