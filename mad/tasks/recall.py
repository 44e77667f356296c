"""In-context recall, clean and noisy: answer a repeated key with the value shown before.

    [arXiv 2403.17844, "in-context recall" and "noisy in-context recall"]

A row of V = 16, L = 16 (keys 0–7, values 8–15), multi-query:

    inputs    1  14   2   9   6  13   5  15   3  14   2   9   4  12   2
    answers   -   -   -   -   -   -   -   -   -   -   9   -   -   -   9

Key 2 comes back twice, so the model must say 9 twice; nothing else is scored.
"""

from dataclasses import dataclass

import numpy as np

from mad.tasks.pairs import PairTask
from mad.tasks.task import IGNORE, Rows, Split, check_common
from workbench.errors import ConfigError, DataError


@dataclass(frozen=True)
class InContextRecall(PairTask):
    """Key-value pairs with a fresh random map per row; noise pairs when `frac_noise` > 0."""

    def __post_init__(self) -> None:
        check_common(self, self.noise_vocab_size, self.frac_noise)
        if self.content_size < 2:
            least = self.noise_vocab_size + (2 if self.multi_query else 3)
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves no key and value beside "
                f"noise_vocab_size={self.noise_vocab_size}; it must be at least {least}"
            )

    @property
    def n_special(self) -> int:
        """The copy token of the single-query form."""
        return 0 if self.multi_query else 1

    @property
    def length(self) -> int:
        """L − 1 after the shift; L with the copy token."""
        return self.seq_len - 1 if self.multi_query else self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once: a lazily drawn map has the law of a map drawn whole."""
        slots = self.seq_len // 2 - 1  # the last pair of the row is the probe
        row = np.arange(rows)
        value_of = rng.integers(self.n_keys, self.content_size, (rows, self.n_keys))
        keys = rng.integers(0, self.n_keys, (rows, slots))
        values = np.take_along_axis(value_of, keys, axis=1)

        is_pair = np.ones((rows, slots), dtype=bool)
        if self.frac_noise > 0:
            is_pair = rng.random((rows, slots)) >= self.frac_noise
            is_pair[row, rng.integers(0, slots, rows)] = True  # one slot is never noise

        # slot at which each key of the row is shown first; a noise slot shows none
        first = np.full((rows, self.n_keys), slots)
        flat = (row[:, None] * self.n_keys + keys)[is_pair]
        slot = np.broadcast_to(np.arange(slots), (rows, slots))
        np.minimum.at(first.reshape(-1), flat, slot[is_pair])
        repeated = is_pair & (slot > np.take_along_axis(first, keys, axis=1))

        score = np.where(first < slots, rng.random((rows, self.n_keys)), -1.0)
        probe = score.argmax(axis=1)  # uniform among the keys shown
        answer = value_of[row, probe]

        sequence = np.empty((rows, self.length + 1), dtype=np.int64)
        targets = np.full((rows, self.length + 1), IGNORE, dtype=np.int64)
        sequence[:, 0 : 2 * slots : 2] = keys
        sequence[:, 1 : 2 * slots : 2] = values
        if self.frac_noise > 0:
            noise = rng.integers(self.noise.start, self.noise.stop, (rows, slots, 2))
            pairs = sequence[:, : 2 * slots].reshape(rows, slots, 2)
            sequence[:, : 2 * slots] = np.where(is_pair[..., None], pairs, noise).reshape(rows, -1)
        if self.multi_query:
            targets[:, 1 : 2 * slots : 2] = np.where(repeated, values, IGNORE)
        else:
            sequence[:, -3] = self.vocab_size - 1
        sequence[:, -2], sequence[:, -1], targets[:, -1] = probe, answer, answer
        return Rows(sequence[:, :-1], targets[:, 1:], sequence[:, 1:])

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row in the published order of calls, its all-noise rows included (they raise)."""
        slots = self.seq_len // 2
        keep = rng.choice(slots)  # may name the probe's slot: then a row can be all noise
        value_of: dict[int, int] = {}
        sequence: list[int] = []
        targets: list[int] = []
        for slot in range(slots - 1):
            if self.frac_noise > 0 and slot != keep and rng.random() < self.frac_noise:
                sequence += rng.choice(np.array(self.noise), size=2).tolist()
                targets += [IGNORE, IGNORE]
                continue
            key = int(rng.choice(np.arange(self.n_keys)))
            shown = key in value_of
            if not shown:
                value_of[key] = int(rng.choice(np.arange(self.n_keys, self.content_size)))
            sequence += [key, value_of[key]]
            targets += [IGNORE, value_of[key] if shown and self.multi_query else IGNORE]
        if not value_of:
            raise DataError("this legacy row is all noise; the default generator never draws one")
        probe = int(rng.choice(list(value_of)))
        if not self.multi_query:
            sequence, targets = [*sequence, self.vocab_size - 1], [*targets, IGNORE]
        sequence += [probe, value_of[probe]]
        targets += [IGNORE, value_of[probe]]
        whole = np.array([sequence], dtype=np.int64)
        return Rows(whole[:, :-1], np.array([targets], dtype=np.int64)[:, 1:], whole[:, 1:])

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return super().token_kinds() | {"copy": range(self.noise.stop, self.vocab_size)}

    def expected_scored(self) -> float:
        """Expected pairs − expected distinct keys + 1; without noise P′ − n(1 − (1 − 1/n)^P′) + 1.

        P′ = L/2 − 1 slots, n keys; with noise one slot is surely a pair and the others are with
        probability 1 − ρ. The single-query form scores one position.
        """
        if not self.multi_query:
            return 1.0
        others, pair = self.seq_len // 2 - 2, 1.0 - self.frac_noise
        missed = (1 - 1 / self.n_keys) * (1 - pair / self.n_keys) ** others
        return 1 + others * pair - self.n_keys * (1 - missed) + 1


@dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """In-context recall with noise pairs in a fifth of the slots."""

    vocab_size: int = 32
    """Number of tokens V, noise tokens included."""
    noise_vocab_size: int = 16
    """Number of tokens N that only serve as noise."""
    frac_noise: float = 0.2
    """Probability that a pair slot holds two noise tokens."""
