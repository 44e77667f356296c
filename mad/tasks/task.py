"""What a task is, and the counter-seeded engine that draws its rows.

A row is a function of (task options, seed, split, row index) and of nothing else: rows are drawn in
blocks of 1024, block b of a split from its own Philox counter range under a key hashed from the
options, so any worker may draw any block in any order and the bytes stay the same.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int64

from workbench.errors import ConfigError

IGNORE = -100
"""Target value of positions that are not scored."""

BLOCK_ROWS = 1024
"""Rows drawn together from one counter range of the generator."""

Split = Literal["train", "val", "test"]
Tokens = Int64[np.ndarray, "rows time"]


class Rows(NamedTuple):
    """Aligned arrays (rows, time): the model's output at t is scored against the target at t."""

    inputs: Tokens
    """Token ids the model reads."""
    answers: Tokens
    """Answer tokens where the task asks for one, `IGNORE` elsewhere: what is scored."""
    dense: Tokens
    """Next-token targets everywhere for the recall tasks; equal to `answers` for the others."""


@dataclass(frozen=True)
class Task(ABC):
    """Options of one task setting together with the functions that draw and describe its rows."""

    version: ClassVar[int] = 1
    """Raised when the drawn bytes change, so that old and new data never share a key."""
    backbone: ClassVar[str] = "language-model"
    """Backbone the task is made for: `language-model` or `autoencoder`."""
    repeats_rows: ClassVar[bool] = False
    """May test rows repeat training rows by design? Then leakage is not warned about."""

    vocab_size: int = 16
    """Number of tokens V, special ones included."""
    seq_len: int = 128
    """Length L of the sequence before the autoregressive shift."""

    @cached_property
    def canonical_options(self) -> str:
        """The options as JSON with sorted keys and no spaces: they key the streams of the rows."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of positions the model reads."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """`rows` independent rows, vectorised; few tasks draw their splits by different laws."""

    @abstractmethod
    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row (rows = 1) in the published generator's order of random calls."""

    @abstractmethod
    def expected_scored(self) -> float:
        """Expected number of scored positions of a row, in closed form."""

    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing uniformly among the possible answers."""

    def ceiling(self, num_train_examples: int) -> float:
        """Largest expected accuracy after training on that many rows; 1 unless stated."""
        del num_train_examples
        return 1.0

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part; the ranges are disjoint and cover the vocabulary."""
        return {"content": range(self.vocab_size)}

    def answerable(self, rows: Rows) -> Bool[np.ndarray, " rows"]:
        """Does a row hold what its answers ask for? Always, unless a task says otherwise."""
        return np.ones(len(rows.inputs), dtype=bool)


def check_noise(task: Task, noise_vocab_size: int, frac_noise: float) -> None:
    """Raise ConfigError unless the noise options of a task make sense."""
    if noise_vocab_size < 0:
        raise ConfigError(f"noise_vocab_size={noise_vocab_size} is negative; use 0 for no noise")
    if not 0.0 <= frac_noise < 1.0:
        raise ConfigError(f"frac_noise={frac_noise} lies outside [0, 1); choose e.g. 0.2")
    if frac_noise > 0 and noise_vocab_size == 0:
        raise ConfigError(
            f"frac_noise={frac_noise} needs noise tokens, but noise_vocab_size=0; "
            "raise --noise-vocab-size (and --vocab-size with it)"
        )


def check_common(task: Task, noise_vocab_size: int, frac_noise: float) -> None:
    """Raise ConfigError unless noise options and an even length make sense."""
    check_noise(task, noise_vocab_size, frac_noise)
    if task.seq_len % 2 or task.seq_len < 4:
        raise ConfigError(
            f"seq_len={task.seq_len} cannot be cut into key-value pairs; "
            "it must be even and at least 4"
        )


def block_generator(task: Task, split: Split, seed: int, block: int) -> np.random.Generator:
    """The random generator of one block of 1024 rows.

    Philox4x64 with key = first 16 bytes of SHA-256(canonical options, seed, split) and the block
    number in the counter's highest word, so blocks and splits never share a stretch of the stream.
    """
    key = np.frombuffer(stream_key(task, split, seed), dtype="<u8").astype(np.uint64)
    counter = np.array([0, 0, 0, block], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def small_integers(rng: np.random.Generator, high: int, shape: tuple[int, int]) -> Tokens:
    """Uniform integers below `high` ≤ 2^16: the numbers of `rng.integers(0, high, shape, int16)`.

    A 16-bit word x gives ⌊x · high / 2^16⌋; it is passed over if x · high mod 2^16 < 2^16 mod high
    [arXiv 1805.10941, alg. 5]. All words are multiplied at once, which is faster. Some are taken in
    reserve, so what `rng` draws next is not what numpy's own call would leave.

    >>> small_integers(np.random.default_rng(0), 15, (1, 6)).tolist()
    [[7, 12, 13, 9, 12, 7]]
    """
    n = shape[0] * shape[1]
    refused = 2**16 % high
    words = np.empty(0, dtype="<u2")
    while len(words) < n:  # again once in a blue moon: a few words more than needed are drawn
        count = (n - len(words)) // 4 + n * refused // 2**17 + 4
        more = rng.bit_generator.random_raw(count).astype("<u8", copy=False).view("<u2")
        low = more * np.uint16(high)
        if low.min() < refused:
            more = more[low >= refused]
        words = np.concatenate([words, more]) if len(words) else more
    product = words[:n].astype(np.int64).reshape(shape)
    product *= high
    product >>= 16
    return product


def stream_key(task: Task, split: Split, seed: int) -> bytes:
    """The 16 bytes that key the streams of a split."""
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r} is unknown; choose one of {', '.join(get_args(Split))}")
    name = json.dumps(type(task).__qualname__)
    canonical = (
        f'{{"options":{task.canonical_options},"seed":{seed},"split":"{split}","task":{name},'
        f'"version":{task.version}}}'
    )  # keys in the order of the alphabet, no spaces
    return hashlib.sha256(canonical.encode("utf-8")).digest()[:16]


def generate(
    task: Task,
    n: int,
    split: Split,
    seed: int,
    start: int = 0,
    *,
    legacy: bool = False,
    train_rows: int | None = None,
) -> Rows:
    """Rows start … start + n − 1 of a split.

    With `legacy`, rows come one after the other from `default_rng(seed)` as the published
    generators draw them, training rows first: the test rows continue the stream behind
    `train_rows` training rows and never restart it.

    Arrays of equal content may be one and the same: copy before writing into one.

    >>> from mad.tasks.memorization import Memorization
    >>> task = Memorization(vocab_size=16, seq_len=8)
    >>> whole, part = generate(task, 1500, "train", 0), generate(task, 500, "train", 0, start=1000)
    >>> bool((whole.inputs[1000:] == part.inputs).all())
    True
    """
    if n < 1 or start < 0:
        raise ConfigError(f"{n} rows from row {start} were asked for; both must be sensible counts")
    if legacy:
        if split == "train":
            sizes: dict[Split, int] = {"train": start + n}
        elif split == "test" and train_rows is not None:
            sizes = {"train": train_rows, "test": start + n}
        else:
            raise ConfigError(
                f"legacy rows of split {split!r} continue the stream behind the training rows; "
                "ask for split test with train_rows=, or use generate_splits"
            )
        return Rows(*(part[start:] for part in generate_splits(task, sizes, seed, True)[split]))
    first, last = start // BLOCK_ROWS, (start + n - 1) // BLOCK_ROWS
    blocks = [
        task.draw(block_generator(task, split, seed, block), BLOCK_ROWS, split)
        for block in range(first, last + 1)
    ]
    offset = start - first * BLOCK_ROWS
    if len(blocks) == 1:
        return Rows(*(np.ascontiguousarray(part[offset : offset + n]) for part in blocks[0]))
    return Rows(
        *(np.concatenate(parts)[offset : offset + n] for parts in zip(*blocks, strict=True))
    )


def generate_legacy(task: Task, n: int, rng: np.random.Generator, split: Split = "train") -> Rows:
    """`n` rows one after the other from one stream, as the published generators draw them."""
    rows = [task.legacy_row(rng, split) for _ in range(n)]
    return Rows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def generate_splits(
    task: Task, sizes: dict[Split, int], seed: int, legacy: bool = False
) -> dict[Split, Rows]:
    """All splits of a data set.

    Legacy splits share one `default_rng(seed)` in the order train, test, val (the last is not
    published; it has the law of the test rows).
    """
    if not legacy:
        return {split: generate(task, n, split, seed) for split, n in sizes.items()}
    rng = np.random.default_rng(seed)
    order: tuple[Split, ...] = ("train", "test", "val")
    return {
        split: generate_legacy(task, sizes[split], rng, split) for split in order if split in sizes
    }
