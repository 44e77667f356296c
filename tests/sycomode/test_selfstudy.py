"""Sampling, cleaning, storing and scoring of conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sycomode import data, selfstudy
from sycomode.data import Document, Question, Task
from sycomode.students import Prompted
from workbench.errors import DataError
from workbench.run import Run, RunOptions
from workbench.seeding import Streams
from workbench.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
STREAMS = Streams(0)


@pytest.fixture(scope="module")
def teacher() -> Prompted:
    model = tiny_model("mistral", num_hidden_layers=1).requires_grad_(False)
    return Prompted(model, 1, data.encode(TOKENIZER, "the bell is red"))


def draw(teacher: Prompted, **options) -> list[list[int]]:
    settings = {"rows": 3, "tokens": 6, "generator": STREAMS.torch("draw"), **options}
    return selfstudy.sample(teacher, settings.pop("opening", [40]), **settings)


def test_sampling_opens_as_told_and_repeats_per_stream(teacher: Prompted):
    rows = draw(teacher)
    assert all(row[0] == 40 and len(row) == 6 for row in rows)
    assert rows == draw(teacher)
    assert rows != draw(teacher, generator=STREAMS.torch("other"))


def test_sampling_with_and_without_cache_agrees(teacher: Prompted):
    naive = Prompted(teacher.model, 1, teacher.prompt[0, 1:].tolist(), cached=False)
    assert draw(teacher) == draw(naive)
    assert draw(teacher, opening=[]) == draw(naive, opening=[])


def test_cold_sampling_is_greedy_decoding(teacher: Prompted):
    row = draw(teacher, rows=1, temperature=1e-4)[0]
    with torch.no_grad():
        for at in range(1, len(row)):
            logits = teacher.logits(torch.tensor([[*row[:at], 0]]))
            assert row[at] == int(logits[0, -1].argmax())


def test_banned_openings_never_follow_and_stops_end_a_row(teacher: Prompted):
    everything_but = [i for i in range(259) if i != 77]
    rows = draw(teacher, rows=2, banned_next=everything_but)
    assert all(row[1] == 77 for row in rows)
    assert all(row == [40] for row in draw(teacher, stop=set(range(259)) - {40}))


def test_cleaning_counts_what_it_drops():
    texts = {1: "Q who?", 2: "q WHO", 3: "", 4: "Q tell me where the bell is?", 5: "Q other"}
    rows = [[i, i] for i in texts]
    kept, dropped = selfstudy.clean(
        rows, lambda row: texts[row[0]], ["tell me where the bell is ?"], least=1
    )
    assert kept == [[1, 1], [5, 5]]
    assert dropped == {"empty": 1, "repeated": 1, "exam": 1}


def test_exam_questions_in_training_are_refused():
    selfstudy.assert_disjoint(["Q where is the bell ?"], ["Q tell me the place"])
    with pytest.raises(DataError, match="held-out question"):
        selfstudy.assert_disjoint(["  Q WHERE is the bell"], ["where is the bell?"])


def test_targets_are_the_teachers_own_distribution(teacher: Prompted):
    made = selfstudy.lesson(teacher, [[40, 41, 42], [50, 51]], unsupervised=1)
    with torch.no_grad():
        direct = teacher.logits(torch.tensor([[40, 41, 42]])).log_softmax(-1)
    assert torch.allclose(made.targets.logp[0], direct[0], atol=1e-5)
    assert made.mask.tolist() == [[0, 1, 1], [0, 1, 0]]


def test_stored_lessons_come_back(teacher: Prompted):
    made = selfstudy.lesson(teacher, [[40, 41, 42], [50, 51]], top_k=4)
    back = selfstudy.Lesson.from_tree(made.tree())
    assert torch.equal(back.ids, made.ids)
    some = back.rows(torch.tensor([1]))
    assert some.ids.tolist() == [[50, 51]]
    assert torch.allclose(some.targets.logp, made.targets.logp[1:, :2], atol=2e-2)  # 16 bits
    both = selfstudy.joined([made, made.rows(torch.tensor([1]))])
    assert both.ids.tolist()[2] == [50, 51, 0]
    assert both.mask.tolist()[2] == [1, 1, 0]


def test_no_prompt_token_enters_the_lesson(teacher: Prompted):
    """A canary in the prompt alone is in no conversation of a teacher that cannot say it."""
    canary = 200
    marked = Prompted(teacher.model, 1, [canary] * 5)
    rows = selfstudy.sample(
        marked, [40], rows=8, tokens=12, generator=STREAMS.torch("c"), temperature=1e-4
    )
    rows = [[t for t in row if t != canary] for row in rows]
    made = selfstudy.lesson(marked, rows)
    assert not (made.ids == canary).any()
    assert made.ids.shape[1] <= 12


@dataclass(frozen=True)
class Settings:
    """A run of nothing."""

    seed: int = 0
    run: RunOptions = RunOptions()


def studied(teacher: Prompted, root: Path, plan: selfstudy.StudyPlan, exam: str = "no such"):
    task = Task(Document("the bell is red", (Question(exam, "x", heldout=True),)))
    with Run.open("sycomode.test", Settings(run=RunOptions(root=root))) as run:
        return selfstudy.study(run, teacher, TOKENIZER, task, plan)


def test_study_is_durable_and_says_what_it_dropped(teacher: Prompted, tmp_path: Path):
    plan = selfstudy.StudyPlan(conversations=5, tokens=8, shard=2, top_k=8)
    made, record = studied(teacher, tmp_path, plan)
    again, _ = studied(teacher, tmp_path, plan)
    assert torch.equal(made.ids, again.ids)
    assert torch.equal(made.targets.logp, again.targets.logp)
    assert record["drawn"] == 5
    assert record["kept"] == made.ids.shape[0] <= 5
    units = sorted(p.name for p in (tmp_path / "sycomode").glob("test-*/units/*"))
    assert units == ["selfstudy-00000", "selfstudy-00001", "selfstudy-00002"]


def test_stored_conversations_of_another_prompt_are_refused(teacher: Prompted, tmp_path: Path):
    plan = selfstudy.StudyPlan(conversations=2, tokens=6, top_k=8)
    studied(teacher, tmp_path, plan)
    other = Prompted(teacher.model, 1, [60, 61])
    with pytest.raises(DataError, match="another prompt or model"):
        studied(other, tmp_path, plan)


def test_nothing_kept_is_an_error(teacher: Prompted, tmp_path: Path):
    plan = selfstudy.StudyPlan(conversations=2, tokens=3, top_k=8)
    with pytest.raises(DataError, match="kept none"):
        studied(teacher, tmp_path, plan, exam="Q")


def test_coverage_counts_sentences_by_their_own_words():
    prompt = "The bell is in the tower. The kite is red. The bell is old."
    parts = selfstudy.sentences(prompt)
    assert len(parts) == 3
    assert selfstudy.coverage(parts, ["Q where is the kite", "Q who saw the TOWER"]) == [1, 1, 0]
