"""The classic experiments: all thirty combinations run, flags keep their spelling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sycomode import classic, experiment1, experiment2, experiment3
from sycomode.data import Document, Question
from sycomode.registry import CLASSIC_OBJECTIVES
from sycomode.students import Prompted
from workbench.cli import parse
from workbench.errors import ConfigError
from workbench.run import RunOptions
from workbench.tiny import byte_tokenizer, tiny_model

MODULES = {1: experiment1, 2: experiment2, 3: experiment3}


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("objective", CLASSIC_OBJECTIVES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_thirty_combinations_run(number: int, objective: str, memory: int, tmp_path: Path):
    options = {"n_items": 1, "num_iter": 1, "recipe": "seed", "model_name": "tiny:mistral"}
    if number == 3:
        options |= {"items": "microworld", "n_facts": 3}
    results = MODULES[number].main(
        MODULES[number].Experiment(
            num_mem_tokens=memory,
            objective_function=objective,
            run=RunOptions(root=tmp_path, threads=1),
            **options,
        )
    )
    for column in ("full_context", "no_context", "distilled"):
        assert np.isfinite(results[column])
    if memory == 0:  # the original's finding: its recipe moves nothing
        assert results["distilled"] == pytest.approx(results["no_context"], rel=0.05)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_flags_of_the_original_keep_their_spelling(number: int):
    words = [
        "--num-mem-tokens",
        "2",
        "--objective-function",
        "distill_on_generated_text",
        "--lr",
        "1e-3",
        "--num-iter",
        "7",
        "--temp",
        "2",
        "--model-name",
        "some/model",
        "--no-wandb",
    ]
    parsed, _ = parse(MODULES[number].EXPERIMENT, words)
    assert (parsed.num_mem_tokens, parsed.lr, parsed.steps, parsed.temp) == (2, 1e-3, 7, 2.0)
    assert parsed.objective == "distill_on_generated_text"
    assert parsed.model_name == "some/model"
    assert parsed.run.wandb is False


def test_recipes_fill_what_is_left_open():
    seed = experiment1.Experiment(recipe="seed")
    assert (seed.objective, seed.rate, seed.steps) == ("causal_language_model", 2e-5, 5)
    own = experiment1.Experiment(num_mem_tokens=4)
    assert (own.objective, own.rate, own.steps) == ("kl_selfstudy", 5e-2, 60)
    assert experiment1.Experiment(lr=0.1, num_iter=3, recipe="seed").rate == 0.1
    assert own.language == "microworld"
    assert experiment2.Experiment(model_name="some/hub-id").language == "english"


def test_letter_metric_is_a_probability_among_letters():
    tokenizer = byte_tokenizer()
    reader = Prompted(tiny_model("mistral", num_hidden_layers=1).requires_grad_(False), 1)
    metric = classic.letter_probability(tokenizer)
    values = [
        metric(reader, Document("a b c d ", (Question("next", letter),)))[0]
        for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    assert sum(values) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_mem_tokens": -1}, "--num-mem-tokens -1"),
        ({"objective_function": "distil_on_output_logits"}, "nearest: distill_on_output_logits"),
        ({"num_iter": 0}, "--num-iter 0"),
        ({"temp": 0.0}, "--temp"),
        ({"lr": -1.0}, "--lr"),
        ({"n_items": 0}, "--n-items"),
    ],
)
def test_flags_that_cannot_work(changes: dict, what: str):
    with pytest.raises(ConfigError, match=what):
        experiment1.Experiment(**changes)


def test_more_memory_than_context_is_refused_before_any_item(tmp_path: Path):
    with pytest.raises(ConfigError, match="shortest context"):
        experiment1.main(
            experiment1.Experiment(
                num_mem_tokens=50,
                n_items=1,
                model_name="tiny:mistral",
                run=RunOptions(root=tmp_path, threads=1),
            )
        )


def test_context_and_questions_belong_together():
    with pytest.raises(ConfigError, match="belong together"):
        experiment3.Experiment(context_file=Path("x"))


def test_default_recipe_shows_language_modelling_beside(tmp_path: Path):
    results = experiment2.main(
        experiment2.Experiment(
            n_items=1,
            num_iter=1,
            num_mem_tokens=2,
            items="microworld",
            model_name="tiny:mistral",
            run=RunOptions(root=tmp_path, threads=1),
        )
    )
    assert {"full_context", "no_context", "lm_on_prompt", "distilled"} <= set(results)
    assert results["recovery"] is None  # one question has no interval


@pytest.mark.slow
def test_scripts_are_listed():
    done = subprocess.run(
        [sys.executable, "-m", "sycomode"], capture_output=True, text=True, check=True
    )
    for script in ("consolidate", "experiment1", "experiment2", "experiment3"):
        assert f"python -m sycomode.{script}" in done.stdout
