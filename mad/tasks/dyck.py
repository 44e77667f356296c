"""Dyck words of bounded depth: which bracket may be closed next?

    [arXiv 2010.07515, the languages Dyck-(k, m)]

k = 3 types (opening 0–2, closing 3–5), depth at most 2, L = 8:

    inputs    1   0   3   2   5   4   2   5
    answers   4   3   4   5   4   -   5   -

The answer at t is the closing bracket of the innermost open one, the only closing bracket allowed
at t + 1; where nothing is open nothing is asked. A word opens at depth 0, closes at the largest
depth, and does either with probability 1/2 in between; types are uniform. Rows are prefixes.
"""

from dataclasses import dataclass

import numpy as np

from mad.tasks.task import IGNORE, Rows, Split, Task
from workbench.errors import ConfigError


@dataclass(frozen=True)
class Dyck(Task):
    """Prefixes of words of brackets of V / 2 types with bounded depth."""

    vocab_size: int = 16
    """Number of tokens V, twice the number of bracket types."""
    seq_len: int = 64
    """Length L."""
    max_depth: int = 8
    """Largest number of brackets open at a time, m."""

    def __post_init__(self) -> None:
        if self.vocab_size % 2 or self.vocab_size < 4:
            raise ConfigError(
                f"vocab_size={self.vocab_size} is not an opening and a closing token for at least "
                "two bracket types; it must be even and at least 4"
            )
        if self.max_depth < 1:
            raise ConfigError(
                f"max_depth={self.max_depth}: no bracket could be opened; choose at least 1"
            )
        if self.seq_len < 1:
            raise ConfigError(f"seq_len={self.seq_len}: a row has no bracket; choose at least 1")

    @property
    def types(self) -> int:
        """Number of bracket types k; type i opens with token i and closes with k + i."""
        return self.vocab_size // 2

    @property
    def length(self) -> int:
        """L: nothing is shifted."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once, position by position with one stack per row."""
        kinds = rng.integers(0, self.types, (rows, self.seq_len))
        coins = rng.integers(0, 2, (rows, self.seq_len), dtype=np.int8) == 1
        stack = np.zeros((rows, self.max_depth + 1), dtype=np.int64)
        depth, row = np.zeros(rows, dtype=np.int64), np.arange(rows)
        inputs, answers = np.empty_like(kinds), np.empty_like(kinds)
        for t in range(self.seq_len):
            opens = (depth == 0) | (coins[:, t] & (depth < self.max_depth))
            inputs[:, t] = np.where(opens, kinds[:, t], self.types + stack[row, depth])
            depth += np.where(opens, 1, -1)
            stack[row, depth] = np.where(opens, kinds[:, t], stack[row, depth])
            answers[:, t] = np.where(depth > 0, self.types + stack[row, depth], IGNORE)
        return Rows(inputs, answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, written plainly with a list as the stack."""
        stack: list[int] = []
        tokens, answers = [], []
        for _ in range(self.seq_len):
            free = 0 < len(stack) < self.max_depth
            if not stack or (free and rng.random() < 0.5):
                stack.append(int(rng.integers(0, self.types)))
                tokens.append(stack[-1])
            else:
                tokens.append(self.types + stack.pop())
            answers.append(self.types + stack[-1] if stack else IGNORE)
        found = np.array([answers], dtype=np.int64)
        return Rows(np.array([tokens], dtype=np.int64), found, found)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {
            "opening": range(self.types),
            "closing": range(self.types, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """Sum over positions of P(depth > 0), from the depth's Markov chain."""
        step = np.zeros((self.max_depth + 1, self.max_depth + 1))
        for depth in range(self.max_depth + 1):
            if depth == 0:
                step[depth, 1] = 1.0
            elif depth == self.max_depth:
                step[depth, depth - 1] = 1.0
            else:
                step[depth, depth - 1] = step[depth, depth + 1] = 0.5
        law, scored = np.eye(self.max_depth + 1)[0], 0.0
        for _ in range(self.seq_len):
            law = law @ step
            scored += 1.0 - law[0]
        return float(scored)

    def chance(self) -> float:
        """1 / number of bracket types."""
        return 1 / self.types
