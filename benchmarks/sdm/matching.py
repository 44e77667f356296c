"""Time of exact q and d: counting (ours) against a flat index with sort and rank loop.

    OMP_NUM_THREADS=1 python -m benchmarks.sdm.matching [rows] [width …]

Prints one line per width: seconds of both in the same process, best of three, and their ratio; the
share of equal answers (single-precision sorting swaps near-ties now and then).
"""

from __future__ import annotations

import sys
import time

import torch

from sdm.matching import Support, match


def sort_and_rank(known: Support, queries: torch.Tensor, predictions: torch.Tensor) -> list[int]:
    """All neighbours from faiss in order, then a walk down the ranks for each query."""
    import faiss

    index = faiss.IndexFlatL2(known.points.shape[1])
    index.add(known.points.float().numpy())
    _, ranks = index.search(queries.float().numpy(), len(known.points))
    labels, predicted = known.labels.tolist(), known.predictions.tolist()
    counts = []
    for row, wanted in zip(ranks.tolist(), predictions.tolist(), strict=True):
        q = 0
        for i in row:
            if labels[i] != predicted[i] or predicted[i] != wanted:
                break
            q += 1
        counts.append(q)
    return counts


def best_of(function, times: int = 3):
    """(smallest seconds, answer) of some calls."""
    seconds, answer = [], None
    for _ in range(times):
        begin = time.perf_counter()
        answer = function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), answer


def main(rows: int, widths: list[int]) -> None:
    """Print seconds of both ways, their ratio, and on which share of the queries they agree."""
    torch.set_num_threads(1)
    print("rows,width,counting_seconds,sort_and_rank_seconds,ratio,equal_share")
    for width in widths:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(rows, width, generator=generator).double()
        queries = torch.randn(rows, width, generator=generator).double()
        labels = (points[:, 0] > 0).long()
        predictions = (points[:, 0] + 0.3 * points[:, 1] > 0).long()
        asked = (queries[:, 0] + 0.3 * queries[:, 1] > 0).long()
        known = Support(points, labels, predictions)
        ours, found = best_of(lambda: match(known, queries, asked))  # noqa: B023
        theirs, counts = best_of(lambda: sort_and_rank(known, queries, asked))  # noqa: B023
        equal = (found.similarity == torch.tensor(counts)).double().mean()
        print(f"{rows},{width},{ours:.4f},{theirs:.4f},{theirs / ours:.2f},{equal:.4f}")


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    main(words[0] if words else 2000, words[1:] or [64, 256, 1000])
