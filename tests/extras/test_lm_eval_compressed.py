"""A compressed model through lm-evaluation-harness: by our script and by the harness's command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.extras
pytest.importorskip("lm_eval")

TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A compressed model, 60 items as DIR/mine.jsonl, and the same as a task of the harness."""
    from lplr_q.quantize_save import EXPERIMENT, main
    from workbench.cli import parse
    from workbench.microworld import World

    path = tmp_path_factory.mktemp("compressed")
    config = str(ROOT / "configs/lplr_q/quantize_save.tiny.yaml")
    words = ["--config", config, "--base-model", "micro-mistral", "--stop-layer", "2"]
    experiment, _ = parse(EXPERIMENT, [*words, "--root", str(path / "runs"), "--name", "q"])
    main(experiment)
    rows = World().choices(60, "test")
    for row in rows:  # without their facts, or every answer would be right
        row["query"] = row["query"][row["query"].rindex(" Q ") :]
    (path / "items").mkdir()
    data = path / "items" / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "tasks").mkdir()
    task = path / "tasks" / "mine.yaml"
    task.write_text(TASK.format(data=json.dumps(str(data))), encoding="utf-8")
    return path


def scored(folder, name, **changes):
    from dataclasses import replace

    from lplr_q.eval_zeroshot import EXPERIMENT, main
    from workbench.run import RunOptions

    model = next((folder / "runs").rglob("model/config.json")).parent
    options = RunOptions(root=folder / "runs", name=name, threads=1, device="cpu")
    experiment = replace(EXPERIMENT, model_save_path=str(model), tasks=("mine",), run=options)
    return main(replace(experiment, **changes))


def test_the_harness_gets_our_model_and_finds_our_accuracies(folder, monkeypatch):
    import lm_eval

    from lplr_q import choices
    from lplr_q.activation_aware.quantized_layer import quantised_layers

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    seen = []

    def evaluate(**options):
        seen.append(len(list(quantised_layers(options["model"].model))))
        seen.append(result := real(**options | {"log_samples": True}))
        return result

    real, score = lm_eval.simple_evaluate, choices.score_items
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    theirs = scored(folder, "harness", include_path=folder / "tasks")
    assert theirs["scorer"] == "lm-eval"
    layers, result = seen
    assert layers == 14  # seven matrices of two blocks, as codes
    own = []
    monkeypatch.setattr(
        choices, "score_items", lambda *a, **k: own.append(score(*a, **k)) or own[-1]
    )
    ours = scored(folder, "own", data_dir=folder / "items")
    assert ours["scorer"] == "built-in"
    (one,), (other,) = ours["rows"], theirs["rows"]
    assert 0 < one["accuracy"] < 1
    for key in ("accuracy", "accuracy_normalised"):
        assert other[key] == pytest.approx(one[key])
    # not by chance: every choice has the same likelihood
    samples = sorted(result["samples"]["mine"], key=lambda sample: sample["doc_id"])
    found = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
    np.testing.assert_allclose(own[0], found, atol=2e-3)


def test_the_command_of_the_harness_works_after_the_import(folder):
    """The line of the script's help, word by word."""
    from lplr_q import eval_zeroshot

    line = re.search(r'python -c "(.*?)" \\\n +--model hf', eval_zeroshot.__doc__ or "")
    assert line is not None
    model = next((folder / "runs").rglob("model/config.json")).parent
    words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks"]
    words += ["mine", "--include_path", str(folder / "tasks"), "--device", "cpu", "--limit", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home")}

    def said(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = said(line.group(1))
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\|mine .*\|acc ", done.stdout)
    without = said(line.group(1).replace("import lplr_q; ", ""))
    assert without.returncode != 0
    assert "lplr_q" in without.stderr
