"""The high-reliability region, sample-size bands, who is admitted and why not.   [SDM v2]"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

REASONS = ("admitted", "q0", "d0", "flip", "no_region", "below_qmin", "below_psi", "not_singleton")
"""Reason codes in the order in which they are tried; the position is the stored code."""

REASON_TEXT = {
    "admitted": "inside the region",
    "q0": "nearest support point disagrees: out of distribution, add data like this",
    "d0": "farther from the support than the calibration points (after the sample-size band)",
    "flip": "the activation and the logits prefer different classes",
    "no_region": "no region exists at this target accuracy; lower it or add data",
    "below_qmin": "too few agreeing neighbours for the region",
    "below_psi": "probability below the threshold of the predicted class",
    "not_singleton": "another class passes its threshold too",
}


@dataclass(frozen=True)
class Region:
    """The high-reliability region: q' >= minimum and exactly one class above its threshold."""

    target_accuracy: float
    """α', the accuracy asked for per class."""
    minimum: float
    """q'_min; infinite when there is no region."""
    thresholds: tuple[float, ...]
    """ψ_c per class; empty when there is no region."""
    kept: tuple[int, ...] = ()
    """Calibration points per true class with q' >= q'_min."""
    message: str = ""
    """Why there is no region and what would give one; empty when there is one."""

    @property
    def exists(self) -> bool:
        """Whether anything can be admitted."""
        return math.isfinite(self.minimum)

    def state(self) -> dict[str, Any]:
        """The fields, for a file."""
        return asdict(self)


def tail_rank(target_accuracy: float, n: int) -> int:
    """⌊(1 − α') n⌋ in exact arithmetic.

    In floating point (1 − 0.9)·10 is 0.99…98 and rounds down to 0; here it is 1. 1 − α' is taken
    to ten decimals.
    """
    return math.floor(_tail(target_accuracy) * n)


def _tail(target_accuracy: float) -> Fraction:
    return Fraction(str(round(1 - target_accuracy, 10)))


def _ranks(target_accuracy: float, n: np.ndarray, finite_sample: bool) -> np.ndarray:
    """0-based position of the order statistic for each class size; −1 where there is none."""
    tail = _tail(target_accuracy)
    if finite_sample:  # conformal rank ⌊tail (n+1)⌋, counted from 1
        return np.minimum(tail.numerator * (n + 1) // tail.denominator, n) - 1
    return np.minimum(tail.numerator * n // tail.denominator, n - 1)


def region_search(
    rescaled: Float[Tensor, " points"],
    probability_of_label: Float[Tensor, " points"],
    labels: Int[Tensor, " points"],
    *,
    n_classes: int,
    target_accuracy: float,
    finite_sample: bool = False,
) -> Region:
    """The loosest threshold on q' above which every class keeps its accuracy, by one sweep.

    For the distinct values t of q' with ⌊t⌋ >= 1, ascending: among the points with q' >= t let
    ψ_c be the order statistic of sdm_y of class c at 0-based rank min(⌊(1−α')n_c⌋, n_c − 1);
    take the first t with ψ_c >= α' for all c. ψ_c >= α' exactly when at most that many points of
    the class lie below α', so counting from the top of one sort is enough: O(N log N).

    `finite_sample` uses the conformal rank ⌊(1−α')(n_c+1)⌋ counted from 1, which covers at α'
    under exchangeability.
    """
    order, starts, counts = _sweep(rescaled, labels, n_classes)
    p = probability_of_label.double().cpu().numpy()[order]
    y = labels.cpu().numpy()[order]
    below = _suffix_counts(y, p < target_accuracy, n_classes)[starts]  # (thresholds, classes)
    rank = _ranks(target_accuracy, counts, finite_sample)
    feasible = ((counts > 0) & (rank >= 0) & (below <= rank)).all(1)
    if not feasible.any():
        message = _explain_no_region(
            rescaled, probability_of_label, labels, n_classes, target_accuracy, finite_sample
        )
        return Region(target_accuracy, math.inf, (), (), message)
    first = int(np.argmax(feasible))
    start = int(starts[first])
    thresholds = tuple(
        float(np.sort(p[start:][y[start:] == c])[rank[first, c]]) for c in range(n_classes)
    )
    minimum = float(rescaled.double().cpu().numpy()[order][start])
    return Region(target_accuracy, minimum, thresholds, tuple(int(n) for n in counts[first]))


def _sweep(
    rescaled: Tensor, labels: Tensor, n_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates in ascending q', where each distinct value starts, class counts from there up."""
    rho = rescaled.double().cpu().numpy()
    order = np.argsort(rho, kind="stable")
    order = order[rho[order] >= 1]
    ascending = rho[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]][: len(ascending)])
    y = labels.cpu().numpy()[order]
    return order, starts, _suffix_counts(y, np.ones(len(y), dtype=bool), n_classes)[starts]


def _suffix_counts(y: np.ndarray, flag: np.ndarray, n_classes: int) -> np.ndarray:
    """How many flagged points of each class stand at or after each position."""
    one_hot = (y[:, None] == np.arange(n_classes)) & flag[:, None]
    return one_hot[::-1].cumsum(0)[::-1].astype(np.int64)


def region_search_reference(
    rescaled: Float[Tensor, " points"],
    probability_of_label: Float[Tensor, " points"],
    labels: Int[Tensor, " points"],
    *,
    n_classes: int,
    target_accuracy: float,
) -> Region:
    """The same by trying every threshold, word for word. For reading and tests."""
    rho, p, y = rescaled.tolist(), probability_of_label.tolist(), labels.tolist()
    for t in sorted({value for value in rho if math.floor(value) >= 1}):
        psi, kept = [], []
        for c in range(n_classes):
            values = sorted(p[n] for n in range(len(rho)) if rho[n] >= t and y[n] == c)
            k = min(tail_rank(target_accuracy, len(values)), len(values) - 1)
            psi.append(values[k] if values else 0.0)
            kept.append(len(values))
        if all(value >= target_accuracy for value in psi):
            return Region(target_accuracy, t, tuple(psi), tuple(kept))
    return Region(target_accuracy, math.inf, ())


def _explain_no_region(
    rescaled: Tensor,
    probability: Tensor,
    labels: Tensor,
    n_classes: int,
    target_accuracy: float,
    finite_sample: bool,
) -> str:
    """Which class blocks, the best worst-class threshold, the largest α' that would do."""
    order, starts, counts = _sweep(rescaled, labels, n_classes)
    if len(order) == 0:
        return "no region: every calibration point is out of distribution (q' < 1)"
    missing = [c for c in range(n_classes) if counts[0, c] == 0]
    if missing:
        return f"no region: class {missing[0]} has no calibration point with q' >= 1"
    p = probability.double().cpu().numpy()[order]
    y = labels.cpu().numpy()[order]
    best, blocking = -1.0, 0
    for i in np.unique(np.linspace(0, len(starts) - 1, 512).astype(int)):  # at most 512 thresholds
        if (counts[i] == 0).any():
            continue
        rank = np.maximum(_ranks(target_accuracy, counts[i], finite_sample), 0)
        tail_p, tail_y = p[starts[i] :], y[starts[i] :]
        psi = [float(np.sort(tail_p[tail_y == c])[rank[c]]) for c in range(n_classes)]
        if min(psi) > best:
            best, blocking = min(psi), int(np.argmin(psi))
    largest = _largest_target(p, y, starts, counts, target_accuracy, finite_sample)
    hint = (
        f"the largest target accuracy with a region is {largest:.3f}"
        if largest > 0
        else "no target accuracy above 0 has one"
    )
    return (
        f"no region at target accuracy {target_accuracy:g}: class {blocking} blocks, "
        f"best worst-class threshold {best:.3f}; {hint}"
    )


def _largest_target(
    p: np.ndarray,
    y: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    upper: float,
    finite_sample: bool,
) -> float:
    """The largest α' on a grid of 0.001 below `upper` with a region (feasibility is monotone)."""
    low, high = 0, math.ceil(upper * 1000)
    while high - low > 1:
        middle = (low + high) // 2
        target = middle / 1000
        below = _suffix_counts(y, p < target, counts.shape[1])[starts]
        rank = _ranks(target, counts, finite_sample)
        if ((counts > 0) & (rank >= 0) & (below <= rank)).all(1).any():
            low = middle
        else:
            high = middle
    return low / 1000


def dkw_epsilon(n: Int[Tensor, " points"], target_accuracy: float) -> Float[Tensor, " points"]:
    """Half-width of the Dvoretzky–Kiefer–Wolfowitz band of an empirical distribution.

    ε = sqrt(ln(2/(1−α')) / (2n)), 1 for n = 0.

    >>> dkw_epsilon(torch.tensor([100, 0]), 0.95)
    tensor([0.1358, 1.0000], dtype=torch.float64)
    """
    width = torch.sqrt(math.log(2 / (1 - target_accuracy)) / (2 * n.double()))
    return torch.where(n > 0, width, torch.ones_like(width))


def admit(
    similarity: Float[Tensor, " points"],
    distance: Float[Tensor, " points"],
    rescaled: Float[Tensor, " points"],
    probabilities: Float[Tensor, "points classes"],
    predictions: Int[Tensor, " points"],
    region: Region,
) -> Int[Tensor, " points"]:
    """Reason code of each point (position in REASONS; 0 = admitted).

    Admitted iff ⌊q'⌋ >= 1, q' >= q'_min and {c : sdm_c >= ψ_c} = {ŷ}.
    """
    psi = torch.tensor(region.thresholds or (math.inf,) * probabilities.shape[1]).double()
    passes: Bool[Tensor, "points classes"] = probabilities >= psi.to(probabilities.device)
    own = passes.gather(1, predictions[:, None]).squeeze(1)
    top = probabilities.gather(1, predictions[:, None]).squeeze(1)
    rejects = {
        "q0": similarity < 1,
        "d0": distance <= 0,
        "flip": top < probabilities.max(1).values,
        "no_region": torch.full_like(own, not region.exists),
        "below_qmin": (rescaled < 1) | (rescaled < region.minimum),
        "below_psi": ~own,
        "not_singleton": passes.sum(1) > 1,
    }
    code = torch.zeros_like(predictions)
    for name in reversed(REASONS[1:]):
        code = torch.where(rejects[name], REASONS.index(name), code)
    return code
