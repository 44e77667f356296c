"""Multi-query associative recall: all pairs first, all queries later, far ones rarer.

    [arXiv 2312.04927, *Zoology*]

V = 16, L = 12, two pairs (keys 0–5, values 6–11, filler 12–15):

    inputs    4   9   1   6  13  14   1  12  15  12   4  13
    answers   -   -   -   -   -   -   6   -   -   -   9   -

The queries of a row stand in distinct slots of two places; slot g = 0, 1, … is chosen with
probability ∝ (g + 1)^(a − 1). What stands between the queries is drawn from tokens of its own: with
fillers drawn from keys and values (as in the published code) a row may contradict itself.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mad.tasks.task import IGNORE, Rows, Split, Task, Tokens
from workbench.errors import ConfigError


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Distinct keys with distinct values, every key asked once."""

    vocab_size: int = 8192
    """Number of tokens V, filler tokens included."""
    seq_len: int = 64
    """Length L, at least four times the number of pairs."""
    num_kv_pairs: int = 8
    """Pairs shown and asked."""
    power_a: float = 0.01
    """Exponent a of the gaps: slot g has weight (g + 1)^(a − 1)."""
    filler_vocab_size: int = 128
    """Number of tokens that only stand between the queries."""

    def __post_init__(self) -> None:
        n = self.num_kv_pairs
        if n < 1:
            raise ConfigError(f"num_kv_pairs={n}: there is nothing to recall; choose at least 1")
        if self.filler_vocab_size < 1:
            raise ConfigError(
                f"filler_vocab_size={self.filler_vocab_size}: something must stand between the "
                "queries; choose at least 1"
            )
        if self.n_keys < max(n, 2):
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves {max(self.n_keys, 0)} keys beside "
                f"filler_vocab_size={self.filler_vocab_size}, but num_kv_pairs={n} needs distinct "
                f"ones; it must be at least {2 * max(n, 2) + self.filler_vocab_size}"
            )
        if self.seq_len % 2 or self.slots < n:
            raise ConfigError(
                f"seq_len={self.seq_len} cannot hold num_kv_pairs={n} pairs and as many slots of "
                f"two places for the queries; it must be even and at least {4 * n}"
            )
        if not 0 < self.power_a <= 1:
            raise ConfigError(f"power_a={self.power_a} lies outside (0, 1]; choose e.g. 0.01")

    @property
    def content_size(self) -> int:
        """Keys and values together; fillers are content_size … V − 1."""
        return self.vocab_size - self.filler_vocab_size

    @property
    def n_keys(self) -> int:
        """Keys are the tokens 0 … n_keys − 1."""
        return self.content_size // 2

    @property
    def slots(self) -> int:
        """Places a query can take: every second one behind the pairs."""
        return (self.seq_len - 2 * self.num_kv_pairs) // 2

    @property
    def length(self) -> int:
        """L: nothing is shifted, the value is not repeated in the input."""
        return self.seq_len

    @property
    def slot_weights(self) -> Float64[np.ndarray, " slots"]:
        """Probability of each slot for the first query."""
        weights = np.arange(1, self.slots + 1) ** (self.power_a - 1.0)
        return weights / weights.sum()

    def rows_of(self, keys: Tokens, values: Tokens, slots: Tokens, filler: Tokens) -> Rows:
        """Pairs, then key i in slot i among the fillers."""
        n = self.num_kv_pairs
        inputs = filler.copy()
        inputs[:, 0 : 2 * n : 2], inputs[:, 1 : 2 * n : 2] = keys, values
        at = 2 * n + 2 * slots
        np.put_along_axis(inputs, at, keys, axis=1)
        answers = np.full_like(inputs, IGNORE)
        np.put_along_axis(answers, at, values, axis=1)
        return Rows(inputs, answers, answers)

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once.

        Successive draws without replacement are the n first arrivals of exponential clocks whose
        rates are the weights.
        """
        n = self.num_kv_pairs
        keys = distinct(rng, rows, n, self.n_keys)
        values = self.n_keys + distinct(rng, rows, n, self.content_size - self.n_keys)
        arrival = rng.standard_exponential((rows, self.slots)) / self.slot_weights
        slots = np.argsort(arrival, axis=1, kind="stable")[:, :n]
        filler = rng.integers(self.content_size, self.vocab_size, (rows, self.seq_len))
        return self.rows_of(keys, values, slots, filler)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, drawn plainly: keys, values, slots, fillers.

        The published code draws whole arrays from numpy's global stream and fills with any token,
        so there is no published order of calls to keep.
        """
        n = self.num_kv_pairs
        keys = rng.choice(self.n_keys, size=n, replace=False)
        values = rng.choice(np.arange(self.n_keys, self.content_size), size=n, replace=False)
        slots = rng.choice(self.slots, size=n, replace=False, p=self.slot_weights)
        filler = rng.integers(self.content_size, self.vocab_size, (1, self.seq_len))
        return self.rows_of(keys[None], values[None], slots[None], filler)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {
            "key": range(self.n_keys),
            "value": range(self.n_keys, self.content_size),
            "filler": range(self.content_size, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """Number of pairs."""
        return float(self.num_kv_pairs)

    def chance(self) -> float:
        """1 / number of values."""
        return 1 / (self.content_size - self.n_keys)


def distinct(rng: np.random.Generator, rows: int, n: int, size: int) -> Tokens:
    """`n` distinct numbers below `size` per row, in random order: the first n steps of a shuffle.

    >>> distinct(np.random.default_rng(0), 1, 5, 5).tolist()
    [[4, 3, 1, 2, 0]]
    """
    deck = np.tile(np.arange(size, dtype=np.int32), (rows, 1))
    row = np.arange(rows)
    for step in range(n):
        other = rng.integers(step, size, rows)
        chosen = deck[row, other]
        deck[row, other] = deck[:, step]
        deck[:, step] = chosen
    return deck[:, :n].astype(np.int64)
