"""What copying and sorting have in common: content, blanks, a mark, and answers at the end."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mad.tasks.task import IGNORE, Rows, Task, Tokens
from workbench.errors import ConfigError


@dataclass(frozen=True)
class MarkedTask(Task):
    """Content tokens 0 … V − 3, a blank V − 2 and a mark V − 1; the last places are scored."""

    mark_name: ClassVar[str] = "mark"
    """What the mark is called."""

    def __post_init__(self) -> None:
        if self.vocab_size < 4:
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves fewer than two content tokens beside the "
                f"blank and the {self.mark_name} token; it must be at least 4"
            )

    @property
    @abstractmethod
    def n_answers(self) -> int:
        """Number of scored positions, at the end of the row."""

    @property
    def content_size(self) -> int:
        """Content tokens are 0 … V − 3."""
        return self.vocab_size - 2

    @property
    def blank(self) -> int:
        """The token without a meaning."""
        return self.vocab_size - 2

    @property
    def mark(self) -> int:
        """The token that stands once in every row."""
        return self.vocab_size - 1

    @property
    def length(self) -> int:
        """L: nothing is shifted."""
        return self.seq_len

    def blank_rows(self, rows: int, mark_at: int) -> Tokens:
        """Rows of blanks with the mark at one place."""
        inputs = np.full((rows, self.seq_len), self.blank, dtype=np.int64)
        inputs[:, mark_at] = self.mark
        return inputs

    def answered(self, inputs: Tokens, answers: np.ndarray) -> Rows:
        """The rows with these answers at their end."""
        targets = np.full_like(inputs, IGNORE)
        targets[:, -self.n_answers :] = answers
        return Rows(inputs, targets, targets)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {
            "content": range(self.content_size),
            "blank": range(self.blank, self.mark),
            self.mark_name: range(self.mark, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """The number of answers, the same in every row."""
        return float(self.n_answers)

    def chance(self) -> float:
        """1 / number of content tokens."""
        return 1 / self.content_size
