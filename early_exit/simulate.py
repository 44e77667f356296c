"""Whole threshold sweeps from one cached pass, without decoding anything.

On a given text with exact state (policy `defer`, emission lens or affine) what an exit would emit
does not depend on which tokens left earlier, so agreement and depth at any threshold follow from
the cached scores. Under `propagate` the same curve is optimistic; `decode.compare` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from early_exit.accounting import Tally, dynamax_speedup
from early_exit.adapters.base import Costs
from early_exit.criteria import get_criterion
from workbench.errors import ConfigError, DataError


@dataclass
class Evidence:
    """Scores and outcomes of every token at every exit, as arrays."""

    layers: int
    """Blocks of the model."""
    exits: tuple[int, ...]
    """Block of each exit."""
    scores: Float[np.ndarray, "n exits"]
    """The criterion's score."""
    agree: Bool[np.ndarray, "n exits"]
    """Whether the exit emits the full model's token."""
    document: Int[np.ndarray, " n"]
    """Document number per token."""
    position: Int[np.ndarray, " n"]
    """Position in the document per token."""
    criterion: str = "gate"
    """Name, for the cost of asking."""
    emission: str = "lens"
    """Name, for the cost of emitting."""

    @classmethod
    def of(
        cls,
        measures: dict[str, Any],
        features: dict[str, Any],
        exits: Sequence[int],
        layers: int,
        criterion: str,
        emission: str = "lens",
    ) -> Evidence:
        """From the output of `features.measure` and `features.collect`."""
        get_criterion(criterion)
        agree = (measures["token"] == measures["answer"][:, None]).numpy()
        return cls(
            layers,
            tuple(exits),
            measures[criterion].double().numpy(),
            agree,
            features["document"].numpy(),
            features["position"].numpy(),
            criterion,
            emission,
        )

    def leave(self, threshold: float | Sequence[float]) -> Int[np.ndarray, " n"]:
        """Index of the first exit with score > λ; `len(exits)` for the full depth."""
        limit = np.broadcast_to(np.asarray(threshold, dtype=float), (len(self.exits),))
        fires = (self.scores > limit) & (limit < 1)
        return np.where(fires.any(1), fires.argmax(1), len(self.exits))

    def correct(self, index: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether the emitted token is the full model's."""
        padded = np.concatenate([self.agree, np.ones((len(self.agree), 1), bool)], axis=1)
        return padded[np.arange(len(index)), index]

    def depth(self, index: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Blocks run before the token is emitted."""
        extra = 1 if self.emission == "last_block" else 0
        return np.array([*(e + 1 + extra for e in self.exits), self.layers])[index]

    def tally(self, index: Int[np.ndarray, " n"], policy: str = "propagate") -> Tally:
        """What decoding would execute for these decisions."""
        depth = self.depth(index)
        context = self.position + 1
        full = index == len(self.exits)
        asked = np.minimum(index + 1, len(self.exits))
        kind = get_criterion(self.criterion).looks_at
        on_logits = kind == "logits"
        heads = asked + full if on_logits else np.ones_like(asked)
        emitted = asked if on_logits else (~full).astype(int)
        run = np.full_like(depth, self.layers) if policy == "defer" else depth
        return Tally(
            tokens=len(index),
            latency_blocks=float(depth.sum()),
            blocks=float(run.sum()),
            context=float((run * context).sum()),
            fills=float((self.layers - depth).sum()) if policy == "propagate" else 0.0,
            gates=float(asked.sum()) if kind == "gate" else 0.0,
            vocabularies=float(heads.sum()),
            translations=float(emitted.sum()) if self.emission == "affine" else 0.0,
            full_context=float(context.sum()),
        )


def threshold_grid(scores: Float[np.ndarray, "n exits"], count: int = 100) -> list[float]:
    """Quantiles of the scores, with -1 (always leave) and 1 (never) at the ends.

    Raises:
        DataError: there are no scores.
    """
    if scores.size == 0:
        raise DataError("no token to sweep over; raise --test-tokens")
    inner = np.unique(np.quantile(scores, np.linspace(0, 1, count - 1)))
    return [-1.0, *(float(v) for v in inner if 0 <= v < 1), 1.0]


def document_sums(
    values: Float[np.ndarray, " n"], document: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " documents"]:
    """Sum per document."""
    return np.bincount(document, weights=values.astype(float), minlength=int(document.max()) + 1)


def bootstrap_ratio(
    hits: Float[np.ndarray, "documents ..."],
    counts: Float[np.ndarray, " documents"],
    generator: np.random.Generator,
    resamples: int = 400,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of Σ hits / Σ counts when documents are drawn anew (tokens are not
    independent, documents are).
    """
    n = len(counts)
    weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    below = weights @ counts
    above = np.tensordot(weights, hits, axes=1)
    ratio = above / below.reshape(-1, *[1] * (above.ndim - 1))
    return np.quantile(ratio, 0.025, axis=0), np.quantile(ratio, 0.975, axis=0)


def curve(
    evidence: Evidence,
    thresholds: Sequence[float],
    costs: Costs,
    width: int,
    generator: np.random.Generator,
    *,
    family: str = "attention",
) -> list[dict[str, Any]]:
    """One row per threshold: agreement with its interval, and every speed-up but time."""
    counts = document_sums(np.ones(len(evidence.document)), evidence.document)
    used = counts > 0
    rows, hits = [], []
    for threshold in thresholds:
        index = evidence.leave(threshold)
        correct = evidence.correct(index)
        hits.append(document_sums(correct, evidence.document)[used])
        fill = evidence.tally(index, "propagate").speedups(costs, width)
        defer = evidence.tally(index, "defer").speedups(costs, width)
        left = [evidence.exits[i] for i in index if i < len(evidence.exits)]
        shares = np.bincount(index, minlength=len(evidence.exits) + 1) / len(index)
        rows.append(
            {
                "threshold": threshold,
                "agreement": float(correct.mean()),
                "low": 0.0,
                "high": 0.0,
                "exited": float((index < len(evidence.exits)).mean()),
                "mean_blocks": fill["mean_blocks"],
                "speedup_blocks": fill["speedup_blocks"],
                "speedup_arithmetic_propagate": fill["speedup_arithmetic"],
                "speedup_arithmetic_defer": defer["speedup_arithmetic"],
                "speedup_dynamax": dynamax_speedup(left, len(index), evidence.layers, family),
                **{f"left_at_{e}": float(s) for e, s in zip(evidence.exits, shares, strict=False)},
            }
        )
    low, high = bootstrap_ratio(np.stack(hits, axis=1), counts[used], generator)
    for row, a, b in zip(rows, low, high, strict=True):
        row["low"], row["high"] = float(a), float(b)
    return rows


def threshold_for_speedup(evidence: Evidence, speedup: float, thresholds: Sequence[float]) -> float:
    """The largest threshold of the grid whose speed-up in blocks is at least `speedup`.

    Raises:
        ConfigError: even leaving at the first exit every time is slower than that.
    """
    for threshold in sorted(thresholds, reverse=True):
        depth = evidence.depth(evidence.leave(threshold))
        if evidence.layers / depth.mean() >= speedup:
            return float(threshold)
    bound = evidence.layers / evidence.depth(np.zeros(1, dtype=int))[0]
    raise ConfigError(
        f"a speed-up of {speedup:g} in blocks is out of reach: leaving at block "
        f"{evidence.exits[0]} every time gives {bound:.3g}; lower --speedups or add earlier exits"
    )


def fixed_rows(evidence: Evidence, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Baseline: every token leaves at the same exit."""
    rows = []
    for number, layer in enumerate(evidence.exits):
        index = np.full(len(evidence.agree), number)
        rows.append(_row(f"fixed exit {layer}", evidence, index, generator))
    return rows


def oracle_row(evidence: Evidence, generator: np.random.Generator) -> dict[str, Any]:
    """Bound: every token leaves at the first exit that agrees with the full model."""
    index = np.where(evidence.agree.any(1), evidence.agree.argmax(1), len(evidence.exits))
    return _row("oracle", evidence, index, generator)


def _row(
    method: str, evidence: Evidence, index: np.ndarray, generator: np.random.Generator
) -> dict[str, Any]:
    counts = document_sums(np.ones(len(index)), evidence.document)
    hits = document_sums(evidence.correct(index), evidence.document)[counts > 0]
    low, high = bootstrap_ratio(hits, counts[counts > 0], generator)
    depth = float(evidence.depth(index).mean())
    return {
        "method": method,
        "agreement": float(evidence.correct(index).mean()),
        "low": float(low),
        "high": float(high),
        "mean_blocks": depth,
        "speedup_blocks": evidence.layers / depth,
    }


def pruning_rows(
    hits: Float[np.ndarray, "documents kept"],
    counts: Float[np.ndarray, " documents"],
    layers: int,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    """Baseline: the model cut to its first k blocks and its last one."""
    low, high = bootstrap_ratio(hits, counts, generator)
    return [
        {
            "method": f"pruned to {k + 1} blocks",
            "agreement": float(hits[:, k - 1].sum() / counts.sum()),
            "low": float(low[k - 1]),
            "high": float(high[k - 1]),
            "mean_blocks": float(k + 1),
            "speedup_blocks": layers / (k + 1),
        }
        for k in range(1, layers - 1)
    ]


def gate_quality(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], threshold: float
) -> dict[str, float | None]:
    """AUROC, Brier score, expected calibration error (15 equal bins) and F1 of one gate.

    AUROC is None when all labels are equal.
    """
    from sklearn.metrics import brier_score_loss, f1_score, roc_auc_score

    both = bool(positive.any() and not positive.all())
    return {
        "auroc": float(roc_auc_score(positive, scores)) if both else None,
        "brier": float(brier_score_loss(positive, np.clip(scores, 0, 1))) if both else None,
        "ece": calibration_error(scores, positive),
        "f1": float(f1_score(positive, scores > threshold, zero_division=0.0)),
    }


def calibration_error(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], bins: int = 15
) -> float:
    """Σ_b n_b/n · |share of positives - mean score| over equal-width bins."""
    which = np.clip((scores * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.bincount(which, weights=positive - scores, minlength=bins)
    return float(np.abs(gap)[count > 0].sum() / len(scores))


def torch_array(value: torch.Tensor) -> np.ndarray:
    """A tensor as a double-precision array."""
    return value.double().numpy()
