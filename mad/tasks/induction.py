"""Induction heads: what stood behind the one special token the first time?

    [arXiv 2209.11895, *In-context learning and induction heads*; synthetic form: arXiv 2212.14052]

V = 8, L = 10 (content 0–6, special token 7):

    inputs    3   0   7   5   1   5   2   6   0   7
    answers   -   -   -   -   -   -   -   -   -   5

The special token's first place is uniform over 0 … L − 3, so the distance to the question varies
from 2 to L − 1.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from mad.tasks.task import IGNORE, Rows, Split, Task, Tokens
from workbench.errors import ConfigError


@dataclass(frozen=True)
class InductionHeads(Task):
    """Content tokens with one special token among them, and the special token again at the end."""

    vocab_size: int = 16
    """Number of tokens V, the special one included."""
    seq_len: int = 256
    """Length L; the last token is the question."""

    def __post_init__(self) -> None:
        if self.vocab_size < 3:
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves fewer than two content tokens beside the "
                "special one; it must be at least 3"
            )
        if self.seq_len < 3:
            raise ConfigError(
                f"seq_len={self.seq_len} has no room for the special token, its successor and "
                "the question; it must be at least 3"
            )

    @property
    def special(self) -> int:
        """The special token, V − 1."""
        return self.vocab_size - 1

    @property
    def length(self) -> int:
        """L: nothing is shifted, the answer is not in the input's last place."""
        return self.seq_len

    def rows_of(self, content: Tokens, place: Int64[np.ndarray, " rows"]) -> Rows:
        """The rows with the special token at `place` and at the end of `content`."""
        inputs = content.copy()
        row = np.arange(len(inputs))
        inputs[row, place] = self.special
        inputs[:, -1] = self.special
        answers = np.full_like(inputs, IGNORE)
        answers[:, -1] = inputs[row, place + 1]
        return Rows(inputs, answers, answers)

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        content = rng.integers(0, self.special, (rows, self.seq_len))
        return self.rows_of(content, rng.integers(0, self.seq_len - 2, rows))

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, written plainly: the place, then token by token."""
        place = int(rng.integers(0, self.seq_len - 2))
        tokens = [int(rng.integers(0, self.special)) for _ in range(self.seq_len - 2)]
        tokens = [*tokens[:place], self.special, *tokens[place:], self.special]
        inputs = np.array([tokens], dtype=np.int64)
        answers = np.full_like(inputs, IGNORE)
        answers[0, -1] = tokens[tokens.index(self.special) + 1]
        return Rows(inputs, answers, answers)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {"content": range(self.special), "special": range(self.special, self.vocab_size)}

    def expected_scored(self) -> float:
        """One."""
        return 1.0

    def chance(self) -> float:
        """1 / number of content tokens."""
        return 1 / self.special
