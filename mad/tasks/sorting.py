"""Sorting: say the content tokens again, from the smallest to the largest.

    [compare the priority sort of arXiv 1410.5401; the layout is this module's own]

V = 8, L = 8, so C = 4 tokens (content 0–5, blank 6, sort token 7):

    inputs    4   1   5   1   7   6   6   6
    answers   -   -   -   -   1   1   4   5

Tokens may repeat. The first answer stands under the sort token, the others under blanks: the model
never reads its own answers.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mad.tasks.marked import MarkedTask
from mad.tasks.task import IGNORE, Rows, Split, Tokens
from workbench.errors import ConfigError


@dataclass(frozen=True)
class Sorting(MarkedTask):
    """C = L / 2 content tokens, the sort token, and blanks under which the sorted tokens stand."""

    mark_name: ClassVar[str] = "sort"

    vocab_size: int = 16
    """Number of tokens V, blank and sort token included."""
    seq_len: int = 32
    """Length L, twice the number of tokens to sort."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len % 2 or self.seq_len < 4:
            raise ConfigError(
                f"seq_len={self.seq_len} is not twice a number of tokens to sort; it must be even "
                "and at least 4"
            )

    @property
    def n_answers(self) -> int:
        """Number of tokens to sort, C = L / 2."""
        return self.seq_len // 2

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        content: Tokens = rng.integers(0, self.content_size, (rows, self.n_answers))
        inputs = self.blank_rows(rows, self.n_answers)
        inputs[:, : self.n_answers] = content
        return self.answered(inputs, np.sort(content, axis=1))

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, written plainly."""
        n, blank = self.n_answers, self.blank
        content = [int(rng.integers(0, self.content_size)) for _ in range(n)]
        inputs = np.array([[*content, self.mark, *[blank] * (n - 1)]], dtype=np.int64)
        answers = np.array([[*[IGNORE] * n, *sorted(content)]], dtype=np.int64)
        return Rows(inputs, answers, answers)
