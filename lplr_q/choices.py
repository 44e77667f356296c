"""Log-likelihood of continuations, differentiable, and accuracy of multiple-choice items.

    s_i = sum_t ln p(continuation_i,t | context_i, continuation_i,<t)

The choice is argmax s_i, or argmax s_i / bytes(continuation_i) when normalised by length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.evaluate import TIE_NATS, encode_pair, proportion_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pair:
    """Token ids of a context and its continuation, and how many belong to the latter."""

    ids: list[int]
    scored: int
    n_bytes: int


def encode_items(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    *,
    max_length: int,
) -> list[list[Pair]]:
    """The pairs of every item; contexts that are too long are cut on the left.

    Raises:
        DataError: a continuation without tokens.
    """
    encoded = []
    for number, item in enumerate(items):
        pairs = []
        for context, ending in zip(item["contexts"], item["continuations"], strict=True):
            head, tail = encode_pair(tokenizer, context, ending)
            if not tail:
                raise DataError(f"item {number}: continuation {ending[:60]!r} has no tokens")
            ids = (head + tail)[-max_length:]
            size = max(1, len(ending.strip().encode("utf-8")))
            pairs.append(Pair(ids, min(len(tail), len(ids) - 1), size))
        encoded.append(pairs)
    return encoded


def pad_pairs(
    pairs: Sequence[Pair],
) -> tuple[Int64[Tensor, "rows length"], Bool[Tensor, "rows predicted"]]:
    """Ids padded on the right (a causal model cannot see it) and which predictions count."""
    width = max(2, *(len(pair.ids) for pair in pairs))
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    counted = torch.zeros(len(pairs), width - 1, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
        counted[row, len(pair.ids) - 1 - pair.scored : len(pair.ids) - 1] = True
    return ids, counted


def log_likelihoods(model: nn.Module, pairs: Sequence[Pair]) -> Float[Tensor, " pairs"]:
    """s_i of every pair, with gradient where the model has one."""
    ids, counted = pad_pairs(pairs)
    device = next(model.parameters()).device
    ids, counted = ids.to(device), counted.to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # rows time vocab
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(counted.shape)
    return -(nats * counted).sum(dim=1)


@torch.no_grad()
def score_items(
    model: nn.Module,
    encoded: Sequence[Sequence[Pair]],
    *,
    batch_size: int,
    progress: Callable[[Iterable[Any]], Iterator[Any]] = iter,
) -> list[list[float]]:
    """s_i of all choices of all items; pairs of similar length share a batch.

    Raises:
        DataError: the model's logits are not finite.
    """
    flat = [(i, j) for i, pairs in enumerate(encoded) for j in range(len(pairs))]
    flat.sort(key=lambda at: len(encoded[at[0]][at[1]].ids))
    scores = [[0.0] * len(pairs) for pairs in encoded]
    was_training = model.training
    model.eval()
    try:
        for start in progress(range(0, len(flat), batch_size)):
            some = flat[start : start + batch_size]
            values = log_likelihoods(model, [encoded[i][j] for i, j in some]).tolist()
            for (i, j), value in zip(some, values, strict=True):
                if not -1e30 < value < 1e30:
                    raise DataError(
                        f"the model's logits are not finite at item {i}; its weights are damaged "
                        "or the number format is too narrow (try --dtype float32)"
                    )
                scores[i][j] = value
    finally:
        model.train(was_training)
    return scores


def first_best(scores: Sequence[float]) -> int:
    """Index of the highest score; ties within 1e-4 nats go to the first."""
    best = max(scores)
    return next(i for i, score in enumerate(scores) if score >= best - TIE_NATS)


def accuracy_columns(
    items: Sequence[dict[str, Any]], encoded: Sequence[Sequence[Pair]], scores: list[list[float]]
) -> dict[str, Any]:
    """Raw and length-normalised accuracy with exact 95 % intervals, and the level of chance."""
    raw = normalised = 0
    chance = 0.0
    for item, pairs, values in zip(items, encoded, scores, strict=True):
        raw += first_best(values) == item["gold"]
        per_byte = [v / pair.n_bytes for v, pair in zip(values, pairs, strict=True)]
        normalised += first_best(per_byte) == item["gold"]
        chance += 1 / len(values)
    n = len(scores)
    low, high = proportion_interval(raw, n)
    low_n, high_n = proportion_interval(normalised, n)
    return {
        "accuracy": raw / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_normalised": normalised / n,
        "normalised_low": low_n,
        "normalised_high": high_n,
        "chance": chance / n,
        "n_items": n,
    }
