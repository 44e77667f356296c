"""Memorization: a fixed key-value map that is never shown must be stored in the weights.

    [arXiv 2403.17844, "memorization"]

A row of V = 16, L = 8 with the map {4:9, 3:11, 0:13, 2:14, 1:8, 6:10, 5:7} (insert token 15):

    inputs    3  15   6  15   0  15   3  15
    answers   -  11   -  10   -  13   -  11
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from mad.tasks.task import IGNORE, Rows, Split, Task, check_common
from workbench.errors import ConfigError


@dataclass(frozen=True)
class Memorization(Task):
    """Keys, each followed by an insert token at which the map's value is the answer."""

    repeats_rows: ClassVar[bool] = True

    vocab_size: int = 256
    """Number of tokens V, insert and noise tokens included."""
    seq_len: int = 32
    """Length L: L/2 keys, each with its insert token."""
    noise_vocab_size: int = 0
    """Number of tokens N that only serve as noise."""
    frac_noise: float = 0.0
    """Probability that a slot holds two noise tokens instead of a key."""
    map_seed: int = 12345
    """Seed of the key-value map, the same in all splits."""

    def __post_init__(self) -> None:
        check_common(self, self.noise_vocab_size, self.frac_noise)
        if self.content_size < 2:
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves no key and value beside the insert token and "
                f"noise_vocab_size={self.noise_vocab_size}; "
                f"it must be at least {self.noise_vocab_size + 3}"
            )

    @property
    def content_size(self) -> int:
        """Keys and values together: V − 1 − N."""
        return self.vocab_size - 1 - self.noise_vocab_size

    @property
    def n_keys(self) -> int:
        """Keys are the tokens 0 … n_keys − 1."""
        return self.content_size // 2

    @property
    def length(self) -> int:
        """L: nothing is shifted, the value is not in the input."""
        return self.seq_len

    @cached_property
    def key_value_map(self) -> dict[int, int]:
        """The map in its order of making: shuffled keys zipped with shuffled values.

        >>> Memorization(vocab_size=16).key_value_map
        {4: 9, 3: 11, 0: 13, 2: 14, 1: 8, 6: 10, 5: 7}
        """
        rng = np.random.default_rng(self.map_seed)
        keys = np.arange(self.n_keys)
        values = np.arange(self.n_keys, self.content_size)
        rng.shuffle(keys)
        rng.shuffle(values)
        # one value stays unused when K is odd
        return dict(zip(keys.tolist(), values[: self.n_keys].tolist(), strict=True))

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        slots = self.seq_len // 2
        keys = rng.integers(0, self.n_keys, (rows, slots))
        inputs = np.full((rows, self.seq_len), self.vocab_size - 1, dtype=np.int64)
        answers = np.full((rows, self.seq_len), IGNORE, dtype=np.int64)
        inputs[:, ::2] = keys
        pairs = self.key_value_map
        value_of = np.array([pairs[key] for key in range(self.n_keys)])
        answers[:, 1::2] = value_of[keys]
        if self.frac_noise > 0:
            is_noise = rng.random((rows, slots)) < self.frac_noise
            is_noise[np.arange(rows), rng.integers(0, slots, rows)] = False  # one slot has a key
            is_noise = np.repeat(is_noise, 2, axis=1)
            noise = rng.integers(self.content_size, self.vocab_size - 1, inputs.shape)
            inputs = np.where(is_noise, noise, inputs)
            answers = np.where(is_noise, IGNORE, answers)
        return Rows(inputs, answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row in the published order of calls."""
        slots = self.seq_len // 2
        pairs = self.key_value_map
        keys = list(pairs)
        keep = rng.choice(slots)  # drawn even when there is no noise
        inputs: list[int] = []
        answers: list[int] = []
        for slot in range(slots):
            if self.frac_noise > 0 and slot != keep and rng.random() < self.frac_noise:
                noise = np.arange(self.content_size, self.vocab_size - 1)
                inputs += rng.choice(noise, size=2).tolist()
                answers += [IGNORE, IGNORE]
            else:
                key = int(rng.choice(keys))
                inputs += [key, self.vocab_size - 1]
                answers += [IGNORE, pairs[key]]
        targets = np.array([answers], dtype=np.int64)
        return Rows(np.array([inputs], dtype=np.int64), targets, targets)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {
            "key": range(self.n_keys),
            "value": range(self.n_keys, self.content_size),
            "noise": range(self.content_size, self.vocab_size - 1),
            "insert": range(self.vocab_size - 1, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """1 + (1 − ρ)(L/2 − 1): one slot surely holds a key."""
        return 1 + (1 - self.frac_noise) * (self.seq_len / 2 - 1)

    def chance(self) -> float:
        """1 / number of values."""
        return 1 / (self.content_size - self.n_keys)

    def ceiling(self, num_train_examples: int) -> float:
        """c + (1 − c) · chance with c = 1 − (1 − 1/n)^draws, the expected share of keys trained on.

        draws = num_train_examples · (expected keys of a row): a key never seen
        in training can only be guessed.
        """
        draws = num_train_examples * self.expected_scored()
        covered = 1 - (1 - 1 / self.n_keys) ** draws
        return covered + (1 - covered) * self.chance()
