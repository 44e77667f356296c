"""Sorting: say the content tokens again, from the smallest to the largest.

    [compare the priority sort of arXiv 1410.5401; the layout is this module's own]

V = 8, L = 8, so C = 4 tokens (content 0–5, blank 6, sort token 7):

    inputs    4   1   5   1   7   6   6   6
    answers   -   -   -   -   1   1   4   5

Tokens may repeat. The first answer stands under the sort token, the others under blanks: the model
never reads its own answers.
"""

from dataclasses import dataclass

import numpy as np

from mad.tasks.task import IGNORE, Rows, Split, Task, Tokens
from workbench.errors import ConfigError


@dataclass(frozen=True)
class Sorting(Task):
    """C = L / 2 content tokens, the sort token, and blanks under which the sorted tokens stand."""

    vocab_size: int = 16
    """Number of tokens V, blank and sort token included."""
    seq_len: int = 32
    """Length L, twice the number of tokens to sort."""

    def __post_init__(self) -> None:
        if self.vocab_size < 4:
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves fewer than two content tokens beside the "
                "blank and the sort token; it must be at least 4"
            )
        if self.seq_len % 2 or self.seq_len < 4:
            raise ConfigError(
                f"seq_len={self.seq_len} is not twice a number of tokens to sort; it must be even "
                "and at least 4"
            )

    @property
    def content_size(self) -> int:
        """Content tokens are 0 … V − 3."""
        return self.vocab_size - 2

    @property
    def num_tokens(self) -> int:
        """Number of tokens to sort, C = L / 2."""
        return self.seq_len // 2

    @property
    def length(self) -> int:
        """L: nothing is shifted."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        content: Tokens = rng.integers(0, self.content_size, (rows, self.num_tokens))
        inputs = np.full((rows, self.seq_len), self.vocab_size - 2, dtype=np.int64)
        inputs[:, : self.num_tokens] = content
        inputs[:, self.num_tokens] = self.vocab_size - 1
        answers = np.full_like(inputs, IGNORE)
        answers[:, self.num_tokens :] = np.sort(content, axis=1)
        return Rows(inputs, answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, written plainly."""
        n, blank = self.num_tokens, self.vocab_size - 2
        content = [int(rng.integers(0, self.content_size)) for _ in range(n)]
        inputs = np.array([[*content, self.vocab_size - 1, *[blank] * (n - 1)]], dtype=np.int64)
        answers = np.array([[*[IGNORE] * n, *sorted(content)]], dtype=np.int64)
        return Rows(inputs, answers, answers)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        blank = self.content_size
        return {
            "content": range(blank),
            "blank": range(blank, blank + 1),
            "sort": range(blank + 1, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """C."""
        return float(self.num_tokens)

    def chance(self) -> float:
        """1 / number of content tokens."""
        return 1 / self.content_size
