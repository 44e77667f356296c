"""One fitted SDM estimator: what it remembers, and what it says about a new point."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdm.activation import rescaled_similarity, sdm
from sdm.adaptor import Adaptor
from sdm.calibrate import REASONS, Region, admit, dkw_epsilon, region_search
from sdm.cdf import count_below, distance_quantile, per_class_sorted
from sdm.matching import Support, match

SCORE_BLOCK = 1024
"""Points scored at once."""


@dataclass(frozen=True)
class SDMResult:
    """What the estimator says about each point, as arrays of the same length."""

    prediction: np.ndarray
    """Class index ŷ = argmax z'."""
    logits: np.ndarray
    """z', one column per class."""
    probabilities: np.ndarray
    """sdm(z'), one column per class; rows sum to 1."""
    p_lower: np.ndarray
    """sdm of the predicted class with the lower distance quantile."""
    p_centroid: np.ndarray
    """sdm of the predicted class."""
    p_upper: np.ndarray
    """sdm of the predicted class with the upper distance quantile."""
    similarity: np.ndarray
    """q."""
    nearest_distance: np.ndarray
    """d_near, Euclidean (not squared)."""
    distance: np.ndarray
    """d, the quantile in [0, 1]."""
    rescaled_lower: np.ndarray
    """q' with the lower distance quantile."""
    rescaled_centroid: np.ndarray
    """q'."""
    rescaled_upper: np.ndarray
    """q' with the upper distance quantile."""
    effective_size: np.ndarray
    """n̂, calibration points below q' in the class that has fewest of them."""
    nearest: np.ndarray
    """Position of the nearest training point in the support."""
    admitted: np.ndarray
    """Inside the region with the lower estimate: the decision to use."""
    admitted_centroid: np.ndarray
    """Inside the region with the plain estimate (diagnostic)."""
    admitted_upper: np.ndarray
    """Inside the region with the upper estimate (diagnostic)."""
    reason_code: np.ndarray
    """Why not admitted, a position in REASONS."""

    def __len__(self) -> int:
        return len(self.prediction)

    @property
    def reason(self) -> list[str]:
        """The reason codes as words."""
        return [REASONS[code] for code in self.reason_code]

    def select(self, index: np.ndarray) -> SDMResult:
        """The rows of `index` (positions or a mask)."""
        return SDMResult(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class Calibration:
    """The calibration points as the fitted model sees them; enough to recalibrate without them."""

    labels: Int[Tensor, " points"]
    predictions: Int[Tensor, " points"]
    similarity: Float[Tensor, " points"]
    nearest_distance: Float[Tensor, " points"]
    distance: Float[Tensor, " points"]
    probabilities: Float[Tensor, "points classes"]
    rescaled: Float[Tensor, " points"]

    def region(self, target_accuracy: float, *, finite_sample: bool = False) -> Region:
        """The high-reliability region at a target accuracy."""
        own = self.probabilities.gather(1, self.labels[:, None]).squeeze(1)
        return region_search(
            self.rescaled,
            own,
            self.labels,
            n_classes=self.probabilities.shape[1],
            target_accuracy=target_accuracy,
            finite_sample=finite_sample,
        )


@dataclass(frozen=True)
class SDMModel:
    """One fitted iteration: maps, support, calibration arrays and region."""

    adaptor: Adaptor
    support: Support
    calibration: Calibration
    region: Region
    max_similarity: int | None = None
    references: list[Tensor] = field(init=False)
    sizes: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Sort the arrays that scoring looks things up in."""
        known = self.calibration
        n_classes = known.probabilities.shape[1]
        arrays = per_class_sorted(
            known.nearest_distance, known.labels, n_classes, known.similarity > 0
        )
        object.__setattr__(self, "references", arrays)
        object.__setattr__(self, "sizes", per_class_sorted(known.rescaled, known.labels, n_classes))

    def score(self, hidden: Float[Tensor, "points width"]) -> SDMResult:
        """Prediction, estimates and decision for each point."""
        blocks = [
            self._score_block(hidden[start : start + SCORE_BLOCK])
            for start in range(0, max(len(hidden), 1), SCORE_BLOCK)
        ]
        columns = {
            name: np.concatenate([block[name].cpu().numpy() for block in blocks])
            for name in blocks[0]
        }
        return SDMResult(**columns)

    def _score_block(self, hidden: Tensor) -> dict[str, Tensor]:
        logits = self.adaptor.logits(hidden)
        prediction = logits.argmax(1)
        found = match(
            self.support,
            self.adaptor.points(hidden),
            prediction,
            max_similarity=self.max_similarity,
        )
        q = found.similarity.double()
        d = distance_quantile(found.distance, self.references)
        centroid, rescaled = _activate(logits, prediction, q, d)
        below = torch.stack(
            [count_below(a, rescaled).clamp(max=max(len(a) - 1, 0)) for a in self.sizes]
        )
        size = below.min(0).values
        epsilon = dkw_epsilon(size, self.region.target_accuracy)
        d_lower, d_upper = (d - epsilon).clamp(min=0), (d + epsilon).clamp(max=1)
        lower, rescaled_lower = _activate(logits, prediction, q, d_lower)
        upper, rescaled_upper = _activate(logits, prediction, q, d_upper)

        code = admit(q, d_lower, rescaled_lower, lower, prediction, self.region)
        plain = admit(q, d, rescaled, centroid, prediction, self.region)
        loose = admit(q, d_upper, rescaled_upper, upper, prediction, self.region)
        own = prediction[:, None]
        return {
            "prediction": prediction,
            "logits": logits,
            "probabilities": centroid,
            "p_lower": lower.gather(1, own).squeeze(1),
            "p_centroid": centroid.gather(1, own).squeeze(1),
            "p_upper": upper.gather(1, own).squeeze(1),
            "similarity": found.similarity,
            "nearest_distance": found.distance,
            "distance": d,
            "rescaled_lower": rescaled_lower,
            "rescaled_centroid": rescaled,
            "rescaled_upper": rescaled_upper,
            "effective_size": size,
            "nearest": found.nearest,
            "admitted": code == 0,
            "admitted_centroid": plain == 0,
            "admitted_upper": loose == 0,
            "reason_code": code,
        }


def _activate(logits: Tensor, prediction: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """sdm(z') and q' = min(q, (2+q)^sdm_ŷ)."""
    probabilities = sdm(logits, q, d)
    own = probabilities.gather(1, prediction[:, None]).squeeze(1)
    return probabilities, rescaled_similarity(q, own)


def calibrate(
    adaptor: Adaptor,
    support: Support,
    hidden: Float[Tensor, "points width"],
    labels: Int[Tensor, " points"],
    *,
    max_similarity: int | None = None,
) -> Calibration:
    """The calibration points through the fitted maps, their distance arrays being their own."""
    logits = adaptor.logits(hidden)
    predictions = logits.argmax(1)
    found = match(support, adaptor.points(hidden), predictions, max_similarity=max_similarity)
    q = found.similarity.double()
    arrays = per_class_sorted(found.distance, labels, logits.shape[1], q > 0)
    d = distance_quantile(found.distance, arrays)
    probabilities, rescaled = _activate(logits, predictions, q, d)
    return Calibration(labels, predictions, q, found.distance, d, probabilities, rescaled)
