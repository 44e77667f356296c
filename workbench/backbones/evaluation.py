"""What a built-in model can do, class by class, on texts that training never saw.

Accuracy is the share of answers, each one token, that are the most probable next token given the
true text before it (for one-token answers the same as greedy decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.backbones.batches import Encoded, Encoder
from workbench.microworld import World, grammar
from workbench.microworld.entropy import floor_of
from workbench.tokenizer import PAD_ID

TOKENS_PER_BATCH = 8192
DOCUMENT_SIZES = (8, 16, 24, 40)
RECALLED = ("place", "owner", "colour")


@dataclass(frozen=True)
class Scored:
    """One sample as the model sees it, per predicted token."""

    classes: list[str]
    """Class of each token after `<s>`."""
    nats: np.ndarray
    """-log p of each token given those before it."""
    predicted: np.ndarray
    """The most probable token at each place."""
    ids: np.ndarray
    """The true token at each place."""

    def hits(self, *prefixes: str) -> list[bool]:
        """Whether each token whose class starts with one of the prefixes was predicted."""
        return [
            bool(self.predicted[i] == self.ids[i])
            for i, word_class in enumerate(self.classes)
            if word_class.startswith(prefixes)
        ]


@torch.no_grad()
def score(model: Any, samples: Sequence[Encoded]) -> list[Scored]:
    """Score samples one by one (in padded batches of similar length)."""
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    scored: list[Scored | None] = [None] * len(samples)
    while order:
        longest = len(samples[order[-1]].ids)
        chosen = order[-max(1, TOKENS_PER_BATCH // longest) :]
        del order[-len(chosen) :]
        ids = torch.full((len(chosen), longest), PAD_ID)
        for row, index in enumerate(chosen):
            ids[row, : len(samples[index].ids)] = torch.tensor(samples[index].ids)
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].to(device).flatten(), reduction="none"
        ).view(len(chosen), -1)
        predicted = logits.argmax(-1)
        for row, index in enumerate(chosen):
            n = len(samples[index].ids) - 1
            scored[index] = Scored(
                samples[index].classes[1:],
                nats[row, :n].cpu().numpy(),
                predicted[row, :n].cpu().numpy(),
                np.array(samples[index].ids[1:]),
            )
    return [one for one in scored if one is not None]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def document_recall(
    model: Any, encode: Encoder, n_facts: int, n: int = 64, start: int = 10_000_000
) -> float:
    """Accuracy on places, owners and colours of `n` documents with that many facts."""
    world = World()
    samples = [
        world.sample(
            "doc", start + i, "test", n_facts=(n_facts, n_facts), n_turns=(8, 8), empty=0.0
        )
        for i in range(n)
    ]
    scored = score(model, [encode(sample) for sample in samples])
    hits: list[bool] = []
    for sample, one in zip(samples, scored, strict=True):
        for turn in sample.meta["turns"]:
            if turn["kind"] in RECALLED:
                hits.append(bool(one.predicted[turn["word"]] == one.ids[turn["word"]]))
    return _mean(hits)


def _documents(model: Any, encode: Encoder, n: int, figures: dict[str, float]) -> None:
    """Recall by size; rules, refusals and the hard question form over all sizes."""
    world = World()
    refuse = encode.word_ids[grammar.REFUSE]
    hits: dict[str, list[bool]] = {}

    def record(name: str, right: bool) -> None:
        hits.setdefault(name, []).append(right)

    for size in DOCUMENT_SIZES:
        samples = [
            world.sample("doc", size * 1_000_000 + i, "test", n_facts=(size, size), n_turns=(8, 8))
            for i in range(n)
        ]
        scored = score(model, [encode(sample) for sample in samples])
        for sample, one in zip(samples, scored, strict=True):
            rule, has_facts = sample.meta["rules"], bool(sample.meta["facts"])
            for turn in sample.meta["turns"]:
                kind, place = turn["kind"], turn["word"]
                right = bool(one.predicted[place] == one.ids[place])
                if kind in RECALLED:
                    record(f"documents/{size}_facts", right)
                    if rule["capitals"]:
                        record("rules/capitals", right)
                elif kind == "banned":
                    record("rules/ban", right)
                elif kind == "adjective":
                    record("documents/adjective", right)
                elif kind == "absent":
                    record("documents/absent" if has_facts else "documents/none", right)
                if kind != "banned":
                    record("rules/over_refusal", bool(one.predicted[place] == refuse))
                    if rule["banned"]:
                        refused = bool(one.predicted[place] == refuse)
                        record("rules/over_refusal_under_ban", refused)
            for right in one.hits("suffix"):
                record("rules/suffix", right)
    figures.update({name: _mean(values) for name, values in sorted(hits.items())})


def _accuracy(
    model: Any, encode: Encoder, kind: str, n: int, word_class: str, **options: Any
) -> float:
    world = World()
    samples = [encode(world.sample(kind, i, "test", **options)) for i in range(n)]
    return _mean([hit for one in score(model, samples) for hit in one.hits(word_class)])


def _above_floor(model: Any, encode: Encoder, kind: str, n: int, **options: Any) -> float:
    """Nats per token above the grammar's own, on the same samples."""
    world = World()
    samples = [world.sample(kind, 5_000_000 + i, "test", **options) for i in range(n)]
    scored = score(model, [encode(sample) for sample in samples])
    tokens = sum(len(one.nats) for one in scored)
    return float(sum(one.nats.sum() for one in scored)) / tokens - floor_of(samples)


def bits_per_byte(model: Any, encode: Encoder, n: int = 200) -> float:
    """Bits per byte on held-out docstrings of this Python's standard library."""
    world = World()
    samples = [world.sample("text", i, "test", characters=512) for i in range(n)]
    scored = score(model, [encode(sample) for sample in samples])
    # </s> is no byte of the text
    nats = sum(float(one.nats[:-1].sum()) for one in scored)
    size = sum(len(sample.text.encode("utf-8")) for sample in samples)
    return float(nats / np.log(2) / size)


def evaluate_backbone(
    model: Any, *, n: int = 128, tick: Callable[[str], None] | None = None
) -> dict[str, float]:
    """All figures of a built-in model; `n` documents per size, other parts in proportion.

    `tick(name)` is called before each part (for a progress line or an interrupt check).
    """
    encode = Encoder()
    figures: dict[str, float] = {}
    tick = tick or (lambda name: None)
    tick("documents")
    _documents(model, encode, n, figures)
    tick("world")
    for pool in ("stated", "held_out"):
        for form in ("ask", "claim"):
            figures[f"world/{form}_{pool}"] = _accuracy(
                model, encode, "world", n, f"answer:{form}", n_items=4, pool=pool, item=form
            )
    tick("sums")
    for pool, name in (("stated", "seen"), ("held_out", "unseen")):
        for easy, level in ((True, "easy"), (False, "hard")):
            figures[f"sums/{level}_{name}"] = _accuracy(
                model, encode, "sum", 4 * n, "answer", easy=easy, pool=pool
            )
    tick("nats above the floor")
    for kind, count in (("doc", n), ("world", n), ("sum", 4 * n)):
        figures[f"nats_above_floor/{kind}"] = _above_floor(model, encode, kind, count)
    tick("bits per byte")
    figures["text/bits_per_byte"] = bits_per_byte(model, encode, n)
    return figures
