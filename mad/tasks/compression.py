"""Compression: the whole row must be decoded from the vector at its last position.

    [arXiv 2403.17844, "compression"]

A row of V = 16, L = 8 (content 0–14, compress token 15); the answers are the inputs:

    inputs    10   3  11   4   3  11   9  15
    answers   10   3  11   4   3  11   9  15
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mad.tasks.task import IGNORE, Rows, Split, Task, check_noise, small_integers
from workbench.errors import ConfigError


@dataclass(frozen=True)
class Compression(Task):
    """Random tokens and a compress token, all of which the auto-encoder must give back."""

    backbone: ClassVar[str] = "autoencoder"

    vocab_size: int = 16
    """Number of tokens V, compress and noise tokens included."""
    seq_len: int = 32
    """Length L, the compress token included."""
    noise_vocab_size: int = 0
    """Number of tokens N that only serve as noise."""
    frac_noise: float = 0.0
    """Probability that a token is replaced by noise, which is not scored."""

    def __post_init__(self) -> None:
        check_noise(self, self.noise_vocab_size, self.frac_noise)
        if self.content_size < 2:
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves fewer than two tokens to store beside the "
                f"compress token and noise_vocab_size={self.noise_vocab_size}; "
                f"it must be at least {self.noise_vocab_size + 3}"
            )
        if self.seq_len < 2:
            raise ConfigError(
                f"seq_len={self.seq_len} has no room for a token and the compress token; "
                "it must be at least 2"
            )

    @property
    def content_size(self) -> int:
        """Tokens to store: 0 … V − 2 − N."""
        return self.vocab_size - 1 - self.noise_vocab_size

    @property
    def length(self) -> int:
        """L: nothing is shifted."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        shape, small = (rows, self.seq_len), self.content_size <= 2**15
        if small and self.frac_noise == 0:
            inputs = small_integers(rng, self.content_size, shape)
        else:
            kind = np.int16 if small else np.int64
            inputs = rng.integers(0, self.content_size, shape, kind).astype(np.int64)
        inputs[:, -1] = self.vocab_size - 1
        if self.frac_noise == 0:
            return Rows(inputs, inputs, inputs)
        is_noise = rng.random(inputs.shape) < self.frac_noise
        is_noise[:, -1] = False
        noise = rng.integers(self.content_size, self.vocab_size - 1, inputs.shape)
        answers = np.where(is_noise, IGNORE, inputs)
        return Rows(np.where(is_noise, noise, inputs), answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row in the published order of calls.

        The published generator forgets that noise is not scored; its targets are the inputs.
        """
        inputs = np.empty((1, self.seq_len), dtype=np.int64)
        inputs[0, :-1] = rng.choice(np.arange(self.content_size), size=self.seq_len - 1)
        inputs[0, -1] = self.vocab_size - 1
        answers = inputs.copy()
        if self.frac_noise > 0:
            noise = np.arange(self.content_size, self.vocab_size - 1)
            for at in range(self.seq_len - 1):
                if rng.random() < self.frac_noise:
                    inputs[0, at], answers[0, at] = rng.choice(noise), IGNORE
        return Rows(inputs, answers, answers)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return {
            "content": range(self.content_size),
            "noise": range(self.content_size, self.vocab_size - 1),
            "compress": range(self.vocab_size - 1, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """1 + (1 − ρ)(L − 1): the compress token is scored too."""
        return 1 + (1 - self.frac_noise) * (self.seq_len - 1)

    def chance(self) -> float:
        """(1 + m / K) / (1 + m), m = (1 − ρ)(L − 1): the compress token needs no guess."""
        guessed = self.expected_scored() - 1
        return (1 + guessed / self.content_size) / (1 + guessed)
