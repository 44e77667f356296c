"""Empirical distribution functions with stated sides: how far is far, per class."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def per_class_sorted(
    values: Float[Tensor, " points"],
    labels: Int[Tensor, " points"],
    n_classes: int,
    keep: Bool[Tensor, " points"] | None = None,
) -> list[Float[Tensor, " _"]]:
    """The values of each true class in ascending order, optionally of the kept points only."""
    chosen = torch.ones_like(labels, dtype=torch.bool) if keep is None else keep
    return [values[chosen & (labels == c)].sort().values for c in range(n_classes)]


def count_below(
    ascending: Float[Tensor, " reference"], values: Float[Tensor, " points"]
) -> Int[Tensor, " points"]:
    """#{a < v} for each value (strictly below)."""
    return torch.searchsorted(ascending, values.contiguous(), side="left")


def distance_quantile(
    distance: Float[Tensor, " points"], references: list[Float[Tensor, " _"]]
) -> Float[Tensor, " points"]:
    """d, the smallest over the classes of the share of reference distances not below d_near.

    d = min_c (1 − #{a ∈ A_c : a < d_near} / |A_c|),   0 for an empty A_c        [SDM Activations]

    1 for a point that coincides with a support point, 0 for one farther away than all of A_c.
    A_c are the nearest distances of the calibration points of true class c with q > 0.
    """
    quantile = torch.ones_like(distance)
    for reference in references:
        if len(reference) == 0:
            return torch.zeros_like(distance)
        quantile = torch.minimum(quantile, 1 - count_below(reference, distance) / len(reference))
    return quantile
