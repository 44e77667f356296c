"""Copying and selective copying: say the content tokens again, in their order.

    [arXiv 2403.17844, "selective copying"]

Selective, V = 8, L = 12, three tokens (content 0–5, blank 6, copy token 7):

    inputs    6   2   6   6   5   0   6   6   7   6   6   6
    answers   -   -   -   -   -   -   -   -   -   2   5   0

Plain copying has all blanks behind the content tokens: `2 5 0 6 6 6 6 6 7 6 6 6`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from mad.tasks.marked import MarkedTask
from mad.tasks.task import Rows, Split, Tokens
from workbench.errors import ConfigError

Slot = Literal["before", "all"]


@dataclass(frozen=True)
class Copying(MarkedTask):
    """Content tokens, blanks, the copy token, and room to say the content again."""

    mark_name: ClassVar[str] = "copy"

    vocab_size: int = 16
    """Number of tokens V, blank and copy token included."""
    seq_len: int = 256
    """Length L: content, blanks, copy token, and as many places as content tokens."""
    num_tokens_to_copy: int = 16
    """Number of content tokens C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens_to_copy < 1:
            raise ConfigError(
                f"num_tokens_to_copy={self.num_tokens_to_copy}: there is nothing to copy; "
                "choose at least 1, e.g. 16"
            )
        if self.blanks < 1:
            raise ConfigError(
                f"seq_len={self.seq_len} has no room for num_tokens_to_copy="
                f"{self.num_tokens_to_copy} twice, the copy token and a blank; the smallest "
                f"seq_len is {2 * self.num_tokens_to_copy + 2}"
            )

    @property
    def blanks(self) -> int:
        """Blanks before the copy token: L − 2C − 1."""
        return self.seq_len - 2 * self.num_tokens_to_copy - 1

    def places(self, rng: np.random.Generator, rows: int) -> Tokens:
        """Position of every content token."""
        at = np.arange(self.num_tokens_to_copy)
        return np.broadcast_to(at, (rows, self.num_tokens_to_copy))

    def rows_of(self, content: Tokens, places: Tokens) -> Rows:
        """The rows with these content tokens at these places."""
        inputs = self.blank_rows(len(content), self.seq_len - self.num_tokens_to_copy - 1)
        np.put_along_axis(inputs, places, content, axis=1)
        return self.answered(inputs, content)

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        content = rng.integers(0, self.content_size, (rows, self.num_tokens_to_copy))
        return self.rows_of(content, self.places(rng, rows))

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row in the published order of calls."""
        content = rng.choice(np.arange(self.content_size), size=self.num_tokens_to_copy)
        head = [*content, *[self.blank] * self.blanks]
        return self._legacy(content, np.array(head))

    def _legacy(self, content: np.ndarray, head: np.ndarray) -> Rows:
        tail = [self.mark, *[self.blank] * self.num_tokens_to_copy]
        return self.answered(np.concatenate([head, tail]).astype(np.int64)[None], content)

    @property
    def n_answers(self) -> int:
        """C."""
        return self.num_tokens_to_copy


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """Copying with the blanks strewn among the content tokens."""

    slot: Slot = "before"
    """Blanks stand before a content token (published), or in `all` C + 1 slots."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slot not in get_args(Slot):
            raise ConfigError(f"slot={self.slot!r} is unknown; choose before or all")

    def places(self, rng: np.random.Generator, rows: int) -> Tokens:
        """j + number of blanks in the slots 0 … j; every blank chooses its slot uniformly."""
        slots = self.num_tokens_to_copy + (self.slot == "all")
        small = np.int64 if slots > 2**15 else np.int16
        chosen = rng.integers(0, slots, (rows, self.blanks), dtype=small)
        flat = (np.arange(rows)[:, None] * slots + chosen).reshape(-1)
        blanks = np.bincount(flat, minlength=rows * slots).reshape(rows, slots)
        before = blanks.cumsum(axis=1)[:, : self.num_tokens_to_copy]
        return before + np.arange(self.num_tokens_to_copy)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row in the published order of calls, but from one stream.

        The published generator takes the slots from numpy's global stream, so no seed fixes its
        blanks; here they follow the content tokens in `rng`.
        """
        content = rng.choice(np.arange(self.content_size), size=self.num_tokens_to_copy)
        slots = rng.integers(0, self.num_tokens_to_copy + (self.slot == "all"), self.blanks)
        return self._legacy(content, np.insert(content, slots, self.blank))
