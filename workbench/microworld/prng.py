"""A small random generator whose bits are the same on every platform and Python version.

splitmix64 (Steele, Lea & Flood 2014) with its start hashed from a *name*: two streams whose names
differ in one digit share nothing, not even shifted by a draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of splitmix64
FIRST_MIX = 0xBF58476D1CE4E5B9
SECOND_MIX = 0x94D049BB133111EB

Item = TypeVar("Item")


def hash64(name: str) -> int:
    """A 64-bit hash of a text, equal everywhere (BLAKE2b, first eight bytes, little endian)."""
    return int.from_bytes(blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


class Stream:
    """Endless 64-bit numbers, a function of the name alone.

    >>> Stream("seed 0/train/doc/0").below(100) == Stream("seed 0/train/doc/0").below(100)
    True
    """

    def __init__(self, name: str) -> None:
        self.state = hash64(name)

    def bits(self) -> int:
        """The next 64 bits."""
        self.state = (self.state + GOLDEN) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * FIRST_MIX) & MASK
        z = ((z ^ (z >> 27)) * SECOND_MIX) & MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """A whole number in 0 … n - 1 by multiplication (bias below n / 2^64)."""
        return (self.bits() * n) >> 64

    def uniform(self) -> float:
        """A number in [0, 1) on the grid of 2^-53."""
        return (self.bits() >> 11) * 2.0**-53


class Draws:
    """Random choices that remember their own log-probability.

    Each choice that leaves a visible trace in the text adds its log-probability to `logp`; a text
    with one derivation therefore has exactly the probability exp(logp).
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.logp = 0.0

    def below(self, n: int) -> int:
        """Uniform in 0 … n - 1, counted."""
        self.logp -= math.log(n)
        return self.silent_below(n)

    def between(self, low: int, high: int) -> int:
        """Uniform in low … high, both included, counted."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items, uniform, counted."""
        return items[self.below(len(items))]

    def coin(self, probability: float) -> bool:
        """True with the given probability, counted."""
        if self.silent_coin(probability):
            self.logp += math.log(probability)
            return True
        self.logp += math.log1p(-probability)
        return False

    def weighted(self, weights: Sequence[float]) -> int:
        """An index with probability proportional to its weight, counted."""
        index = self.silent_weighted(weights)
        self.logp += math.log(weights[index] / sum(weights))
        return index

    def silent_coin(self, probability: float) -> bool:
        """A coin whose side the text does not show; the caller adds the marginal to `logp`."""
        return self.stream.uniform() < probability

    def silent_below(self, n: int) -> int:
        """A uniform number whose value the text does not show; see `silent_coin`."""
        return self.stream.below(n)

    def silent_weighted(self, weights: Sequence[float]) -> int:
        """A weighted index that is not counted."""
        threshold = self.stream.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            threshold -= weight
            if threshold < 0:
                return index
        return len(weights) - 1
