import gzip
import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from lplr_q import eval_zeroshot
from lplr_q.choices import (
    accuracy_columns,
    encode_items,
    first_best,
    log_likelihoods,
    score_items,
)
from lplr_q.eval_tasks import TASKS, load_items, to_item
from lplr_q.eval_zeroshot import EXPERIMENT, choose_scorer, main
from workbench.errors import ConfigError, DataError, MissingExtra
from workbench.evaluate import choice_scores
from workbench.models import load_model
from workbench.run import RunOptions
from workbench.tiny import byte_tokenizer


def settings(tmp_path, **changes):
    options = RunOptions(root=tmp_path / "runs", name="t", threads=1, device="cpu")
    return replace(EXPERIMENT, **{"model_save_path": "tiny:mistral", **changes}, run=options)


WINOGRANDE = {"sentence": "The cup hit Ann so _ cried.", "option1": "it", "option2": "she",
              "answer": "2"}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "record", "contexts", "continuations", "gold"),
    [
        ("winogrande", WINOGRANDE, ["The cup hit Ann so it", "The cup hit Ann so she"],
         [" cried.", " cried."], 1),
        ("rte", {"sentence1": "P.", "sentence2": "H.", "label": 1},
         ["P.\nQuestion: H. True or False?\nAnswer:"] * 2, [" True", " False"], 1),
        ("rte", {"premise": "P.", "hypothesis": "H.", "label": "entailment"},
         ["P.\nQuestion: H. True or False?\nAnswer:"] * 2, [" True", " False"], 0),
        ("piqa", {"goal": "G", "sol1": "a", "sol2": "b", "label": 0},
         ["Question: G\nAnswer:"] * 2, [" a", " b"], 0),
        ("arc_easy", {"question": "Q", "choices": {"text": ["x", "y", "z"],
                                                   "label": ["1", "2", "3"]}, "answerKey": "3"},
         ["Question: Q\nAnswer:"] * 3, [" x", " y", " z"], 2),
        ("piqa", {"query": "Question: G\n", "choices": ["a", "b"], "gold": 1},
         ["Question: G\nAnswer:"] * 2, [" a", " b"], 1),
        ("winogrande", {"context_options": ["A", "B"], "continuation": "end.", "gold": 1},
         ["A", "B"], [" end.", " end."], 1),
        ("mine", {"query": "Say: ", "choices": ["a", "b"], "gold": 1},
         ["Say: "] * 2, ["a", "b"], 1),
    ],
)  # fmt: skip
def test_records_become_pairs(task, record, contexts, continuations, gold):
    item = to_item(record, task, "file:1")
    assert item == {"contexts": contexts, "continuations": continuations, "gold": gold}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"sentence": "no blank"}, "option1"),
        ({**WINOGRANDE, "answer": "3"}, "gold answer 2, expected 0 to 1"),
        ({"query": "q", "choices": ["one"], "gold": 0}, "at least two choices"),
        ({"query": "q", "choices": ["a", 5], "gold": 0}, "no item of winogrande"),
    ],
)
def test_bad_records_name_their_place(record, said):
    with pytest.raises(DataError, match=said) as caught:
        to_item(record, "winogrande", "data.jsonl: item 7")
    assert "data.jsonl: item 7" in str(caught.value)


def test_scores_are_sums_of_log_probabilities_and_equal_those_of_the_workbench():
    model, tokenizer = load_model("tiny:llama")
    rows = [{"query": "ab", "choices": [" c", " dd", " e"], "gold": 1},
            {"query": "a longer context", "choices": [" xyz", " q"], "gold": 0}]  # fmt: skip
    items = [to_item(row, "mine", "x") for row in rows]
    encoded = encode_items(tokenizer, items, max_length=64)
    scores = score_items(model, encoded, batch_size=2)
    assert all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4)
        for a, b in zip(scores, score_items(model, encoded, batch_size=16), strict=True)
    )
    ids = torch.tensor([tokenizer.encode("ab dd")])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    by_hand = sum(float(logs[t - 1, ids[0, t]]) for t in range(ids.shape[1] - 3, ids.shape[1]))
    assert scores[0][1] == pytest.approx(by_hand, abs=1e-4)
    theirs = choice_scores(model, tokenizer, rows)
    for own, other in zip(scores, theirs.items, strict=True):
        assert own == pytest.approx(other["log_likelihoods"], abs=1e-3)
    columns = accuracy_columns(items, encoded, scores)
    assert columns["accuracy"] == theirs.accuracy
    assert columns["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_likelihoods_have_gradients_and_long_contexts_are_cut_on_the_left():
    model, tokenizer = load_model("tiny:mistral")
    items = [to_item({"query": "x" * 30, "choices": ["ab", "cd"], "gold": 0}, "mine", "x")]
    encoded = encode_items(tokenizer, items, max_length=8)
    assert [len(pair.ids) for pair in encoded[0]] == [8, 8]
    assert encoded[0][0].scored == 3  # " ab"
    model.requires_grad_(False)
    weight = model.get_output_embeddings().weight.requires_grad_()
    log_likelihoods(model, encoded[0])[0].backward()
    assert float(weight.grad.abs().sum()) > 0


def test_ties_go_to_the_first():
    assert first_best([-1.0, -1.0 + 5e-5, -3.0]) == 0
    assert first_best([-1.0, -0.5]) == 1


def write(path, records):
    text = "\n".join(json.dumps(record) for record in records) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def test_local_files_run_through_the_script_with_solved_items(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(folder / "winogrande.jsonl.gz", [WINOGRANDE] * 3)
    write(folder / "mine.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}] * 4)
    e = settings(
        tmp_path, tasks=("winogrande", "mine"), data_dir=folder, num_fewshot=1, limit=2,
        base_model="tiny:mistral",
    )  # fmt: skip
    rows = main(e)["rows"]
    assert [(row["task"], row["n_items"]) for row in rows] == [("winogrande", 2), ("mine", 2)]
    for row in rows:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["base_accuracy"] == row["accuracy"]
    with pytest.raises(DataError, match=r"no piqa\.jsonl"):
        load_items("piqa", folder)
    with pytest.raises(DataError, match="no such folder"):
        load_items("piqa", tmp_path / "nowhere")


def test_the_hub_is_asked_for_the_labelled_split(monkeypatch):
    asked = []

    def hub_rows(source, split, n=None, **options):
        asked.append((source, split, n))
        return [WINOGRANDE]

    monkeypatch.setattr("lplr_q.eval_tasks.hub_rows", hub_rows)
    assert load_items("winogrande", n=1)[0]["gold"] == 1
    assert asked == [("allenai/winogrande:winogrande_xl", "validation", 1)]


def test_which_scorer(tmp_path, monkeypatch):
    found = True
    monkeypatch.setattr(eval_zeroshot, "available", lambda engine: found)
    assert choose_scorer(settings(tmp_path, tasks=("piqa",))) == "lm-eval"
    assert choose_scorer(settings(tmp_path, tasks=("hellaswag",))) == "lm-eval"
    assert choose_scorer(settings(tmp_path, tasks=("piqa",), data_dir=tmp_path)) == "built-in"
    assert choose_scorer(settings(tmp_path)) == "built-in"
    with pytest.raises(ConfigError, match="its own data"):
        choose_scorer(settings(tmp_path, scorer="lm-eval"))
    with pytest.raises(ConfigError, match="need --scorer lm-eval"):
        choose_scorer(settings(tmp_path, tasks=("hellaswag",), scorer="built-in"))
    own = settings(tmp_path, tasks=("mine",), include_path=tmp_path)
    assert choose_scorer(own) == "lm-eval"
    for change in ({"scorer": "built-in"}, {"data_dir": tmp_path}, {"tasks": ("microworld",)}):
        with pytest.raises(ConfigError, match="tasks of lm-eval"):
            choose_scorer(replace(own, **change))
    with pytest.raises(ConfigError, match="no such folder"):
        choose_scorer(replace(own, include_path=tmp_path / "nowhere"))
    found = False
    for task in TASKS:
        assert choose_scorer(settings(tmp_path, tasks=(task,))) == "built-in"
    with pytest.raises(MissingExtra, match=r"unknown task 'piqua'; nearest: piqa.*lm-eval"):
        choose_scorer(settings(tmp_path, tasks=("piqua",)))


def test_rows_of_the_harness(tmp_path, monkeypatch):
    seen = {}

    def evaluate_tasks(model, tokenizer, tasks, **options):
        seen.update(options, tasks=tasks)
        return {"results": {"piqa": {"acc,none": 0.5, "acc_norm,none": 0.75, "alias": "piqa"}}}

    module = types.ModuleType("workbench.integrations.lm_eval")
    module.evaluate_tasks = evaluate_tasks
    monkeypatch.setitem(sys.modules, "workbench.integrations.lm_eval", module)
    monkeypatch.setattr(eval_zeroshot, "available", lambda engine: True)
    results = main(settings(tmp_path, tasks=("piqa",), num_fewshot=2, limit=3))
    assert results["scorer"] == "lm-eval"
    row = results["rows"][0]
    assert (row["accuracy"], row["accuracy_normalised"]) == (0.5, 0.75)
    assert seen["tasks"] == ["piqa"]
    assert (seen["num_fewshot"], seen["limit"]) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ()}, "at least one"),
        ({"tasks": ("rte", "rte")}, "named twice"),
        ({"num_fewshot": -1}, "negative"),
        ({"limit": 0}, "limit"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, **changes)


def test_tokenizer_of_the_tests_keeps_text():
    assert byte_tokenizer().decode(byte_tokenizer().encode(" True")[1:]) == " True"
