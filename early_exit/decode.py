"""Settings side by side in real decoding: the same text, interleaved, agreement and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from early_exit.accounting import Tally
from early_exit.adapters.base import Adapter
from early_exit.data import Documents
from early_exit.engine import Engine
from early_exit.features import Watch
from early_exit.heads import Exits
from early_exit.simulate import bootstrap_ratio
from workbench.errors import DataError


@dataclass(frozen=True)
class Setting:
    """One way to decode."""

    name: str
    """Label in tables."""
    threshold: float = 1.0
    """λ of all exits; 1 = the full model."""
    policy: str = "defer"
    """State policy."""
    criterion: str = "gate"
    """Score."""


def choose_documents(documents: Documents, n: int, prompt: int, new: int) -> list[int]:
    """Numbers of `n` documents long enough for prompt and continuation, spread over the sources.

    Raises:
        DataError: none is long enough.
    """
    long = [i for i, ids in enumerate(documents.ids) if len(ids) >= prompt + new]
    if not long:
        longest = max(map(len, documents.ids), default=0)
        raise DataError(
            f"no document has {prompt} prompt and {new} new tokens, the longest has {longest}; "
            "lower --prompt-tokens or --new-tokens"
        )
    by_source: list[list[int]] = [[] for _ in documents.sources]
    for i in long:
        by_source[documents.source[i]].append(i)
    picked: list[int] = []
    for rank in range(n):
        picked += [group[rank] for group in by_source if rank < len(group)]
    return picked[:n]


def compare(
    adapter: Adapter,
    exits: Exits,
    settings: Sequence[Setting],
    documents: Documents,
    numbers: Sequence[int],
    *,
    prompt: int,
    new: int,
    watch: Watch,
) -> list[dict[str, Any]]:
    """Decode the same stretches with the full model and every setting, one after the other.

    Each setting is fed the document's own tokens, so all see the same text; "agreement" is the
    share of positions where it would have emitted the full model's token. Returns per setting and
    document: hits, tokens, seconds and what was executed.
    """
    engines = {
        s.name: Engine(
            adapter, exits, criterion=s.criterion, threshold=s.threshold, policy=s.policy
        )
        for s in settings
    }
    full = Engine(adapter, exits, criterion="fixed", threshold=1.0)
    rows: list[dict[str, Any]] = []
    for turn, number in enumerate(watch(numbers, "decoding")):
        ids = documents.ids[number]
        start = torch.tensor(ids[:prompt])
        forced = ids[prompt : prompt + new - 1]
        if turn == 0:  # the first calls pay for memory and kernel set-up
            for engine in [full, *engines.values()]:
                engine.decode(start, 4, forced=forced[:4])
        reference = full.decode(start, new, forced=forced)
        for name, engine in engines.items():
            done = engine.decode(start, new, forced=forced)
            same = sum(a == b for a, b in zip(done.tokens, reference.tokens, strict=True))
            rows.append(
                {
                    "setting": name,
                    "document": number,
                    "hits": same,
                    "tokens": len(done.tokens),
                    "exited": sum(e < adapter.n_layers - 1 for e in done.exit_layers),
                    "tally": vars(done.tally),
                    "dynamax": done.dynamax(
                        adapter.n_layers, adapter.family, engine.policy == "propagate"
                    ),
                    "seconds": done.seconds,
                    "full_seconds": reference.seconds,
                    "cpu_seconds": done.cpu_seconds,
                    "full_cpu_seconds": reference.cpu_seconds,
                }
            )
    return rows


def summarise(
    rows: Sequence[dict[str, Any]],
    settings: Sequence[Setting],
    adapter: Adapter,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    """One row per setting: agreement with interval and the three accountings."""
    costs = adapter.costs()
    table = []
    for setting in settings:
        own = [row for row in rows if row["setting"] == setting.name]
        hits = np.array([row["hits"] for row in own], dtype=float)
        counts = np.array([row["tokens"] for row in own], dtype=float)
        low, high = bootstrap_ratio(hits, counts, generator)
        total = Tally()
        for row in own:
            total = total + Tally(**row["tally"])
        speed = total.speedups(costs, adapter.width)
        ratio = [row["full_seconds"] / row["seconds"] for row in own]
        table.append(
            {
                "setting": setting.name,
                "policy": setting.policy,
                "threshold": setting.threshold,
                "agreement": float(hits.sum() / counts.sum()),
                "low": float(low),
                "high": float(high),
                "exited": float(sum(row["exited"] for row in own) / counts.sum()),
                "mean_blocks": speed["mean_blocks"],
                "speedup_blocks": speed["speedup_blocks"],
                "speedup_work": speed["speedup_work"],
                "speedup_arithmetic": speed["speedup_arithmetic"],
                "speedup_seconds": float(np.median(ratio)),
                "seconds_low": float(np.quantile(ratio, 0.25)),
                "seconds_high": float(np.quantile(ratio, 0.75)),
                "speedup_cpu_seconds": float(
                    np.median([row["full_cpu_seconds"] / row["cpu_seconds"] for row in own])
                ),
                "speedup_dynamax": float(np.mean([row["dynamax"] for row in own])),
                "tokens": int(counts.sum()),
            }
        )
    return table


def free_running(
    adapter: Adapter,
    exits: Exits,
    settings: Sequence[Setting],
    documents: Documents,
    numbers: Sequence[int],
    *,
    prompt: int,
    new: int,
    watch: Watch,
) -> list[dict[str, Any]]:
    """Each setting continues on its own tokens: share of positions equal to the full model's text,
    and mean length of the common beginning.
    """
    full = Engine(adapter, exits, criterion="fixed", threshold=1.0)
    engines = [
        Engine(adapter, exits, criterion=s.criterion, threshold=s.threshold, policy=s.policy)
        for s in settings
    ]
    same = np.zeros((len(settings), len(numbers)))
    common = np.zeros((len(settings), len(numbers)))
    for column, number in enumerate(watch(list(numbers), "free-running texts")):
        start = torch.tensor(documents.ids[number][:prompt])
        reference = full.decode(start, new).tokens
        for row, engine in enumerate(engines):
            tokens = engine.decode(start, new).tokens
            equal = np.array(tokens) == np.array(reference)
            same[row, column] = equal.mean()
            common[row, column] = new if equal.all() else equal.argmin()
    return [
        {
            "setting": setting.name,
            "policy": setting.policy,
            "identical_positions": float(same[i].mean()),
            "common_prefix_tokens": float(common[i].mean()),
            "texts": len(numbers),
            "new_tokens": new,
        }
        for i, setting in enumerate(settings)
    ]
