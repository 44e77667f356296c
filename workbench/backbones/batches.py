"""Training batches: whole samples of the microworld packed into rows, each token with its weight.

A batch is a function of (recipe, step) alone, so a resumed training sees the same data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from workbench.backbones.recipes import Recipe
from workbench.microworld import Sample, World
from workbench.microworld.prng import Stream
from workbench.tokenizer import BOS_ID, EOS_ID, PAD_ID, microworld_tokenizer, word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_PER_STEP = 4096  # indices reserved per step and kind, far more than a step can hold
TRIES = 8  # samples that may fail to fit before a kind is full


class Encoded(NamedTuple):
    """A sample as `<s> … </s>`: token ids, and per token the class it has as a target."""

    ids: list[int]
    classes: list[str]


class Batch(NamedTuple):
    """Rows of token ids and, for each token, its weight as a target (0: not predicted)."""

    ids: np.ndarray
    weights: np.ndarray


class Encoder:
    """Samples to tokens: grammar words by table, real text by the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokenizer: Any = tokenizer
        self.word_ids = word_ids()

    def __call__(self, sample: Sample) -> Encoded:
        """The framed token ids and classes of a sample; the class of `<s>` is "frame"."""
        if sample.words[0][1] == "text":
            if self.tokenizer is None:
                self.tokenizer = microworld_tokenizer()
            ids = self.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            classes = ["text"] * len(ids)
        else:
            ids = [self.word_ids[word] for word, _ in sample.words]
            classes = [word_class for _, word_class in sample.words]
        return Encoded([BOS_ID, *ids, EOS_ID], ["frame", *classes, "end"])


def make_batch(recipe: Recipe, world: World, encode: Encoder, step: int) -> Batch:
    """The batch of step 1, 2, …: kinds in the shares of the mixture, samples never cut."""
    stage = recipe.stage(step)
    n_rows = recipe.tokens_per_step // stage.length
    rows: list[list[Encoded]] = [[] for _ in range(n_rows)]
    room = [stage.length] * n_rows
    stream = Stream(f"recipe {recipe.seed}/batch {step}")
    options: dict[str, dict[str, Any]] = {
        "doc": {"n_facts": stage.n_facts, "n_turns": stage.n_turns},
        "text": {"characters": stage.length},
    }
    # long samples first, so that they find room; seeds of the recipe shift the index range
    first = (recipe.seed * 10_000_000 + step) * SAMPLES_PER_STEP
    for kind in sorted(recipe.mixture, key=["doc", "text", "world", "sum"].index):
        wanted = recipe.mixture[kind] * recipe.tokens_per_step
        kind_options = options.get(kind, {})
        _fill(
            lambda i, kind=kind, o=kind_options: encode(world.sample(kind, first + i, **o)),
            wanted,
            rows,
            room,
            stream,
        )
    ids = np.full((n_rows, stage.length), PAD_ID, dtype=np.int64)
    weights = np.zeros((n_rows, stage.length), dtype=np.float32)
    for row, samples in enumerate(rows):
        place = 0
        for sample in _shuffled(samples, stream):
            end = place + len(sample.ids)
            ids[row, place:end] = sample.ids
            weights[row, place:end] = [
                0.0 if word_class == "frame" else recipe.weight(word_class)
                for word_class in sample.classes
            ]
            place = end
    return Batch(ids, weights)


def _fill(
    sample_at: Callable[[int], Encoded],
    wanted: float,
    rows: list[list[Encoded]],
    room: list[int],
    stream: Stream,
) -> None:
    """Put samples into the roomiest rows until their share of the tokens is reached."""
    filled, index, failures = 0, 0, 0
    while filled < wanted and failures < TRIES:
        sample = sample_at(index)
        index += 1
        size = len(sample.ids)
        row = max(range(len(rows)), key=room.__getitem__)
        if size > room[row]:
            failures += 1
            continue
        # the last sample goes in with the probability that keeps the share right on average
        if filled + size > wanted and stream.uniform() * size > wanted - filled:
            return
        rows[row].append(sample)
        room[row] -= size
        filled += size


def _shuffled(samples: list[Encoded], stream: Stream) -> list[Encoded]:
    """A random order (Fisher-Yates)."""
    order = list(samples)
    for last in range(len(order) - 1, 0, -1):
        other = stream.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return order
