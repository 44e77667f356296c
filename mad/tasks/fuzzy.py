"""Fuzzy in-context recall: keys and values are motifs of one to three tokens.

    [arXiv 2403.17844, "fuzzy in-context recall"]

A row of V = 16, L = 20 with motifs of at most two tokens (keys 0–6, values 7–14, padding 15):

    inputs   15  15  15  15   4  14   9   2   6  10   1   2   9   3   8   4  14   9   1   2
    answers   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -  14   9   -   -   9

Key (4) stands for the value (14, 9) and key (1, 2), asked at the end, for (9); a value is scored
when its key has been shown before. In training a key has 1 … m_k tokens, in validation and test
always m_k; a value has 1 … m_v in all splits. A motif is an ordered choice of distinct tokens.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from mad.tasks.pairs import PairTask
from mad.tasks.task import IGNORE, Rows, Split, check_noise
from workbench.errors import ConfigError

Numbers = Int64[np.ndarray, "..."]


class Deck:
    """All motifs of one size in shuffled order, listed by number only."""

    def __init__(self, rng: np.random.Generator, tokens: int, size: int, first: int) -> None:
        self.tokens, self.size, self.first = tokens, size, first
        count = 1
        for at in range(size):
            count *= tokens - at
        self.order = np.arange(count)
        rng.shuffle(self.order)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A uniform motif."""
        number = int(self.order[rng.integers(0, len(self.order))])
        digits = []
        for at in reversed(range(self.size)):  # mixed radix, the last token fastest
            number, digit = divmod(number, self.tokens - at)
            digits.append(digit)
        free = list(range(self.first, self.first + self.tokens))
        return tuple(free.pop(digit) for digit in reversed(digits))


@dataclass(frozen=True)
class FuzzyInContextRecall(PairTask):
    """Motif pairs with a fresh random map per row; the probe pair is surely shown."""

    deck: ClassVar[type] = Deck
    """How legacy rows hold the shuffled motifs of one size."""

    k_motif_size: int = 3
    """Largest number of tokens m_k of a key."""
    v_motif_size: int = 3
    """Largest number of tokens m_v of a value."""

    def __post_init__(self) -> None:
        check_noise(self, self.noise_vocab_size, self.frac_noise)
        if self.k_motif_size < 1 or self.v_motif_size < 1:
            raise ConfigError(
                f"k_motif_size={self.k_motif_size} and v_motif_size={self.v_motif_size}: "
                "both must be at least 1"
            )
        special = self.noise_vocab_size + self.n_special
        keys, values = max(self.k_motif_size, 1), self.v_motif_size
        if self.n_keys < keys or self.n_values < values:
            least = special + max(2 * keys, 2 * values - 1)
            raise ConfigError(
                f"vocab_size={self.vocab_size} leaves {max(self.n_keys, 0)} key tokens and "
                f"{max(self.n_values, 0)} value tokens beside {special} special and noise tokens, "
                f"but a motif has up to {keys} distinct key and {values} distinct value tokens; "
                f"it must be at least {least}"
            )
        if (self.n_keys + 1) ** self.k_motif_size >= 2**62:
            raise ConfigError(
                f"k_motif_size={self.k_motif_size} with {self.n_keys} key tokens gives more than "
                "2^62 keys; lower one of them"
            )
        least = 2 * self.pair_size + 2
        if self.seq_len < least:
            raise ConfigError(
                f"seq_len={self.seq_len} has no room for a pair of k_motif_size + v_motif_size = "
                f"{self.pair_size} tokens and its probe; it must be at least {least}"
            )

    @property
    def n_special(self) -> int:
        """Padding, and the single-query form's copy token."""
        return 1 if self.multi_query else 2

    @property
    def pair_size(self) -> int:
        """Tokens of the longest pair: m_k + m_v."""
        return self.k_motif_size + self.v_motif_size

    @property
    def padding(self) -> int:
        """Token that fills a row from the left."""
        return self.vocab_size - self.n_special

    @property
    def length(self) -> int:
        """L: rows are padded to L + 1 before the shift."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once.

        A row takes pairs while it is shorter than T = L − c − (m_k + m_v), c the length of the
        probe pair. The probe is put in front of the first pair that starts at or behind a place
        p, unless its key came by itself before; p is uniform on 0 … T − (m_k + m_v), so that this
        happens before the row is full (the published p can lie behind the last pair).
        """
        probe = self._pairs(rng, (rows, 1), split)
        size = (probe.key_size + probe.value_size)[:, 0]
        limit = self.seq_len - size - self.pair_size
        place = rng.integers(0, np.maximum(limit - self.pair_size, 0) + 1)

        shortest = 1 + (1 if split == "train" else self.k_motif_size)
        slots = -(-int(limit.max()) // shortest)  # as many as the shortest pairs would need
        pairs = self._pairs(rng, (rows, slots), split)
        noise = np.zeros((rows, slots), dtype=bool)
        if self.frac_noise > 0:
            noise = rng.random((rows, slots)) < self.frac_noise

        # the value of a key is the one drawn with its first pair; noise is no key
        slot = np.broadcast_to(np.arange(slots), (rows, slots))
        code = np.where(noise, -1 - slot, self._code(pairs))
        first = first_of_equal(code)
        is_probe = code == self._code(probe)
        width = np.take_along_axis(pairs.value_size, first, axis=1)
        width = np.where(is_probe, probe.value_size, width)
        width = pairs.key_size + np.where(noise, pairs.value_size, width)
        start = width.cumsum(axis=1) - width

        at = (start < place[:, None]).sum(axis=1)  # the slot in front of which the probe goes
        missing = ~(is_probe & (slot < at[:, None])).any(axis=1)
        shifted = missing[:, None] & (slot >= at[:, None])
        kept = start + np.where(shifted, size[:, None], 0) < limit[:, None]
        scored = (first < slot) | (is_probe & shifted)
        scored &= ~noise if self.multi_query else np.False_

        # one more column: the probe at slot `at`, the slots from there on one further
        column = slot + shifted
        grid = np.empty((rows, slots + 1, self.pair_size), dtype=np.int64)
        used = np.zeros_like(grid, dtype=bool)
        asked = np.zeros_like(used)
        tokens, filled, is_value = self._lay_out(pairs, first, is_probe, probe, noise, rng)
        row = np.arange(rows)[:, None]
        grid[row, column] = tokens
        used[row, column] = filled & kept[..., None]
        asked[row, column] = is_value & scored[..., None]
        own, own_filled, own_value = self._one(probe)
        lone = np.flatnonzero(missing)
        grid[lone, at[lone]] = own[lone]
        used[lone, at[lone]] = own_filled[lone]

        # the probe once more at the end, behind the copy token where there is one
        grid = grid.reshape(rows, -1), own
        used = used.reshape(rows, -1), own_filled
        asked = asked.reshape(rows, -1), own_value
        if not self.multi_query:
            prefix = np.full((rows, 1), self.vocab_size - 1), np.ones((rows, 1), dtype=bool)
            grid = grid[0], prefix[0], own
            used = used[0], prefix[1], own_filled
            asked = asked[0], ~prefix[1], own_value
        return self._packed(*(np.concatenate(parts, axis=1) for parts in (grid, used, asked)))

    def _packed(
        self,
        tokens: Int64[np.ndarray, "rows places"],
        used: Bool[np.ndarray, "rows places"],
        asked: Bool[np.ndarray, "rows places"],
    ) -> Rows:
        """The used tokens, padded from the left to L + 1 and shifted."""
        free = self.seq_len + 1 - used.sum(axis=1)
        body = np.arange(self.seq_len + 1) >= free[:, None]
        whole = np.full(body.shape, self.padding, dtype=np.int64)
        targets = np.full(body.shape, IGNORE, dtype=np.int64)
        whole[body] = tokens[used]
        targets[body] = np.where(asked, tokens, IGNORE)[used]
        return Rows(whole[:, :-1], targets[:, 1:], whole[:, 1:])

    def _pairs(self, rng: np.random.Generator, shape: tuple[int, int], split: Split) -> "_Pairs":
        """Independent pairs: sizes, and as many distinct tokens as the largest size asks for."""
        if split == "train":
            key_size = rng.integers(1, self.k_motif_size + 1, shape)
        else:
            key_size = np.full(shape, self.k_motif_size)
        value_size = rng.integers(1, self.v_motif_size + 1, shape)
        keys = motifs(rng, shape, self.k_motif_size, self.n_keys)
        values = motifs(rng, shape, self.v_motif_size, self.n_values) + self.n_keys
        return _Pairs(key_size, value_size, keys, values)

    def _code(self, pairs: "_Pairs") -> Numbers:
        """A number ≥ 0 for every key, equal for equal keys only."""
        code = np.zeros(pairs.key_size.shape, dtype=np.int64)
        for at in range(self.k_motif_size):
            digit = np.where(at < pairs.key_size, pairs.keys[..., at] + 1, 0)
            code = code * (self.n_keys + 1) + digit
        return code

    def _one(self, probe: "_Pairs") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, which of them are used, and which are the value's: (rows, m_k + m_v) each."""
        tokens = np.concatenate([probe.keys, probe.values], axis=2)[:, 0]
        in_key = np.arange(self.k_motif_size) < probe.key_size
        in_value = np.arange(self.v_motif_size) < probe.value_size
        filled = np.concatenate([in_key, in_value], axis=1)
        return tokens, filled, np.concatenate([np.zeros_like(in_key), in_value], axis=1)

    def _lay_out(
        self,
        pairs: "_Pairs",
        first: Numbers,
        is_probe: np.ndarray,
        probe: "_Pairs",
        noise: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `_one` for all slots: every key with the value of its first slot, or the probe's."""
        values = np.take_along_axis(pairs.values, first[..., None], axis=1)
        values = np.where(is_probe[..., None], probe.values, values)
        size = np.take_along_axis(pairs.value_size, first, axis=1)
        size = np.where(is_probe, probe.value_size, size)
        tokens = np.concatenate([pairs.keys, values], axis=2)
        if self.frac_noise > 0:
            drawn = rng.integers(self.noise.start, self.noise.stop, tokens.shape)
            tokens = np.where(noise[..., None], drawn, tokens)
        in_key = np.arange(self.k_motif_size) < pairs.key_size[..., None]
        in_value = np.arange(self.v_motif_size) < size[..., None]
        filled = np.concatenate([in_key, in_value], axis=2)
        return tokens, filled, np.concatenate([np.zeros_like(in_key), in_value], axis=2)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """One row in the published order of calls, probes that are never shown included.

        The published generator lists all motifs of every size and shuffles the lists in each row.
        Shuffling the numbers of the motifs takes the same draws; the motif of a number is computed.
        """
        train = split == "train"
        key_sizes = range(1, self.k_motif_size + 1) if train else [self.k_motif_size]
        value_sizes = range(1, self.v_motif_size + 1)
        key_decks = {size: self.deck(rng, self.n_keys, size, 0) for size in key_sizes}
        value_decks = {
            size: self.deck(rng, self.n_values, size, self.n_keys) for size in value_sizes
        }
        key_size = int(rng.choice(list(key_sizes))) if train else self.k_motif_size
        value_size = int(rng.choice(list(value_sizes)))
        probe, answer = key_decks[key_size].draw(rng), value_decks[value_size].draw(rng)
        size = key_size + value_size
        place = int(rng.choice(self.seq_len - 2 * size))
        shown: dict[tuple[int, ...], tuple[int, ...]] = {}
        added = False
        sequence: list[int] = []
        targets: list[int] = []
        while len(sequence) < self.seq_len - size - self.pair_size:
            key_size = int(rng.choice(list(key_sizes))) if train else self.k_motif_size
            value_size = int(rng.choice(list(value_sizes)))
            if len(sequence) >= place and not added:
                added, shown[probe] = True, answer
                sequence += [*probe, *answer]
                targets += [IGNORE] * size
                continue
            if self.frac_noise > 0 and rng.random() < self.frac_noise:
                sequence += rng.choice(np.array(self.noise), size=key_size + value_size).tolist()
                targets += [IGNORE] * (key_size + value_size)
                continue
            key = key_decks[key_size].draw(rng)
            repeated = key in shown
            if key == probe:
                added, shown[key] = True, answer
            elif not repeated:
                shown[key] = value_decks[value_size].draw(rng)
            value = shown[key]
            sequence += [*key, *value]
            targets += [IGNORE] * len(key)
            targets += value if repeated and self.multi_query else [IGNORE] * len(value)
        if not self.multi_query:
            sequence, targets = [*sequence, self.vocab_size - 1], [*targets, IGNORE]
        sequence += [*probe, *answer]
        targets += [IGNORE] * len(probe) + [*answer]
        free = self.seq_len + 1 - len(sequence)
        whole = np.array([[self.padding] * free + sequence], dtype=np.int64)
        asked = np.array([[IGNORE] * free + targets], dtype=np.int64)
        return Rows(whole[:, :-1], asked[:, 1:], whole[:, 1:])

    def answerable(self, rows: Rows) -> Bool[np.ndarray, " rows"]:
        """Was the key that is asked last shown before? Always, except in legacy rows.

        Keys and values have tokens of their own, so a key is a whole run of key tokens.
        """
        whole = np.concatenate([rows.inputs, rows.dense[:, -1:]], axis=1)
        is_key = whole < self.n_keys
        is_value = ~is_key & (whole < self.content_size)
        n, at = len(whole), np.arange(whole.shape[1])
        value_at = whole.shape[1] - np.argmin(is_value[:, ::-1], axis=1)
        before = np.where(at < value_at[:, None], ~is_key, True)
        before[at >= value_at[:, None]] = False
        key_at = np.where(before, at, -1).max(axis=1) + 1
        size = value_at - key_at
        fits = np.ones_like(is_key)
        fits[:, 1:] &= ~is_key[:, :-1]
        padded = np.pad(whole, ((0, 0), (0, self.k_motif_size + 1)), constant_values=self.padding)
        row = np.arange(n)
        for step in range(self.k_motif_size):
            wanted = padded[row, key_at + step]
            same = padded[:, step : step + len(at)] == wanted[:, None]
            fits &= same | (step >= size)[:, None]
        after = np.take_along_axis(padded, at + size[:, None], axis=1)
        fits &= (after >= self.n_keys) & (after < self.content_size)
        return (fits & (at < key_at[:, None])).any(axis=1)

    def token_kinds(self) -> dict[str, range]:
        """Which tokens play which part."""
        return super().token_kinds() | {
            "padding": range(self.padding, self.padding + 1),
            "copy": range(self.padding + 1, self.vocab_size),
        }

    def expected_scored(self) -> float:
        """Expected scored tokens of a test row (see `expected_scored_of`)."""
        return self.expected_scored_of("test")

    def expected_scored_of(self, split: Split) -> float:
        """E[size of a value] · (1 + Σ_i P(slot i is reached) · P(its key was shown before)).

        i counts the drawn slots. Their starts are sums of independent sizes, moved by the probe
        pair once it was put in; a key k of probability q_k was shown among i slots with
        probability 1 − (1 − (1 − ρ) q_k)^i, and the probe's surely once it was put in. That a
        repeated key brings its old value's size along is left out (within two percent).
        """
        mean_value = (self.v_motif_size + 1) / 2
        if not self.multi_query:
            return mean_value
        key_sizes = range(1, self.k_motif_size + 1) if split == "train" else [self.k_motif_size]
        value_sizes = range(1, self.v_motif_size + 1)
        groups = []  # probability of a key of each size, and how many there are
        for size in key_sizes:
            count = math.perm(self.n_keys, size)
            groups.append((1 / (len(key_sizes) * count), count))
        sizes = [key + value for key in key_sizes for value in value_sizes]
        step = np.bincount(sizes) / len(sizes)
        pair = 1 - self.frac_noise
        same = sum(count * q * q for q, count in groups)  # P(two drawn keys are equal)

        start = np.zeros(self.seq_len)  # start[x] = P(slot i starts at x)
        start[0] = 1.0
        starts = [start]
        while len(starts) * min(sizes) < self.seq_len:
            starts.append(np.convolve(starts[-1], step)[: self.seq_len])
        before = np.cumsum(starts, axis=1) - starts  # (slot, place): P(start < place)
        slot = np.arange(len(starts))

        def shown(power: int) -> np.ndarray:
            """Σ_k q_k^power · P(k was shown before slot i)."""
            return sum(
                (n * q**power * (1 - (1 - pair * q) ** slot) for q, n in groups), np.zeros(1)
            )

        total = 0.0
        for size in sizes:
            limit = self.seq_len - size - self.pair_size
            places = np.arange(max(limit - self.pair_size, 0) + 1)
            # not yet put in: start < place; put in: place ≤ start < limit − size
            early = before[:, places].mean(axis=1)
            shifted = np.maximum(before[:, [max(limit - size, 0)]] - before[:, places], 0)
            unshifted = before[:, [limit]] - before[:, places]
            at = np.argmax(before[:, places] < 0.5, axis=0)  # the slot the probe is put in front of
            seen = shown(1)[at]  # the probe's key came by itself before
            late = ((1 - seen) * shifted + seen * unshifted).mean(axis=1)
            probe_again = same - shown(2)
            total += float((early * shown(1) + late * (shown(1) + probe_again)).sum())
        return mean_value * (1 + pair * total / len(sizes))


class _Pairs(NamedTuple):
    """Motif pairs of any leading shape; a motif is the first `size` tokens of its row."""

    key_size: Numbers
    value_size: Numbers
    keys: Numbers
    values: Numbers


def motifs(
    rng: np.random.Generator, shape: tuple[int, ...], size: int, tokens: int
) -> Int64[np.ndarray, "*shape size"]:
    """Uniform ordered choices of `size` distinct tokens below `tokens`, without listing them.

    Token j is drawn as the r-th of those still free, r < tokens − j: r moves up by one for every
    chosen token, taken in rising order, that is not above it (Lehmer's code).

    >>> motifs(np.random.default_rng(0), (2,), 3, 3).tolist()
    [[2, 1, 0], [1, 0, 2]]
    """
    chosen = np.empty((*shape, size), dtype=np.int64)
    for at in range(size):
        token = rng.integers(0, tokens - at, shape)
        for other in np.moveaxis(np.sort(chosen[..., :at], axis=-1), -1, 0):
            token += token >= other
        chosen[..., at] = token
    return chosen


def first_of_equal(codes: Int64[np.ndarray, "rows slots"]) -> Int64[np.ndarray, "rows slots"]:
    """For every slot, the first slot of its row with the same code.

    >>> first_of_equal(np.array([[5, 7, 5, 7, 5, 1]])).tolist()
    [[0, 1, 0, 1, 0, 5]]
    """
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    at = np.broadcast_to(np.arange(codes.shape[1]), codes.shape)
    new = np.ones_like(codes, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    leader = np.maximum.accumulate(np.where(new, at, 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, leader, axis=1), axis=1)
    return first
