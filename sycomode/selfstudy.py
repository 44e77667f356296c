"""Self-study: the prompted model asks and answers; its distributions become the lesson.

A base model continues its prompt. Started with the mark of a question it writes conversations in
the prompt's own language: question, answer, next question. They are sampled from the teacher,
cleaned (empties, repeats, wordings kept for the exam), and scored once more under the whole prompt,
position by position. The lesson holds no prompt: `ids` is what the student reads, `targets` what
the teacher thought.

Alignment: the teacher reads [BOS, p, x] and the student [BOS, artefact, x]; both answer
`logits(x)`, so target t and prediction t always stand for the same token, whatever the two prefixes
measure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sycomode.data import Task, encode, normalise, pad
from sycomode.objectives import Targets, compress
from sycomode.students import Prompted, Reader, expanded_cache
from workbench.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lesson:
    """Conversations with the distributions of whoever is to be imitated on them."""

    ids: Int[Tensor, "rows time"]
    mask: Float[Tensor, "rows time"]
    targets: Targets

    def rows(self, index: Int[Tensor, " some"]) -> Lesson:
        """Some rows, cut to the longest of them."""
        mask = self.mask[index]
        used = int(mask.any(0).nonzero().max()) + 1
        some = self.targets.rows(index)
        ids = None if some.ids is None else some.ids[:, :used].long()
        tail = None if some.tail is None else some.tail[:, :used]
        return Lesson(
            self.ids[index, :used], mask[:, :used], Targets(some.logp[:, :used], ids, tail)
        )

    def to(self, device: torch.device) -> Lesson:
        """The same on a device."""
        t = self.targets
        ids = None if t.ids is None else t.ids.to(device)
        tail = None if t.tail is None else t.tail.to(device)
        moved = Targets(t.logp.to(device), ids, tail)
        return Lesson(self.ids.to(device), self.mask.to(device), moved)

    def tree(self) -> dict[str, Any]:
        """As it is stored: ids in 32, log-probabilities in 16 bits."""
        t = self.targets
        return {
            "ids": self.ids.int(),
            "mask": self.mask.to(torch.uint8),
            "logp": t.logp.half(),
            "top_ids": None if t.ids is None else t.ids.int(),
            "tail": None if t.tail is None else t.tail.half(),
        }

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Lesson:
        """The inverse of `tree`."""
        targets = Targets(tree["logp"], tree["top_ids"], tree["tail"])
        return Lesson(tree["ids"].long(), tree["mask"].float(), targets)


@dataclass(frozen=True)
class StudyPlan:
    """How conversations are drawn."""

    conversations: int = 192
    tokens: int = 40
    temperature: float = 1.0
    top_k: int = 64
    shard: int = 48
    question_mark: str = " Q"
    banned_openings: tuple[str, ...] = ()


@torch.no_grad()
def sample(
    teacher: Prompted,
    opening: Sequence[int],
    *,
    rows: int,
    tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    banned_next: Sequence[int] = (),
    stop: Iterable[int] = (),
) -> list[list[int]]:
    """Continuations of the teacher's prompt that begin with `opening`, at most `tokens` long.

    Tokens in `banned_next` never follow the opening sequence, wherever it comes up; a row ends
    before the first `stop` token.

    Raises:
        DataError: logits that are not finite.
    """
    device = teacher.model.device
    begin = list(opening)
    ids = torch.tensor([begin] * rows, dtype=torch.long, device=device)
    barred = torch.tensor(sorted(set(banned_next)), dtype=torch.long, device=device)
    cache = expanded_cache(teacher.prefill(), rows) if teacher.cached else None
    fresh = ids
    while ids.shape[1] < tokens:
        if cache is None or not ids.shape[1]:
            nothing = ids.new_zeros(rows, 1)  # the last position predicts a token yet unknown
            logits = teacher.logits(torch.cat([ids, nothing], dim=1))[:, -1]
        else:
            logits = teacher.model(fresh, past_key_values=cache, use_cache=True).logits[:, -1]
        logits = logits.float() / temperature
        if len(barred) and begin:
            after = (ids[:, -len(begin) :] == ids.new_tensor(begin)).all(1)
            closed = torch.isin(torch.arange(logits.shape[1], device=device), barred)
            logits = logits.masked_fill(after[:, None] & closed, -torch.inf)
        chances = logits.softmax(-1).cpu()
        if not bool(torch.isfinite(chances).all()):
            raise DataError(
                "the logits of the prompted model are not finite; its weights are damaged or the "
                "number format is too narrow (try --dtype float32)"
            )
        fresh = torch.multinomial(chances, 1, generator=generator).to(device)
        ids = torch.cat([ids, fresh], dim=1)
    ends = set(stop)
    return [_until(row, ends) for row in ids.tolist()]


def clean(
    rows: Sequence[list[int]],
    text_of: Callable[[list[int]], str],
    forbidden: Iterable[str],
    *,
    least: int,
) -> tuple[list[list[int]], dict[str, int]]:
    """Rows without empties, exact repeats and exam questions, and the count of each kind dropped.

    Two texts are the same if they are after `normalise`; an exam question anywhere in a row bars
    it.
    """
    seen: set[str] = set()
    exam = [normalise(text) for text in forbidden]
    kept, dropped = [], {"empty": 0, "repeated": 0, "exam": 0}
    for row in rows:
        text = normalise(text_of(row))
        if len(row) <= least or not text:
            dropped["empty"] += 1
        elif any(question in text for question in exam):
            dropped["exam"] += 1
        elif text in seen:
            dropped["repeated"] += 1
        else:
            seen.add(text)
            kept.append(row)
    return kept, dropped


@torch.no_grad()
def lesson(
    reader: Reader,
    rows: Sequence[Sequence[int]],
    *,
    top_k: int = 0,
    temperature: float = 1.0,
    unsupervised: int = 0,
    batch: int = 16,
) -> Lesson:
    """Rows with the reader's own distributions as targets, but for the first `unsupervised`."""
    ids, mask = pad(rows)
    mask[:, :unsupervised] = 0.0
    parts = []
    for at in range(0, len(rows), batch):
        logits = reader.logits(ids[at : at + batch].to(reader.model.device)).cpu()
        parts.append(compress(logits, top_k, temperature))
    some = parts[0]
    best = None if some.ids is None else torch.cat([p.ids for p in parts if p.ids is not None])
    tail = None if some.tail is None else torch.cat([p.tail for p in parts if p.tail is not None])
    return Lesson(ids, mask, Targets(torch.cat([p.logp for p in parts]), best, tail))


def joined(lessons: Sequence[Lesson]) -> Lesson:
    """Several lessons as one, padded to the longest."""
    width = max(part.ids.shape[1] for part in lessons)

    def stretch(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        more = value.new_zeros(value.shape[0], width - value.shape[1], *value.shape[2:])
        return torch.cat([value, more], dim=1)

    def cat(pick: Callable[[Lesson], Tensor | None]) -> Any:
        parts = [stretch(pick(part)) for part in lessons]
        return None if parts[0] is None else torch.cat([p for p in parts if p is not None])

    targets = Targets(
        cat(lambda x: x.targets.logp), cat(lambda x: x.targets.ids), cat(lambda x: x.targets.tail)
    )
    return Lesson(cat(lambda x: x.ids), cat(lambda x: x.mask), targets)


def study(
    run: Any,
    teacher: Prompted,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    plan: StudyPlan,
    *,
    stream: str = "selfstudy",
    targets_temperature: float = 1.0,
) -> tuple[Lesson, dict[str, Any]]:
    """The lesson of `plan`, drawn in durable shards, and a record of what was kept and dropped.

    Raises:
        DataError: the shards on disk are of another prompt or model, or nothing usable was drawn.
    """
    opening = encode(tokenizer, plan.question_mark)
    banned = [encode(tokenizer, text)[0] for text in plan.banned_openings]
    stamp = fingerprint(teacher)
    exam = [question.question for question in task.document.questions if question.heldout]
    shards, seen, counts = [], set[str](), {"empty": 0, "repeated": 0, "exam": 0}

    def text_of(row: list[int]) -> str:
        return str(tokenizer.decode(row, skip_special_tokens=True))

    def draw(index: int) -> dict[str, Any]:
        rows = sample(
            teacher,
            opening,
            rows=min(plan.shard, plan.conversations - index * plan.shard),
            tokens=plan.tokens,
            generator=run.streams.torch(stream, index=index),
            temperature=plan.temperature,
            banned_next=banned,
            stop=[tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [],
        )
        kept, dropped = clean(rows, text_of, exam, least=len(opening))
        if not kept:
            return {"stamp": stamp, "dropped": dropped, "rows": 0}
        made = lesson(
            teacher,
            kept,
            top_k=plan.top_k,
            temperature=targets_temperature,
            unsupervised=len(opening),
        )
        return {"stamp": stamp, "dropped": dropped, "rows": len(kept), "lesson": made.tree()}

    n_shards = -(-plan.conversations // plan.shard)
    for index in run.progress(range(n_shards), stream, total=n_shards):
        part = run.once(f"{stream}-{index:05d}", lambda index=index: draw(index))
        if part["stamp"] != stamp:
            raise DataError(
                f"{run.directory}: stored conversations are of another prompt or model "
                f"({part['stamp'][:12]}, now {stamp[:12]}); use --fresh to draw them again"
            )
        for key, value in part["dropped"].items():
            counts[key] += value
        if not part["rows"]:
            continue
        whole = Lesson.from_tree(part["lesson"])
        keep = _first_times(whole, text_of, seen)
        counts["repeated"] += whole.ids.shape[0] - len(keep)
        if keep:
            shards.append(whole.rows(torch.tensor(keep)))
    if not shards:
        raise DataError(
            f"self-study kept none of {plan.conversations} conversations ({counts}); does the "
            f"model continue its prompt with {plan.question_mark!r}? try --question-mark"
        )
    made = joined(shards)
    assert_disjoint([text_of(row) for row in _unpadded(made)], exam)
    record = {
        "drawn": plan.conversations,
        "kept": made.ids.shape[0],
        "tokens": int(made.mask.sum()),
        **{f"dropped_{key}": value for key, value in counts.items()},
    }
    return made, record


def coverage(sentences: Sequence[str], conversations: Sequence[str]) -> list[int]:
    """For each sentence of the prompt: how many conversations name what it alone is about.

    A word belongs to a sentence if at most two sentences hold it. (A cheap stand-in for ablating
    each sentence and watching the teacher's answers.)
    """
    words = [set(normalise(s).split()) for s in sentences]
    common: dict[str, int] = {}
    for group in words:
        for word in group:
            common[word] = common.get(word, 0) + 1
    own = [{w for w in group if common[w] <= 2} for group in words]
    texts = [set(normalise(c).split()) for c in conversations]
    return [sum(bool(marks & text) for text in texts) for marks in own]


def sentences(prompt: str) -> list[str]:
    """The prompt's sentences or lines, without empties."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", prompt) if part.strip(" .")]


def assert_disjoint(conversations: Sequence[str], exam: Sequence[str]) -> None:
    """Raises DataError if an exam question occurs in a conversation to train on."""
    questions = [normalise(q) for q in exam]
    for text in map(normalise, conversations):
        for question in questions:
            if question and question in text:
                raise DataError(
                    f"the held-out question {question!r} occurs in a training conversation; remove "
                    "it from one of the two"
                )


def fingerprint(teacher: Prompted) -> str:
    """SHA-256 over the prompt's ids and a sample of every weight of the model."""
    digest = hashlib.sha256(str(teacher.prompt.tolist()).encode())
    model: PreTrainedModel = teacher.model
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _first_times(whole: Lesson, text_of: Callable[[list[int]], str], seen: set[str]) -> list[int]:
    keep = []
    for index, row in enumerate(_unpadded(whole)):
        text = normalise(text_of(row))
        if text not in seen:
            seen.add(text)
            keep.append(index)
    return keep


def _unpadded(whole: Lesson) -> list[list[int]]:
    last = [int(row.nonzero().max()) + 1 for row in whole.mask]
    return [row[:n] for row, n in zip(whole.ids.tolist(), last, strict=True)]


def _until(row: list[int], ends: set[int]) -> list[int]:
    for at, token in enumerate(row):
        if token in ends:
            return row[:at]
    return row
