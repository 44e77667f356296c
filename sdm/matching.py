"""Exact similarity q and nearest distance of every query, without a sort.

Sorting the support by distance and walking down the ranks until the first disagreement counts the
*agreeing* points that are nearer than the nearest *disagreeing* one. Hence [Universal
Verification]

    good = {i : ŷ_i = y_i = ŷ(x)}      r = min over the others of dist_i
    q    = #{i ∈ good : dist_i < r}    d_near = min over all of dist_i

which takes one blocked matrix product, two minima and one comparison: O(block · N) memory.
A tie with the nearest disagreeing point does not count (strict <).

Single-precision products only sort out the clear cases. Pairs within the rounding error of the
product are computed again in double precision, coordinate by coordinate, so that duplicates are
at distance exactly 0 and the answer does not depend on the block size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import DataError

PAIRS_AT_ONCE = 16384
"""Close pairs measured again per step (16384 pairs of 1000 coordinates are 131 MB)."""


@dataclass(frozen=True)
class Match:
    """What the support says about each query."""

    similarity: Int[Tensor, " queries"]
    """q, a count."""
    distance: Float[Tensor, " queries"]
    """d_near, the Euclidean (L2, not squared) distance to the nearest support point."""
    nearest: Int[Tensor, " queries"]
    """Index of that point."""


@dataclass(frozen=True)
class Support:
    """The training points a prediction is compared with."""

    points: Float[Tensor, "support width"]
    """float64 coordinates in the space in which distances are taken."""
    labels: Int[Tensor, " support"]
    """True classes; a label that is no class (say -99) agrees with no prediction."""
    predictions: Int[Tensor, " support"]
    """Predicted classes."""

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise DataError(f"the support has {len(self.points)} points; at least 2 are needed")

    @property
    def correct(self) -> Bool[Tensor, " support"]:
        """Which support points the model predicts correctly."""
        return self.labels == self.predictions


def match(
    support: Support,
    queries: Float[Tensor, "queries width"],
    predictions: Int[Tensor, " queries"],
    *,
    self_index: Int[Tensor, " queries"] | None = None,
    max_similarity: int | None = None,
    block: int = 1024,
) -> Match:
    """Similarity and nearest distance of each query, exactly, as the module's text defines them.

    Args:
        support: the training points.
        queries: float64 points in the same space.
        predictions: predicted class of each query.
        self_index: where the queries are support points themselves, their own position in the
            support, which is left out (by position: a duplicate elsewhere still counts).
        max_similarity: cap k, q ← min(q, k).
        block: queries per matrix product.
    """
    if queries.shape[1] != support.points.shape[1]:
        raise DataError(
            f"queries have {queries.shape[1]} coordinates, the support {support.points.shape[1]}"
        )
    # Moving the origin into the cloud keeps distances and shrinks the rounding error.
    origin = support.points.mean(0)
    rough = (support.points - origin).float()
    norms = rough.square().sum(1)
    parts = [
        _match_block(
            support,
            rough,
            norms,
            queries[start : start + block],
            (queries[start : start + block] - origin).float(),
            predictions[start : start + block],
            None if self_index is None else self_index[start : start + block],
        )
        for start in range(0, len(queries), block)
    ]
    if not parts:
        empty = torch.empty(0, dtype=torch.long, device=rough.device)
        return Match(empty, empty.double(), empty.clone())
    similarity, squared, nearest = (torch.cat(part) for part in zip(*parts, strict=True))
    if max_similarity is not None:
        similarity = similarity.clamp(max=max_similarity)
    return Match(similarity, squared.sqrt(), nearest)


def _match_block(
    support: Support,
    rough: Tensor,
    norms: Tensor,
    queries: Tensor,
    low: Tensor,
    predictions: Tensor,
    self_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, squared nearest distance and nearest index of one block; `rough` and `low` are rounded."""
    points = support.points
    low_norms = low.square().sum(1)
    distances = torch.addmm(norms, low, rough.T, alpha=-2).add_(low_norms[:, None])
    # Rounding error of a sum of `width` products, as a share of |u|² + |v|².
    unit = 8 * torch.finfo(torch.float32).eps * math.sqrt(points.shape[1])
    slack = unit * (low_norms + norms.max())  # (queries,)
    own = None if self_index is None else (torch.arange(len(queries)), self_index)
    if own is not None:
        distances[own] = math.inf
    agree = support.correct & (support.predictions == predictions[:, None])
    if own is not None:
        agree[own] = False

    nearest_squared, nearest = _exact_minimum(distances, slack, points, queries)
    others = distances.masked_fill(agree, math.inf)
    radius, _ = _exact_minimum(others, slack, points, queries)

    edge = radius.float()
    inside = agree & (distances < (edge - slack)[:, None])
    unsure = (agree & (distances <= (edge + slack)[:, None])) ^ inside
    count = inside.sum(1)
    rows, columns = unsure.nonzero(as_tuple=True)
    exact = _exact_squared(queries, points, rows, columns)
    count.index_add_(0, rows, (exact < radius[rows]).long())
    return count, nearest_squared, nearest


def _exact_squared(queries: Tensor, points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of the given pairs, coordinate by coordinate, in double precision."""
    pairs = range(0, max(len(rows), 1), PAIRS_AT_ONCE)
    chunks = [slice(start, start + PAIRS_AT_ONCE) for start in pairs]
    return torch.cat([(queries[rows[c]] - points[columns[c]]).square().sum(1) for c in chunks])


def _exact_minimum(
    distances: Tensor, slack: Tensor, points: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """Row minima in double precision and their first position; ∞ where a row has no candidate."""
    least = distances.min(1).values
    limit = torch.where(least < math.inf, least + 2 * slack, -1)
    close = distances <= limit[:, None]
    rows, columns = close.nonzero(as_tuple=True)
    exact = _exact_squared(queries, points, rows, columns)
    minimum = torch.full((len(queries),), math.inf, dtype=exact.dtype, device=exact.device)
    minimum.scatter_reduce_(0, rows, exact, "amin")
    position = torch.full((len(queries),), points.shape[0], device=exact.device)
    winners = exact == minimum[rows]
    position.scatter_reduce_(0, rows[winners], columns[winners], "amin")
    return minimum, position


def match_reference(
    support: Support,
    queries: Float[Tensor, "queries width"],
    predictions: Int[Tensor, " queries"],
    *,
    self_index: Int[Tensor, " queries"] | None = None,
    max_similarity: int | None = None,
) -> Match:
    """The same as `match` by the textbook: sort, then walk down the ranks (for tests)."""
    similarities, distances, nearest = [], [], []
    for n in range(len(queries)):
        squared = (queries[n] - support.points).square().sum(1).tolist()
        others = [i for i in range(len(squared)) if self_index is None or i != int(self_index[n])]
        ranked = sorted(others, key=lambda i: squared[i])
        agrees = {
            i: bool(support.correct[i]) and int(support.predictions[i]) == int(predictions[n])
            for i in ranked
        }
        q = 0
        for rank, i in enumerate(ranked):
            tie_with_other = any(squared[j] == squared[i] and not agrees[j] for j in ranked[rank:])
            if not agrees[i] or tie_with_other:
                break
            q += 1
        similarities.append(q if max_similarity is None else min(q, max_similarity))
        distances.append(math.sqrt(squared[ranked[0]]))
        nearest.append(ranked[0])
    return Match(
        torch.tensor(similarities, dtype=torch.long),
        torch.tensor(distances, dtype=torch.float64),
        torch.tensor(nearest, dtype=torch.long),
    )
