"""Checks that every task's rows have to pass, whatever the task."""

import itertools

import numpy as np
from scipy.stats import chi2_contingency

from mad.tasks.task import IGNORE, Rows, Split, Task, generate


def same_law(fast: Rows, slow: Rows, statistics: dict[str, list[np.ndarray]]) -> None:
    """Assert with chi-square at 1e-5 that two samples agree in these counts and single places."""
    length = fast.inputs.shape[1]
    counts = dict(statistics)
    counts["scored"] = [(rows.answers != IGNORE).sum(1) for rows in (fast, slow)]
    for at in (0, 1, length // 2, length - 3, length - 2, length - 1):
        counts[f"token {at}"] = [rows.inputs[:, at] for rows in (fast, slow)]
        counts[f"answer {at}"] = [rows.answers[:, at] + 100 for rows in (fast, slow)]
    for name, pair in counts.items():
        table = np.stack([np.bincount(part, minlength=400) for part in pair])
        rare = table.sum(axis=0) < 20
        table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
        table = table[:, table.sum(axis=0) >= 20]
        if table.shape[1] > 1:
            assert chi2_contingency(table).pvalue > 1e-5, name


def kinds_cover(task: Task) -> dict[str, range]:
    """Assert that the kinds of tokens share the vocabulary among them; the kinds."""
    kinds = task.token_kinds()
    assert sorted(t for kind in kinds.values() for t in kind) == list(range(task.vocab_size))
    return kinds


def cut_is_the_same(task: Task, whole: Rows, split: Split, start: int, size: int) -> None:
    """Assert that `size` rows from `start` are those of the whole split (seed 3)."""
    part = generate(task, size, split, 3, start=start)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[start : start + size], b)


def streams_differ(task: Task) -> None:
    """Assert that no split and no seed repeats the rows of another."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    streams = [generate(task, 60, s, seed).inputs for s in splits for seed in (0, 1)]
    for a, b in itertools.combinations(streams, 2):
        assert (a != b).any(axis=1).mean() > 0.9
