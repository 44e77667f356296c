"""State tracking: after every token, the state that all tokens so far lead to.

    [arXiv 2207.02098 for parity and modular addition; arXiv 2404.08819 for S5 and A5]

Running sum modulo m = V = 5 (parity is V = 2), L = 6:

    inputs    3   4   0   1   2   2          y_t = (y_{t-1} + x_t) mod m,  y_{-1} = 0
    answers   3   2   2   3   0   2

Running product of permutations, tokens in lexicographic order; S3: 0 = (0 1 2), 1 = (0 2 1),
2 = (1 0 2), 3 = (1 2 0), 4 = (2 0 1), 5 = (2 1 0), L = 4:

    inputs    1   2   2   4                  s_t = x_t ∘ s_{t-1}: the first token acts first
    answers   1   3   1   5

All positions are scored. Sums are solvable by a diagonal recurrence with signs or phases; the word
problem of S5 and A5 is not solvable and needs non-commuting state transitions.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int64

from mad.tasks.task import Rows, Split, Task
from workbench.errors import ConfigError

Group = Literal["S3", "A4", "S4", "A5", "S5"]


def check_length(seq_len: int) -> None:
    """Raise ConfigError unless there is a token."""
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len}: there is nothing to add up; choose at least 1")


@dataclass(frozen=True)
class ModularAddition(Task):
    """Running sum of uniform numbers modulo the vocabulary size."""

    vocab_size: int = 5
    """Modulus m: tokens are the numbers 0 … m − 1."""
    seq_len: int = 64
    """Length L."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(
                f"vocab_size={self.vocab_size} is the modulus of the sum; it must be at least 2"
            )
        check_length(self.seq_len)

    @property
    def length(self) -> int:
        """L: nothing is shifted."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once."""
        inputs = rng.integers(0, self.vocab_size, (rows, self.seq_len))
        answers = inputs.cumsum(axis=1) % self.vocab_size
        return Rows(inputs, answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, written plainly."""
        tokens, sums = [], [0]
        for _ in range(self.seq_len):
            tokens.append(int(rng.integers(0, self.vocab_size)))
            sums.append((sums[-1] + tokens[-1]) % self.vocab_size)
        answers = np.array([sums[1:]], dtype=np.int64)
        return Rows(np.array([tokens], dtype=np.int64), answers, answers)

    def expected_scored(self) -> float:
        """L."""
        return float(self.seq_len)

    def chance(self) -> float:
        """1 / m."""
        return 1 / self.vocab_size


@dataclass(frozen=True)
class Parity(ModularAddition):
    """Running parity of bits: modular addition with m = 2."""

    vocab_size: int = 2
    """Tokens are the bits 0 and 1."""

    def __post_init__(self) -> None:
        if self.vocab_size != 2:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: parity has the tokens 0 and 1, so it must be 2; "
                "the task modular-addition takes other moduli"
            )
        check_length(self.seq_len)


@cache
def permutations(group: Group) -> tuple[tuple[int, ...], ...]:
    """The group's elements in lexicographic order: all permutations (S), or the even ones (A).

    >>> permutations("S3")[1:3]
    ((0, 2, 1), (1, 0, 2))
    """
    n = int(group[1])
    found = itertools.permutations(range(n))
    if group[0] == "S":
        return tuple(found)
    pairs = list(itertools.combinations(range(n), 2))
    return tuple(p for p in found if sum(p[i] > p[j] for i, j in pairs) % 2 == 0)


@cache
def products(group: Group) -> Int64[np.ndarray, "order order"]:
    """Number of a ∘ b (b acts first) at [a, b].

    >>> int(products("S3")[2, 1])
    3
    """
    elements = permutations(group)
    number = {p: i for i, p in enumerate(elements)}
    table = [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
    whole = np.array(table, dtype=np.int64)
    whole.flags.writeable = False
    return whole


@dataclass(frozen=True)
class StateTracking(Task):
    """Running product of uniform elements of a permutation group."""

    vocab_size: int = 60
    """Number of tokens: the order of the group."""
    seq_len: int = 32
    """Length L."""
    group: Group = "A5"
    """S3, A4, S4 (solvable, 6, 12, 24 elements), A5, S5 (not solvable, 60, 120)."""

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise ConfigError(
                f"group={self.group!r} is unknown; choose one of {', '.join(get_args(Group))}"
            )
        order = len(permutations(self.group))
        if self.vocab_size != order:
            raise ConfigError(
                f"vocab_size={self.vocab_size} is not the number of elements of group "
                f"{self.group}; it must be {order}"
            )
        check_length(self.seq_len)

    @property
    def length(self) -> int:
        """L: nothing is shifted."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once, one look-up per position; the identity is token 0."""
        inputs = rng.integers(0, self.vocab_size, (rows, self.seq_len))
        table, answers = products(self.group), np.empty_like(inputs)
        state = np.zeros(rows, dtype=np.int64)
        for t in range(self.seq_len):
            state = table[inputs[:, t], state]
            answers[:, t] = state
        return Rows(inputs, answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row, written plainly: permutations are composed as such."""
        elements = permutations(self.group)
        state = elements[0]
        tokens, answers = [], []
        for _ in range(self.seq_len):
            tokens.append(int(rng.integers(0, self.vocab_size)))
            state = tuple(elements[tokens[-1]][i] for i in state)
            answers.append(elements.index(state))
        found = np.array([answers], dtype=np.int64)
        return Rows(np.array([tokens], dtype=np.int64), found, found)

    def token_kinds(self) -> dict[str, range]:
        """All tokens are permutations."""
        return {"permutation": range(self.vocab_size)}

    def expected_scored(self) -> float:
        """L."""
        return float(self.seq_len)

    def chance(self) -> float:
        """1 / order of the group."""
        return 1 / self.vocab_size
