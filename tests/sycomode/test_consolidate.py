"""The one command: a whole run, its gates, its resumption and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sycomode import consolidate, report
from sycomode.consolidate import Experiment, Rates
from workbench import storage
from workbench.cli import apply_settings, cli, read_yaml
from workbench.errors import ConfigError, DataError, GateFailed, Interrupted
from workbench.run import Run, RunOptions

ROOT = Path(__file__).resolve().parents[2]


def tiny(root: Path, **changes) -> Experiment:
    settings = read_yaml(ROOT / "configs/sycomode/consolidate.tiny.yaml")
    experiment = apply_settings(consolidate.EXPERIMENT, settings, "tiny")
    return replace(experiment, run=RunOptions(root=root, threads=1, name="try"), **changes)


def text_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("runs")
    return root / "sycomode" / "try", consolidate.main(tiny(root))


def test_every_stage_leaves_its_mark(finished: tuple[Path, dict]):
    folder, results = finished
    assert set(results["arms"]) == {
        "no_prompt",
        "prompted",
        "truncate_prompt",
        "lm_on_prompt",
        "lora",
        "memory",
    }
    for name in ("arms", "kinds", "cost", "coverage"):
        assert (folder / "tables" / f"{name}.csv").is_file()
    assert (folder / "artefacts/lora/adapter_config.json").is_file()
    assert (folder / "artefacts/memory/adapter_model.safetensors").is_file()
    assert (folder / "figures/learning_curve.svg").is_file()
    assert "self-study" in (folder / "log.txt").read_text(encoding="utf-8")
    assert results["arms"]["no_prompt"]["ppl_ratio"] == 1.0
    assert results["arms"]["prompted"]["kl_nats"] == pytest.approx(0.0, abs=1e-6)
    assert results["selfstudy"]["kept"] <= 8
    assert all(cost["reload_max_difference"] < 1e-5 for cost in results["cost"].values())
    assert results["cost"]["memory"]["tokens_saved"] == results["prompt_tokens"] - 4


def test_a_finished_run_returns_at_once(finished: tuple[Path, dict]):
    folder, results = finished
    before = (folder / "results.json").read_bytes()
    again = consolidate.main(tiny(folder.parents[1]))
    assert again == results
    assert (folder / "results.json").read_bytes() == before


def test_training_lowers_the_loss_it_descends(finished: tuple[Path, dict]):
    folder, _ = finished
    lines = [json.loads(line) for line in text_lines(folder / "metrics.jsonl")]
    tasks = [line["memory/task_nats"] for line in lines if "memory/task_nats" in line]
    assert len(tasks) == 8
    assert all(np.isfinite(tasks))


def test_interrupted_and_resumed_is_bit_equal(
    finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the middle of the second arm: weights and metrics come out the same."""
    folder, results = finished
    experiment = tiny(tmp_path)
    steps = Run.steps

    def broken(self, total, state, **options):
        for step in steps(self, total, state, **(options | {"save_every": 3})):
            if options["phase"] == "lora" and step == 5:
                raise Interrupted(15, "pulled the plug")
            yield step

    monkeypatch.setattr(Run, "steps", broken)
    with pytest.raises(Interrupted):
        consolidate.main(experiment)
    monkeypatch.undo()
    again = consolidate.main(experiment)
    assert again == results
    for name in ("lora", "memory"):
        file = f"artefacts/{name}/adapter_model.safetensors"
        one = storage.read_safetensors(folder / file)
        two = storage.read_safetensors(tmp_path / "sycomode" / "try" / file)
        assert all(torch.equal(one[key], two[key]) for key in one)

    def metrics(path: Path) -> list[dict]:
        lines = [json.loads(line) for line in text_lines(path / "metrics.jsonl")]
        return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]

    assert metrics(folder) == metrics(tmp_path / "sycomode" / "try")


RESULTS = {"student": "lora", "recovery": 0.9, "ppl_ratio": 1.04, "icl_retention": 0.97}


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"require_recovery": 0.95}, "recovery 0.900 < 0.95"),
        ({"max_ppl_ratio": 1.01}, "perplexity ratio 1.040 > 1.01"),
        ({"min_icl_retention": 0.98}, "in-context retention 0.970 < 0.98"),
    ],
)
def test_a_missed_gate_is_named(gate: dict, words: str):
    experiment = Experiment(**gate)
    with pytest.raises(GateFailed, match=words):
        consolidate._check_gates(experiment, RESULTS)
    consolidate._check_gates(Experiment(), RESULTS)
    met = Experiment(require_recovery=0.9, max_ppl_ratio=1.04, min_icl_retention=0.97)
    consolidate._check_gates(met, RESULTS)


def test_no_effect_misses_a_recovery_gate():
    with pytest.raises(GateFailed, match="n/a"):
        consolidate._check_gates(Experiment(require_recovery=0.1), RESULTS | {"recovery": None})


def test_a_missed_gate_ends_with_status_three(finished: tuple[Path, dict], tmp_path: Path):
    experiment = replace(tiny(tmp_path), students=("memory",), require_recovery=0.99, steps=1)
    with pytest.raises(SystemExit) as stopped:
        cli(consolidate.main, experiment, arguments=[])
    assert stopped.value.code == 3
    assert (tmp_path / "sycomode/try/results.json").is_file()  # the run itself is complete


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"students": ("lorra",)}, "nearest: lora"),
        ({"students": ()}, "no students"),
        ({"students": ("lora", "lora")}, "twice"),
        ({"objective": "kl_selfstdy"}, "nearest: kl_selfstudy"),
        ({"objective": "jsd_selfstudy"}, "--top-k 0"),
        ({"prompt_file": Path("x")}, "belong together"),
        ({"steps": 0}, "steps=0"),
        ({"temp": 0.0}, "temperatures"),
        ({"kv_tokens": 1}, "kv_tokens=1"),
        ({"memory_tokens": 0}, "memory_tokens=0"),
    ],
)
def test_settings_that_cannot_work(changes: dict, what: str):
    with pytest.raises(ConfigError, match=what):
        Experiment(**changes)


def test_a_prompt_that_does_not_fit_says_by_how_much(tmp_path: Path):
    with pytest.raises(DataError, match="more than the model's 512"):
        consolidate.main(tiny(tmp_path, n_facts=30))


def test_more_memory_than_prompt_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="400 tokens cannot start from a prompt"):
        consolidate.main(tiny(tmp_path, memory_tokens=400, students=("memory",)))


def test_a_user_loss_can_be_named_and_a_wrong_one_says_why(tmp_path: Path):
    experiment = tiny(tmp_path, objective="no.such:loss", students=("memory",), steps=1)
    with pytest.raises(ConfigError, match="cannot be imported"):
        consolidate.main(experiment)


def test_verdict_says_when_there_is_nothing_to_recover():
    row = {"arm": "lora", "recovery": None, "prefix_tokens": 0}
    assert "n/a" in report.verdict([row], "lora", 100)
    row |= {"recovery": 0.98, "recovery_low": 0.96, "recovery_high": 0.99}
    row |= {"ppl_ratio": 1.012, "icl_retention": 0.99}
    text = report.verdict([row], "lora", 100)
    assert "recovery 0.98 [0.96, 0.99]" in text
    assert "100 prompt tokens saved" in text


@pytest.mark.slow
def test_the_claim_on_the_built_in_model(tmp_path: Path):
    """KL self-study with guard moves a document in; language modelling on it does not."""
    results = consolidate.main(
        Experiment(
            n_facts=8,
            students=("lora",),
            steps=100,
            rows=12,
            guard_rows=3,
            conversations=144,
            conversation_tokens=32,
            rates=Rates(),
            evaluate_every=100,
            run=RunOptions(root=tmp_path, threads=1),
        )
    )
    assert results["arms"]["lora"]["recovery"] >= 0.9
    assert results["arms"]["lm_on_prompt"]["recovery"] <= 0.3
    assert results["arms"]["lora"]["ppl_ratio"] <= 1.06
    assert results["arms"]["lora"]["icl_retention"] >= 0.85
