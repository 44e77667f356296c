"""What one would do without SDM: trust the softmax above α, plain or temperature-scaled."""

from __future__ import annotations

import numpy as np
import torch

from sdm.evaluate import Selection
from sdm.model import SDMResult
from sdm.train import Trainer


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Row-wise softmax(z / T)."""
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """T > 0 with the least mean cross-entropy of softmax(z / T) on calibration rows.

    [Guo et al. 2017, "On Calibration of Modern Neural Networks"]
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) * np.exp(-log_temperature)
        return float(-log_softmax(scaled, axis=1)[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded").x))


def threshold(name: str, probabilities: np.ndarray, target: float) -> Selection:
    """Answer where the largest probability is at least the target accuracy."""
    top = probabilities.max(1)
    return Selection(name, probabilities.argmax(1), top, top >= target)


def softmax_selections(
    name: str,
    logits: np.ndarray,
    calibration_logits: np.ndarray,
    calibration_labels: np.ndarray,
    target: float,
) -> list[Selection]:
    """The plain and the temperature-scaled softmax threshold of one set of logits."""
    temperature = fit_temperature(calibration_logits, calibration_labels)
    return [
        threshold(f"softmax, {name}", softmax(logits), target),
        threshold(f"temperature, {name}", softmax(logits, temperature), target),
    ]


def adaptor_logits(
    trainer: Trainer, epochs: int, features: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the adaptor trained with plain cross-entropy, on its calibration half and anew.

    `trainer` must have as many warm-up epochs as are run, so that (q, d) stay at (e − 2, 1).
    """
    for epoch in range(1, epochs + 1):
        trainer.run_epoch(epoch)
    adaptor = trainer.adaptor(0, trainer.best)
    known = adaptor.logits(trainer.features[trainer.calibration_index[0]])
    return known.cpu().numpy(), adaptor.logits(features).cpu().numpy()


def sdm_selections(result: SDMResult, target: float) -> list[Selection]:
    """The estimator's own answers: never rejecting, sdm >= α alone, and the region."""
    order = result.p_lower + 1e-9 * result.rescaled_lower / (1 + result.rescaled_lower)
    everything = np.ones(len(result), dtype=bool)
    return [
        Selection("no reject", result.prediction, result.p_centroid, everything),
        Selection("sdm ≥ α", result.prediction, result.p_centroid, result.p_centroid >= target),
        Selection("SDM region", result.prediction, order, result.admitted),
    ]
