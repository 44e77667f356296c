"""How good a language model is: loss with an interval, bits per byte, choices.

Every figure carries its interval. Perplexity is resampled over *blocks* (tokens of one block are
not independent), accuracy has the exact binomial interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TIE_NATS = 1e-4
"""Choices closer than this count as tied (the first wins), so rounding cannot flip an answer."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Perplexity:
    """exp(mean nats per predicted token) with a 95 % interval of the mean over blocks."""

    nats_per_token: float
    perplexity: float
    n_tokens: int
    ci_low: float
    """Lower end of the interval of `perplexity`."""
    ci_high: float
    """Upper end of the interval of `perplexity`."""
    n_blocks: int = 0

    def __str__(self) -> str:
        interval = f"[{self.ci_low:.3f}, {self.ci_high:.3f}]"
        return f"perplexity {self.perplexity:.3f} {interval} over {self.n_tokens} tokens"


@dataclass(frozen=True)
class BitsPerByte:
    """Code length of a text under the model, with a 95 % interval over texts."""

    bits_per_byte: float
    ci_low: float
    ci_high: float
    n_bytes: int
    n_tokens: int

    def __float__(self) -> float:
        return self.bits_per_byte


@dataclass(frozen=True)
class ChoiceScores:
    """Log-likelihood of every choice of every item, and how often the gold one is the highest."""

    accuracy: float
    """Share of items whose gold choice has the highest log-likelihood."""
    accuracy_normalised: float
    """The same with log-likelihoods divided by the choice's length in bytes."""
    ci_low: float
    """Exact 95 % interval of `accuracy`."""
    ci_high: float
    n_items: int
    items: list[dict[str, Any]]
    """Per item: log_likelihoods, n_tokens, n_bytes, gold, choice, choice_normalised, correct."""


def token_nats(
    model: PreTrainedModel,
    blocks: Int64[Tensor, "rows length"],
    batch_size: int = 8,
) -> Float[Tensor, "rows predicted"]:
    """−ln p(token t+1 | tokens ≤ t) for each row and t = 0 … length−2, on the CPU in float32.

    Raises:
        DataError: blocks of another shape or vocabulary, or a model whose logits are not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

    if blocks.ndim != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise DataError(f"blocks of shape {tuple(blocks.shape)}: expected (rows ≥ 1, length ≥ 2)")
    rows = int(model.get_input_embeddings().weight.shape[0])
    if int(blocks.max()) >= rows or int(blocks.min()) < 0:
        raise DataError(
            f"blocks hold token ids {int(blocks.min())} to {int(blocks.max())}, the model knows 0 "
            f"to {rows - 1}; tokenizer and model belong to different models"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, blocks.shape[0], batch_size):
                ids = blocks[start : start + batch_size].to(device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # batch time vocab
                nats = cross_entropy(
                    logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
                )
                parts.append(nats.view(ids.shape[0], -1).cpu())
    finally:
        model.train(was_training)
    nats = torch.cat(parts)
    if not bool(torch.isfinite(nats).all()):
        bad = int((~torch.isfinite(nats)).sum())
        raise DataError(
            f"the model's logits are not finite at {bad} of {nats.numel()} tokens; its weights are "
            "damaged or the number format is too narrow (try --dtype float32)"
        )
    return nats


def _ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval (percentile) of sum(numerator)/sum(denominator), units resampled together.

    [Efron & Tibshirani 1993, ch. 13], by scipy; the same resamples each time. One unit has no
    interval: (nan, nan).
    """
    from scipy.stats import bootstrap

    if len(numerator) < 2:
        return math.nan, math.nan
    if np.ptp(numerator / denominator) == 0:
        value = float(numerator[0] / denominator[0])
        return value, value

    def ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
        return top.sum(axis=axis) / bottom.sum(axis=axis)

    interval = bootstrap(
        (numerator, denominator),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=200,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def perplexity(
    model: PreTrainedModel,
    blocks: Int64[Tensor, "rows length"],
    batch_size: int = 8,
    *,
    ignore_id: int | None = None,
) -> Perplexity:
    """Perplexity over all predicted tokens of `blocks`, each block read on its own.

    exp(Σ nats / Σ tokens). Targets equal to `ignore_id` (padding) do not count.
    """
    nats = token_nats(model, blocks, batch_size).double().numpy()
    kept = np.ones_like(nats) if ignore_id is None else (blocks[:, 1:] != ignore_id).numpy()
    return perplexity_from_nats(nats, kept)


def perplexity_from_nats(nats: np.ndarray, kept: np.ndarray | None = None) -> Perplexity:
    """`Perplexity` from nats of shape (blocks, tokens) and an optional mask of counted tokens."""
    nats = np.asarray(nats, dtype=np.float64)
    kept = np.ones_like(nats) if kept is None else np.asarray(kept, dtype=np.float64)
    tokens = kept.sum(axis=1)
    losses = np.where(kept > 0, nats, 0.0).sum(axis=1)
    losses, tokens = losses[tokens > 0], tokens[tokens > 0]
    if not tokens.size:
        raise DataError("no token to predict: every target is padding")
    mean = float(losses.sum() / tokens.sum())
    low, high = _ratio_interval(losses, tokens)
    return Perplexity(
        nats_per_token=mean,
        perplexity=_exp(mean),
        n_tokens=int(tokens.sum()),
        ci_low=_exp(low),
        ci_high=_exp(high),
        n_blocks=len(tokens),
    )


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int = 256,
    batch_size: int = 8,
) -> BitsPerByte:
    """Σ bits of all tokens / Σ UTF-8 bytes of all texts: comparable across tokenizers.

    Each text is read in windows of `length` tokens that start with `<s>`; every token of the text
    is predicted once, so the first tokens of a window have little context (an upper bound).
    """
    if not texts:
        raise DataError("no texts to measure")
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise DataError("the tokenizer has neither <s> nor </s> to start a text with")
    windows: list[list[int]] = []
    owner: list[int] = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for at in range(0, len(ids), length - 1):
            windows.append([int(start), *ids[at : at + length - 1]])
            owner.append(index)
    nats = np.zeros(len(texts))
    for index, values in zip(owner, _sequence_nats(model, windows, batch_size), strict=True):
        nats[index] += float(values.sum())
    sizes = np.array([len(text.encode("utf-8")) for text in texts], dtype=np.float64)
    if not sizes.sum():
        raise DataError("the texts are empty")
    nats, sizes = nats[sizes > 0] / math.log(2), sizes[sizes > 0]
    low, high = _ratio_interval(nats, sizes)
    return BitsPerByte(
        float(nats.sum() / sizes.sum()),
        low,
        high,
        int(sizes.sum()),
        sum(len(w) - 1 for w in windows),
    )


def _sequence_nats(
    model: Any, sequences: list[list[int]], batch_size: int
) -> list[Float[Tensor, " predicted"]]:
    """−ln p of each token after the first, for sequences of unequal length.

    Sequences are padded on the right, which a causal model cannot see; order is kept.
    """
    import torch

    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    result: list[Any] = [None] * len(sequences)
    for at in range(0, len(order), batch_size):
        group = order[at : at + batch_size]
        width = max(2, max(len(sequences[i]) for i in group))
        block = torch.zeros(len(group), width, dtype=torch.long)
        for row, index in enumerate(group):
            block[row, : len(sequences[index])] = torch.tensor(sequences[index])
        nats = token_nats(model, block, batch_size)
        for row, index in enumerate(group):
            result[index] = nats[row, : len(sequences[index]) - 1]
    return result


def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> ChoiceScores:
    """Scores every choice of every item by Σ ln p(choice tokens | query).

    `items`: {"query": str, "choices": [str, …], "gold": int}. The raw score and the one per byte
    are both reported. Independent of the batch size up to rounding; ties within 1e-4 nats go to
    the first choice. A query longer than the model is cut on the left.

    Raises:
        DataError: item without a field, with fewer than two choices, or with gold out of range.
    """
    if not items:
        raise DataError("no items to score")
    limit = max_length or getattr(model.config, "max_position_embeddings", None) or 2048
    sequences: list[list[int]] = []
    spans: list[int] = []
    for number, item in enumerate(items):
        _check_item(item, number)
        for choice in item["choices"]:
            context, continuation = encode_pair(tokenizer, item["query"], choice)
            if not continuation:
                raise DataError(f"item {number}: choice {choice!r} has no tokens")
            ids = (context + continuation)[-int(limit) :]
            if len(ids) < 2:
                raise DataError(f"item {number}: no token before choice {choice!r} to predict from")
            sequences.append(ids)
            spans.append(min(len(continuation), len(ids) - 1))
    nats = _sequence_nats(model, sequences, batch_size)
    scored, at = [], 0
    for item in items:
        n = len(item["choices"])
        scores = [-float(nats[i][-spans[i] :].double().sum()) for i in range(at, at + n)]
        sizes = [max(1, len(choice.encode("utf-8"))) for choice in item["choices"]]
        best = _first_best(scores)
        best_normalised = _first_best([s / b for s, b in zip(scores, sizes, strict=True)])
        scored.append(
            {
                "log_likelihoods": scores,
                "n_tokens": spans[at : at + n],
                "n_bytes": sizes,
                "gold": int(item["gold"]),
                "choice": best,
                "choice_normalised": best_normalised,
                "correct": best == int(item["gold"]),
            }
        )
        at += n
    right = sum(item["correct"] for item in scored)
    normalised = sum(item["choice_normalised"] == item["gold"] for item in scored)
    low, high = proportion_interval(right, len(scored))
    return ChoiceScores(
        right / len(scored), normalised / len(scored), low, high, len(scored), scored
    )


def _check_item(item: dict[str, Any], number: int) -> None:
    for field, kind in (("query", str), ("choices", (list, tuple)), ("gold", int)):
        if not isinstance(item.get(field), kind) or isinstance(item.get(field), bool):
            raise DataError(f"item {number}: field {field!r} is missing or of the wrong type")
    if len(item["choices"]) < 2:
        raise DataError(f"item {number}: {len(item['choices'])} choices; expected at least 2")
    if not 0 <= item["gold"] < len(item["choices"]):
        raise DataError(
            f"item {number}: gold={item['gold']}, expected 0 to {len(item['choices']) - 1}"
        )


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation such that together they read as one text.

    Spaces at the end of the context move to the continuation, both are encoded together, and the
    context's own token count is the cut. `<s>` comes first if the tokenizer puts it there by
    itself (as lm-evaluation-harness does it); an empty context is `<s>`, or else `</s>`.
    """
    trailing = len(context) - len(context.rstrip(" "))
    if trailing:
        context, continuation = context[:-trailing], context[-trailing:] + continuation
    both = tokenizer.encode(context + continuation, add_special_tokens=False)
    head = tokenizer.encode(context, add_special_tokens=False) if context else []
    start = tokenizer.bos_token_id
    own = tokenizer.encode("a")[:1] == [start]
    if not head and start is None:
        start = tokenizer.eos_token_id
    first = [int(start)] if start is not None and (own or not head) else []
    return [*first, *both[: len(head)]], both[len(head) :]


def _first_best(scores: Sequence[float]) -> int:
    best = max(scores)
    return next(index for index, score in enumerate(scores) if score >= best - TIE_NATS)


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a proportion k/n.   [Clopper & Pearson 1934], by scipy."""
    from scipy.stats import binomtest

    if n < 1:
        raise DataError("no interval for a proportion of nothing (n = 0)")
    interval = binomtest(k, n).proportion_ci(confidence_level=confidence, method="exact")
    return float(interval.low), float(interval.high)
