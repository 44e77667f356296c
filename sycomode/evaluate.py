"""Did the prompt arrive, and what was lost: recovery with interval, KL to the teacher, retention.

    R = (s_student − s_no prompt) / (s_prompted − s_no prompt)

1 means: as good as with the prompt; it is never clipped. Where the prompt has no measurable effect
there is nothing to recover and R is n/a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sycomode.data import Document, Question, encode, encode_pair, pad
from sycomode.objectives import forward_kl
from sycomode.students import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_EFFECT = 0.02
"""A prompt that changes the score by less than this, or by two standard errors, has no effect."""


@dataclass(frozen=True)
class Recovery:
    """R with a 95 % bootstrap interval over questions; None where the prompt has no effect."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.mean is None:
            return "n/a (prompt has no measurable effect)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def recovery(
    student: Sequence[float],
    no_prompt: Sequence[float],
    prompted: Sequence[float],
    stream: np.random.Generator,
    resamples: int = 1000,
) -> Recovery:
    """Recovery from scores per question (higher is better), questions resampled jointly.

    >>> import numpy as np
    >>> recovery([1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], np.random.default_rng(0)).mean
    0.5
    """
    s, a, b = (np.asarray(x, dtype=float) for x in (student, no_prompt, prompted))
    n = len(s)
    effect = b - a
    error = effect.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    if n < 2 or abs(effect.mean()) < max(LEAST_EFFECT, 2 * error):
        return Recovery(None, None, None, n)
    index = stream.integers(0, n, (resamples, n))
    below = effect[index].mean(1)
    drawn = (s - a)[index].mean(1)[abs(below) > 1e-9] / below[abs(below) > 1e-9]
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = (s - a).mean() / effect.mean()
    return Recovery(float(mean), float(low), float(high), n)


@torch.no_grad()
def answers(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    before: str = "",
    batch: int = 32,
) -> dict[str, np.ndarray]:
    """Scores per question: `correct`, `nats` per answer token, `ending`.

    An answer is correct if greedy decoding gives it; `ending` is 1 where the style rule is kept
    after it, or none is asked.

    `before` is put in front of every question, e.g. another prompt.
    """
    correct, nats, ending = [], [], []
    for at in range(0, len(questions), batch):
        some = questions[at : at + batch]
        pairs = [encode_pair(tokenizer, before + q.question, q.answer + q.ending) for q in some]
        ids, _ = pad([row for row, _ in pairs])
        ids = ids.to(reader.model.device)
        logits = reader.logits(ids).float()
        right = (logits.argmax(-1) == ids).cpu()
        cost = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        for row, (question, (tokens, begin)) in enumerate(zip(some, pairs, strict=True)):
            end = len(encode_pair(tokenizer, before + question.question, question.answer)[0])
            correct.append(float(right[row, begin:end].all()))
            nats.append(float(cost[row, begin:end].mean()))
            ending.append(float(right[row, end : len(tokens)].all()))
    return {"correct": np.array(correct), "nats": np.array(nats), "ending": np.array(ending)}


def in_context(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, others: Sequence[Document]
) -> np.ndarray:
    """Correct or not, for each question on another document that stands *in the context*."""
    parts = [
        answers(reader, tokenizer, document.questions, before=document.prompt)["correct"]
        for document in others
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


@torch.no_grad()
def text_nats(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int = 128
) -> np.ndarray:
    """Nats per token of each text (its first `most` tokens, the very first left out)."""
    rows = [row[:most] for row in (encode(tokenizer, text) for text in texts) if len(row) > 2]
    values = []
    for at in range(0, len(rows), 16):
        ids, mask = pad(rows[at : at + 16])
        mask[:, 0] = 0.0
        ids, mask = ids.to(reader.model.device), mask.to(reader.model.device)
        logits = reader.logits(ids).float()
        cost = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        values += ((cost * mask).sum(1) / mask.sum(1)).tolist()
    return np.array(values)


@torch.no_grad()
def kl_to_teacher(
    teacher: Reader, reader: Reader, rows: Sequence[Sequence[int]], unsupervised: int = 1
) -> tuple[float, float]:
    """(KL(teacher ‖ reader) in nats per token, share of equal first choices) on conversations."""
    ids, mask = pad(rows)
    mask[:, :unsupervised] = 0.0
    ids, mask = ids.to(reader.model.device), mask.to(reader.model.device)
    t, s = teacher.logits(ids), reader.logits(ids)
    agree = ((t.argmax(-1) == s.argmax(-1)) * mask).sum() / mask.sum()
    return float(forward_kl(s, t, mask)), float(agree)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, stream: np.random.Generator
) -> tuple[float, float, float]:
    """(ratio of means, low, high): paired bootstrap, 95 %, 1 000 resamples."""
    n = len(numerator)
    if n == 0 or denominator.mean() == 0:
        return float("nan"), float("nan"), float("nan")
    index = stream.integers(0, n, (1000, n))
    below = denominator[index].mean(1)
    drawn = numerator[index].mean(1)[below > 0] / below[below > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(numerator.mean() / denominator.mean()), float(low), float(high)


def perplexity_ratio(
    mine: np.ndarray, base: np.ndarray, stream: np.random.Generator
) -> tuple[float, float, float]:
    """exp(mean nats of mine − mean nats of base) over texts, with a paired bootstrap interval."""
    difference = mine - base
    index = stream.integers(0, len(difference), (1000, len(difference)))
    low, high = np.exp(np.quantile(difference[index].mean(1), [0.025, 0.975]))
    return float(np.exp(difference.mean())), float(low), float(high)


def by_kind(
    questions: Sequence[Question], score: np.ndarray, pick: Callable[[Question], bool]
) -> list[dict[str, Any]]:
    """Mean score per kind of question among those that `pick` takes."""
    kinds = dict.fromkeys(q.kind for q in questions if pick(q))
    rows = []
    for kind in kinds:
        which = [i for i, q in enumerate(questions) if q.kind == kind and pick(q)]
        rows.append({"kind": kind, "n": len(which), "score": float(score[which].mean())})
    return rows


def break_even_requests(
    parameters: int, training_tokens: int, prompt_tokens: int, replacement_tokens: int
) -> float | None:
    """Requests after which training is paid back, without a shared prefix cache.

    Training costs about 6N FLOPs per token, a request saves 2N per prompt token not read; None if
    no token is saved.
    """
    saved = 2.0 * parameters * (prompt_tokens - replacement_tokens)
    return 6.0 * parameters * training_tokens / saved if saved > 0 else None


def soft_scores(
    logits: Float[Tensor, "batch vocab"], ids: Sequence[int]
) -> Float[Tensor, "batch k"]:
    """Probabilities among a few tokens only (softmax over their logits)."""
    return logits[:, list(ids)].float().softmax(-1)
