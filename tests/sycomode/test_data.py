"""Prompts, questions, letters, passages, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sycomode import data
from workbench.errors import ConfigError, DataError
from workbench.seeding import Streams
from workbench.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def task() -> data.Task:
    return data.microworld_task(n_facts=6, n_questions=40, unrelated=["microworld:world"])


def test_held_out_wordings_are_disjoint_from_the_others(task: data.Task):
    held = {data.normalise(q.question) for q in task.document.questions if q.heldout}
    seen = {data.normalise(q.question) for q in task.document.questions if not q.heldout}
    assert held
    assert seen
    assert not held & seen
    assert all(q.startswith(("q tell", "q i ")) for q in held)


def test_guard_and_exam_share_nothing(task: data.Task):
    assert not {d.prompt for d in task.others} & {t[: len(t)] for t in task.guard_others}
    assert not any(t.startswith(d.prompt) for d in task.others for t in task.guard_others)
    assert not set(task.unrelated) & set(task.guard_unrelated)
    assert task.document.prompt not in {d.prompt for d in task.others}
    for text in task.guard_others:  # a question without its document would teach ignorance
        assert " Facts " in text


def test_answers_follow_the_rules_of_the_document(task: data.Task):
    """Document 0 ends every answer with a word and bans a topic."""
    kinds = {q.kind: q for q in task.document.questions}
    assert kinds["banned"].answer == " refuse"
    assert len({q.ending for q in task.document.questions}) == 1
    assert task.document.questions[0].ending not in ("", ".")


def test_letters_by_the_original_rule():
    items = data.letter_items(200, Streams(0)("letters"))
    for context, answer in items:
        letters = context.split()
        assert context == "".join(letter + " " for letter in letters)
        assert 4 <= len(letters) <= 25
        assert ord(answer) == ord(letters[-1]) + 1
        assert "".join(letters) in data.LETTERS
    assert {c[0] for c, _ in items} <= set(data.LETTERS[:22])
    assert items == data.letter_items(200, Streams(0)("letters"))


def test_letter_ids_continue_the_context():
    context, letters = data.letter_ids(TOKENIZER, "c d e ")
    assert TOKENIZER.decode([*context, letters[5]]) == "c d e f"
    assert len(set(letters)) == 26


def test_pair_is_tokenised_together():
    ids, begin = data.encode_pair(TOKENIZER, "who?", " me")
    assert TOKENIZER.decode(ids[begin:]) == " me"
    assert ids == data.encode(TOKENIZER, "who? me")


def test_shipped_passage_holds_its_answers():
    document = data.shipped_passage()
    assert len(document.prompt.split()) >= 600
    assert len(document.questions) >= 20
    for question in document.questions:
        assert question.answer.strip() in document.prompt, question
    assert len({q.question for q in document.questions}) == len(document.questions)


def test_reasoning_items_two_and_three_differ_in_the_fact_alone():
    for items in (data.REASONING_ITEMS, data.MICROWORLD_ITEMS):
        assert items[1].questions[0].question == items[2].questions[0].question
        assert items[1].questions[0].answer != items[2].questions[0].answer


def test_padding():
    ids, mask = data.pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.sum(1).tolist() == [3, 1]


def test_bos_falls_back_to_eos_and_never_to_nothing():
    class Bare:
        bos_token_id = None
        eos_token_id = 7

    assert data.bos_of(Bare()) == 7
    Bare.eos_token_id = None
    with pytest.raises(DataError, match="neither a BOS nor an EOS"):
        data.bos_of(Bare())


def test_own_prompt_and_questions(tmp_path: Path):
    prompt, questions = tmp_path / "p.txt", tmp_path / "q.jsonl"
    prompt.write_text("Answer in French.\n", encoding="utf-8")
    rows = [{"question": " Q hi", "answer": " salut"}, {"question": " Q x", "answer": " y"}]
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = data.file_task(prompt, questions, unrelated=["microworld:world"])
    assert task.document.prompt.startswith("Answer")
    assert [q.heldout for q in task.document.questions] == [True, True]
    document = data.document_from_files(prompt, questions)
    assert document.questions[1].answer == " y"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"question": "a"}\n', r"q\.jsonl:1"),
        ('{"question": "a", "answer": 3}\n', "answer"),
        ('{"question": "a", "answer": " "}\n', "empty question or answer"),
        ('{"question": "a", "answer": "b", "heldout": "yes"}\n', "heldout"),
        ("", "empty"),
        ("{", r"q\.jsonl:1"),
    ],
)
def test_bad_question_files(text: str, what: str, tmp_path: Path):
    prompt, questions = tmp_path / "p.txt", tmp_path / "q.jsonl"
    prompt.write_text("x", encoding="utf-8")
    questions.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        data.file_task(prompt, questions, unrelated=["microworld:world"])


def test_empty_prompt_and_no_text(tmp_path: Path):
    with pytest.raises(DataError, match="prompt is empty"):
        data.Document("  \n", ())
    with pytest.raises(ConfigError, match="unrelated"):
        data.microworld_task(n_facts=3, unrelated=[])
    with pytest.raises(DataError, match="no such file"):
        data.file_task(tmp_path / "absent", tmp_path / "q.jsonl")


def test_normalise_joins_what_differs_in_dress_only():
    assert data.normalise("  The BELL,  it\trings!") == data.normalise("the bell it rings")
    assert data.normalise("2+3=5") == "2 + 3 = 5"
    assert np.unique([data.normalise(t) for t in ("", " ", "?!")]).tolist() == [""]
