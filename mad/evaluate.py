"""Accuracy and loss of a model on a split, counted the way each number is used.

Micro accuracy (correct / scored over the whole split) is the default. The published code reports
macro accuracy over classes per batch, averaged over batches: `accuracy_macro_batch` follows it for
comparison with published tables only.
"""

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from mad.tasks.task import IGNORE
from workbench.errors import DataError


@dataclass(frozen=True)
class Score:
    """What one pass over a split yields; accuracies are NaN when nothing is scored."""

    accuracy: float
    """Correct / scored positions over the whole split (micro)."""
    low: float
    """Lower end of the 95 % interval of `accuracy`."""
    high: float
    """Upper end of the 95 % interval of `accuracy`."""
    accuracy_macro_batch: float
    """Mean over batches of the mean over classes of per-class recall, as published code counts."""
    accuracy_sequence: float
    """Share of rows in which every scored position is right."""
    nll_nats: float
    """Mean negative log-likelihood of the scored targets."""
    n_scored: int
    """Number of scored positions."""
    n_rows: int
    """Number of rows."""
    correct: Int[Tensor, " rows"] = field(repr=False, compare=False)
    """Right answers of each row."""
    scored: Int[Tensor, " rows"] = field(repr=False, compare=False)
    """Scored positions of each row."""

    def named(self, prefix: str) -> dict[str, float]:
        """The numbers under names such as `test/accuracy`."""
        return {f"{prefix}/{f.name}": getattr(self, f.name) for f in fields(self) if f.compare}


def macro_accuracy(
    predictions: Int[Tensor, " n"], targets: Int[Tensor, " n"], n_classes: int
) -> float:
    """Mean over classes of the share of a class's targets that is predicted right.

    A class that is predicted but is no target counts as 0; a class that is neither does not count.

    >>> round(macro_accuracy(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]), 3), 3)
    0.333
    """
    right = torch.bincount(targets[predictions == targets], minlength=n_classes)
    support = torch.bincount(targets, minlength=n_classes)
    present = (support + torch.bincount(predictions, minlength=n_classes)) > 0
    recall = right.double() / support.clamp(min=1)
    return recall[present].mean().item() if bool(present.any()) else math.nan


def row_interval(
    correct: Int[Tensor, " rows"], scored: Int[Tensor, " rows"]
) -> tuple[float, float]:
    """95 % interval of Σ correct / Σ scored when the positions of a row depend on one another.

    Wilson's interval at n / max(1, D) positions. D is the design effect, the variance of the ratio
    over rows as a multiple of the binomial one [Kish 1965, ch. 5.4].
    """
    from scipy.stats import binomtest

    n, k = int(scored.sum()), int(correct.sum())
    if n == 0:
        return math.nan, math.nan
    p, rows = k / n, len(scored)
    design = 1.0
    if 0 < k < n and rows > 1:
        residual = correct.double() - p * scored.double()
        variance = residual.square().sum().item() / n**2 * rows / (rows - 1)
        design = max(1.0, variance / (p * (1 - p) / n))
    effective = max(1, round(n / design))
    interval = binomtest(round(p * effective), effective).proportion_ci(method="wilson")
    return min(float(interval.low), p), max(float(interval.high), p)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    inputs: Int[Tensor, "rows time"],
    targets: Int[Tensor, "rows time"],
    *,
    batch_size: int = 128,
) -> Score:
    """Scores of `model` on aligned inputs and targets, in batches (which the macro score sees).

    Raises:
        DataError: the arrays are empty or of unequal shape.
    """
    if inputs.shape != targets.shape or not len(inputs):
        raise DataError(
            f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}: "
            "expected two equal shapes with at least one row"
        )
    training = model.training
    model.eval()
    correct, macro, nats = [], [], 0.0
    for at in range(0, len(inputs), batch_size):
        logits = model(inputs[at : at + batch_size]).float()  # (B, L, V)
        target = targets[at : at + batch_size].long()
        scored = target != IGNORE
        prediction = logits.argmax(dim=-1)
        correct.append(((prediction == target) & scored).sum(dim=1).cpu())
        if bool(scored.any()):
            macro.append(macro_accuracy(prediction[scored], target[scored], logits.shape[-1]))
            nats += F.cross_entropy(logits[scored], target[scored], reduction="sum").item()
    model.train(training)

    right, asked = torch.cat(correct), (targets != IGNORE).sum(dim=1).cpu()
    n = int(asked.sum())
    low, high = row_interval(right, asked)
    return Score(
        accuracy=int(right.sum()) / n if n else math.nan,
        low=low,
        high=high,
        accuracy_macro_batch=math.fsum(macro) / len(macro) if macro else math.nan,
        accuracy_sequence=(right == asked)[asked > 0].double().mean().item() if n else math.nan,
        nll_nats=nats / n if n else math.nan,
        n_scored=n,
        n_rows=len(inputs),
        correct=right,
        scored=asked,
    )
