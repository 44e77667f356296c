"""How much was saved, counted three ways: blocks, arithmetic, time. Nothing is imputed.

    S_blocks     = L / mean blocks run before a token was emitted         (latency)
    S_work       = L / mean blocks run in all, deferred ones included     (work)
    S_arithmetic = full model's multiply-accumulates / executed ones (blocks, fills, checks, heads)
    S_time       = seconds of the full model / seconds, same process, interleaved, medians

`dynamax_speedup` is the published formula, kept for comparison: it credits blocks that are run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from workbench.errors import ConfigError

if TYPE_CHECKING:
    from early_exit.adapters.base import Costs


@dataclass
class Tally:
    """What was executed for a number of decoded tokens (prefill is counted apart)."""

    tokens: float = 0
    """Tokens emitted."""
    latency_blocks: float = 0
    """Blocks a token passed before it was emitted, summed over tokens."""
    blocks: float = 0
    """Block executions in all (a call over T tokens counts T), deferred ones included."""
    context: float = 0
    """Sum over block executions of the tokens attended to."""
    fills: float = 0
    """Blocks whose state was filled without running them."""
    gates: float = 0
    """Gate evaluations."""
    vocabularies: float = 0
    """Products with the output head: checks that look at the vocabulary, and emissions."""
    translations: float = 0
    """Products with a d × d translator of an affine emission."""
    full_context: float = 0
    """Sum over tokens of the tokens a full model would attend to (per block)."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def arithmetic(self, costs: Costs, width: int) -> float:
        """Multiply-accumulates executed."""
        return (
            self.blocks * (costs.block + costs.mixer)
            + self.context * costs.context
            + self.fills * costs.fill
            + self.gates * costs.gate
            + self.vocabularies * costs.vocabulary
            + self.translations * width**2
        )

    def full_arithmetic(self, costs: Costs) -> float:
        """Multiply-accumulates of the full model for the same tokens."""
        per_token = costs.layers * (costs.block + costs.mixer) + costs.vocabulary
        return self.tokens * per_token + costs.layers * costs.context * self.full_context

    def speedups(self, costs: Costs, width: int) -> dict[str, float]:
        """S_blocks, S_work and S_arithmetic, and the means behind them.

        Raises:
            ConfigError: no token was decoded.
        """
        if self.tokens <= 0:
            raise ConfigError("no token was decoded, there is nothing to account for")
        return {
            "mean_blocks": self.latency_blocks / self.tokens,
            "speedup_blocks": costs.layers * self.tokens / self.latency_blocks,
            "speedup_work": costs.layers * self.tokens / self.blocks,
            "speedup_arithmetic": self.full_arithmetic(costs) / self.arithmetic(costs, width),
        }


def block_bound(layers: int, exit_layer: int, emission: str, fill_share: float = 0.0) -> float:
    """Speed-up in blocks when every token leaves after block `exit_layer`.

    L / (e + 1 + [last block] + κ · filled blocks); 32/17 for Mistral-7B, e = 15, `last_block`.
    """
    extra = 1 if emission == "last_block" else 0
    filled = layers - (exit_layer + 1) - extra
    return layers / (exit_layer + 1 + extra + fill_share * filled)


def dynamax_speedup(
    exit_layers: Sequence[int], tokens: int, layers: int, family: str, recompute: bool = False
) -> float:
    """The published formula S = total / (total - ignored + penalty)    [DYNAMAX, public code]

    total = L·tokens; ignored = Σ(L - x + 1) for attention and Σ(L - x) for Mamba with x = e + 1;
    penalty = ρ·Σ(L - x + 1), ρ = 4/24 or 9/26, if states are recomputed. It credits L - e blocks
    (attention) where L - e - 2 are skipped. `exit_layers` lists the exited tokens only.
    """
    if family not in ("attention", "mamba"):
        raise ConfigError(f"family {family!r}: the formula is defined for attention and mamba")
    if tokens <= 0:
        raise ConfigError("no token was decoded, there is nothing to account for")
    total = layers * tokens
    saved = np.asarray([layers - (e + 1) for e in exit_layers], dtype=float)
    ignored = float((saved + (1 if family == "attention" else 0)).sum())
    share = 4 / 24 if family == "attention" else 9 / 26
    penalty = share * float((saved + 1).sum()) if recompute else 0.0
    rest = total - ignored + penalty
    return total / rest if rest > 0 else math.inf  # it can credit more blocks than there are
