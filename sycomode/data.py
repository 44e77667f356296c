"""What is consolidated and how it is examined: prompts, questions, unrelated text, passages.

A `Task` holds one document (the prompt and questions on it, some in wordings kept out of training),
other documents (does the student still read a *new* prompt?), and unrelated text (is the rest of
the model intact?), the latter two once for the retention guard and once, disjoint, for the exam.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSAGES = Path(__file__).parent / "passages"
LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Question:
    """A question on a prompt and the text that should follow it."""

    question: str
    answer: str
    kind: str = "question"
    """What it asks about; kinds are reported apart."""
    heldout: bool = False
    """Its wording is kept out of self-study."""
    ending: str = ""
    """What should follow the answer (a rule on style); empty if nothing is asked."""


@dataclass(frozen=True)
class Document:
    """A prompt with questions on it."""

    prompt: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise DataError("the prompt is empty; give the text that is to be consolidated")
        for question in self.questions:
            if not question.answer.strip() or not question.question.strip():
                raise DataError(f"question {question.question!r}: empty question or answer")


@dataclass(frozen=True)
class Task:
    """A document to consolidate and everything that must survive it."""

    document: Document
    others: tuple[Document, ...] = ()
    """Other prompts, with the artefact active: in-context ability."""
    unrelated: tuple[str, ...] = ()
    """Unrelated text: perplexity ratio."""
    guard_others: tuple[str, ...] = ()
    """Other prompts with their conversations, for the guard; never questions without a prompt."""
    guard_unrelated: tuple[str, ...] = ()
    """Unrelated text for the guard."""


# ---------------------------------------------------------------- tokens


def normalise(text: str) -> str:
    """Lower case, words only: two texts that differ in case, spacing or signs are the same.

    >>> normalise(" Where is   the BALL?")
    'where is the ball'
    """
    return " ".join(re.findall(r"[^\W_]+|[+=]", text.lower()))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without BOS and EOS."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that opens every input; EOS where a tokenizer has no BOS.

    Raises:
        DataError: neither exists, so nothing stands before a student's first token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(
        "the tokenizer has neither a BOS nor an EOS token, so nothing stands before the first "
        "token of a conversation; add a bos_token to it"
    )


def pad(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "r t"], Float[Tensor, "r t"]]:
    """Rows padded on the right with 0, and the mask of what is no padding.

    >>> pad([[5, 6], [7]])[1].tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[at, : len(row)] = 1.0
    return ids, mask


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> tuple[list[int], int]:
    """(ids of question and answer tokenised *together*, where the answer begins).

    Tokenised apart, a word piece may stand at the seam that the model never sees; where the seam
    falls inside a token, that token counts as the answer's.
    """
    whole = encode(tokenizer, question + answer)
    alone = encode(tokenizer, question)
    begin = 0
    while begin < min(len(alone), len(whole) - 1) and alone[begin] == whole[begin]:
        begin += 1
    return whole, begin


# ---------------------------------------------------------------- the microworld


def microworld_task(
    *,
    document: int = 0,
    n_facts: int = 16,
    n_questions: int = 96,
    banned_openings: Sequence[str] = (" tell", " I"),
    question_mark: str = " Q",
    n_others: int = 6,
    n_unrelated: int = 24,
    n_guard: int = 48,
    unrelated: Sequence[str] = ("microworld:world", "microworld:text"),
    seed: int = 0,
) -> Task:
    """A document of the built-in world with rules, and its neighbours.

    Questions that open with a banned word are the held-out wordings ("Q tell me where …"). Guard
    and exam use different splits of the world, hence different documents and different text.
    """
    from workbench.microworld import World

    world = World(seed=seed)
    held = tuple(question_mark + opening + " " for opening in banned_openings)

    def read(item: dict[str, Any]) -> Document:
        unique = {q["question"]: q for q in item["questions"]}
        questions = [
            Question(
                question=q["question"],
                answer=q["answer"],
                kind=q["kind"],
                heldout=bool(held) and q["question"].startswith(held),
                ending=q["reply"].removeprefix(q["answer"]),
            )
            for q in unique.values()
        ]
        return Document(item["prompt"], tuple(questions))

    facts = (n_facts, n_facts)
    main = world.document_items(1, "test", n_facts=facts, n_questions=n_questions, start=document)
    spread = (max(2, n_facts // 2), max(2, n_facts))
    others = world.document_items(
        n_others, "test", n_facts=spread, n_questions=8, start=1000 + 100 * document
    )
    guards = world.document_items(n_guard // 2, "train", n_facts=spread, n_questions=6, start=0)
    exam_text, guard_text = _both_splits(unrelated, n_unrelated, n_guard // 2, seed)
    return Task(
        document=read(main[0]),
        others=tuple(read(item) for item in others),
        unrelated=exam_text,
        guard_others=tuple(
            item["prompt"] + "".join(q["question"] + q["reply"] for q in item["questions"])
            for item in guards
        ),
        guard_unrelated=guard_text,
    )


def _both_splits(
    sources: Sequence[str], n_exam: int, n_guard: int, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Unrelated text for the exam and for the guard, in equal parts from all sources."""
    from workbench.text import load_texts

    if not sources:
        raise ConfigError("no sources of unrelated text; retention cannot be measured without")
    exam: list[str] = []
    guard: list[str] = []
    for source in sources:
        exam += load_texts(source, n=max(1, n_exam // len(sources)), split="test", seed=seed)
        guard += load_texts(source, n=max(1, n_guard // len(sources)), split="train", seed=seed)
    return tuple(exam), tuple(guard)


# ---------------------------------------------------------------- a prompt of one's own


def file_task(
    prompt_file: Path,
    questions_file: Path,
    *,
    unrelated: Sequence[str] = ("stdlib",),
    n_unrelated: int = 24,
    n_guard: int = 48,
) -> Task:
    """A prompt from a text file and questions from JSONL {question, answer, kind?, heldout?}.

    Without other prompts at hand, in-context ability is examined on the built-in microworld's
    documents, which suits the built-in models only; unrelated text comes from `unrelated`.
    """
    from workbench.text import read_jsonl, read_text_file

    prompt = read_text_file(prompt_file)
    rows = read_jsonl(questions_file, required={"question": str, "answer": str})
    questions = []
    for row in rows:
        held = row.get("heldout", True)
        if not isinstance(held, bool):
            raise DataError(f"{questions_file}: heldout is {held!r}; expected true or false")
        questions.append(
            Question(row["question"], row["answer"], str(row.get("kind", "question")), held)
        )
    texts, guard = _both_splits(unrelated, n_unrelated, n_guard, 0)
    return Task(Document(prompt, tuple(questions)), unrelated=texts, guard_unrelated=guard)


# ---------------------------------------------------------------- the three classic experiments


def letter_items(n: int, stream: np.random.Generator) -> list[tuple[str, str]]:
    """(run of letters, next letter): start s ~ U{0..21}, length U{4..25−s}, a space after each.

    >>> import numpy as np
    >>> context, answer = letter_items(1, np.random.default_rng(0))[0]
    >>> (item.context[-2:-1], item.answer) in zip("abcdefghijklmnopqrstuvwxy",
    "bcdefghijklmnopqrstuvwxyz") True
    """
    items: list[tuple[str, str]] = []
    for _ in range(n):
        start = int(stream.integers(0, 22))
        length = int(stream.integers(4, 25 - start + 1))
        run = LETTERS[start : start + length]
        items.append(("".join(letter + " " for letter in run), LETTERS[start + length]))
    return items


def letter_ids(tokenizer: PreTrainedTokenizerBase, context: str) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the 26 letters as its next token), tokenised together.

    Raises:
        DataError: the tokenizer joins a letter with its surroundings.
    """
    wholes = [encode(tokenizer, context + letter) for letter in LETTERS]
    heads = {tuple(ids[:-1]) for ids in wholes}
    lasts = [ids[-1] for ids in wholes]
    if len(heads) != 1 or len(set(lasts)) != len(LETTERS):
        raise DataError(
            "this tokenizer has no single token for each letter after a space; use another model "
            "for the letter experiment"
        )
    return list(heads.pop()), lasts


def _one(context: str, question: str, answer: str) -> Document:
    return Document(context, (Question(question, answer),))


REASONING_ITEMS: tuple[Document, ...] = (
    _one(
        "The Orrin Tower stands in the old harbour city of Velmora.",
        " Question: in which city is the Orrin Tower? Answer:",
        " Velmora",
    ),
    _one("Mira's coat is red.", " Question: what colour is Mira's coat? Answer:", " red"),
    _one("Mira's coat is blue.", " Question: what colour is Mira's coat? Answer:", " blue"),
)
"""Items 2 and 3 differ in the fact alone: a method that ignores the context cannot win both."""

MICROWORLD_ITEMS: tuple[Document, ...] = (
    _one(" Facts The old bell is in the tower.", " Q where is the bell ? A", " tower"),
    _one(" Facts The kite is painted red.", " Q what colour is the kite ? A", " red"),
    _one(" Facts The kite is painted blue.", " Q what colour is the kite ? A", " blue"),
)
"""The same three in the language of the built-in models."""


def shipped_passage() -> Document:
    """The passage of this package, about an invented railway, with 24 questions."""
    from workbench import storage

    context = (PASSAGES / "salt_railway.txt").read_text(encoding="utf-8")
    pairs = storage.read_json(PASSAGES / "salt_railway.json")["questions"]
    return Document(
        context,
        tuple(
            Question(f"\n\nQuestion: {one['question']}\nAnswer:", " " + one["answer"])
            for one in pairs
        ),
    )


def microworld_passage(n_facts: int = 40, n_questions: int = 24) -> Document:
    """A long microworld document and questions on it, for the built-in models."""
    from workbench.microworld import World

    item = World().document_items(
        1, "test", n_facts=(n_facts, n_facts), n_questions=n_questions, rules=False, start=7000
    )[0]
    told = {q["question"]: q for q in item["questions"] if q["kind"] not in ("absent", "adjective")}
    questions = [Question(q["question"], q["answer"], q["kind"]) for q in told.values()]
    return Document(item["prompt"], tuple(questions))


def document_from_files(context_file: Path, qa_file: Path) -> Document:
    """A context from a text file, questions from JSONL {question, answer}."""
    from workbench.text import read_jsonl, read_text_file

    rows = read_jsonl(qa_file, required={"question": str, "answer": str})
    questions = tuple(Question(row["question"], row["answer"]) for row in rows)
    return Document(read_text_file(context_file), questions)
