"""The microworld: a probabilistic grammar whose every text has a known probability.

    doc    documents of facts and rules, then questions about them
    world  a fixed world of invented cities: tellings, questions, true-or-false claims
    sum    additions of two numbers
    text   pieces of real docstrings (no known probability)

Each sample is a function of (seed, split, kind, index) alone, on every platform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from workbench.errors import ConfigError, unknown_name
from workbench.microworld import grammar
from workbench.microworld.grammar import Lexicon, join
from workbench.microworld.natural import docstring_slice
from workbench.microworld.prng import Draws, Stream, hash64

Split = Literal["train", "test"]
Pool = Literal["stated", "held_out", "all"]

EMPTY_DOCUMENT = 1 / 16  # share of documents without facts: every answer is "unknown"
STYLE_RULE, CAPITALS_RULE, BAN_RULE = 0.5, 0.5, 0.4
ABSENT_QUESTION, ADJECTIVE_QUESTION = 0.1, 0.1
SAME_FACT = 0.3  # share of world items about the fact of the item before
WORLD_ITEMS = ("claim", "tell", "ask")
WORLD_ITEM_WEIGHTS = (0.5, 0.25, 0.25)
HARD_SUM = 0.65
HELD_OUT_PAIRS = 0.1

# classes of words: they drive the loss weights and the metrics
WORD, OPEN, SUFFIX, VALUE = "word", "open", "suffix", "value"


@dataclass(frozen=True)
class Sample:
    """One text of the microworld."""

    words: list[tuple[str, str]]
    """(word, class) in order; a text of the kind "text" is one pseudo-word of class "text"."""
    text: str
    """The running text, without the framing `<s> … </s>`."""
    logp: float | None
    """Natural log of the text's probability under the grammar; None for real text."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What was drawn: facts, rules, turns with the index of their answer word, …"""


@dataclass(frozen=True)
class World:
    """A seeded microworld.

    >>> World().sample("sum", 0, easy=True).text.split()[0]
    'Q'

    Raises:
        ConfigError: a share outside its range, or a lexicon with an empty class.
    """

    seed: int = 0
    """Seed of the world's facts and of all samples."""
    noise: float = 0.0
    """Probability that a stated value or a claim's label is replaced by a wrong one."""
    held_out: float = 0.23
    """Share of the world's facts that training never states, asks or claims."""
    n_cities: int = 64
    """Number of cities, from the front of the lexicon's list."""
    lexicon: Lexicon = field(default_factory=Lexicon)
    """The open word classes."""
    largest_summand: int = grammar.LARGEST_SUMMAND
    """Largest number in a hard sum."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ConfigError(f"noise is {self.noise}; a probability in [0, 1) is needed")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; a share in [0, 1) is needed")
        if not 1 <= self.n_cities <= len(self.lexicon.cities):
            raise ConfigError(
                f"n_cities is {self.n_cities}; the lexicon has {len(self.lexicon.cities)} cities"
            )
        if not 1 <= self.largest_summand <= grammar.LARGEST_SUMMAND:
            raise ConfigError(
                f"largest_summand is {self.largest_summand}; "
                f"1 to {grammar.LARGEST_SUMMAND} have a word"
            )
        facts: dict[tuple[str, str], str] = {}
        stream = Stream(f"world {self.seed}/facts")
        for city in self.lexicon.cities[: self.n_cities]:
            for relation in grammar.WORLD_RELATIONS:
                values = self.lexicon.values(relation)
                facts[city, relation] = values[stream.below(len(values))]
        by_hash = sorted(facts, key=lambda key: hash64(f"held out {self.seed}/{key[0]}/{key[1]}"))
        hidden = frozenset(by_hash[: round(self.held_out * len(facts))])
        object.__setattr__(self, "facts", facts)
        object.__setattr__(self, "held_out_facts", hidden)
        object.__setattr__(
            self,
            "pools",
            {
                "stated": tuple(key for key in facts if key not in hidden),
                "held_out": tuple(key for key in facts if key in hidden),
                "all": tuple(facts),
            },
        )
        object.__setattr__(self, "pairs", {})

    facts: dict[tuple[str, str], str] = field(init=False, repr=False, compare=False)
    """(city, relation) → value."""
    held_out_facts: frozenset[tuple[str, str]] = field(init=False, repr=False, compare=False)
    """The facts that no training text touches."""
    pools: dict[str, tuple[tuple[str, str], ...]] = field(init=False, repr=False, compare=False)
    """"stated", "held_out", "all" → facts."""
    pairs: dict[tuple[bool, str], tuple[tuple[int, int], ...]] = field(
        init=False, repr=False, compare=False
    )
    """(easy, pool) → pairs of summands; filled on first use."""

    # ------------------------------------------------------------------ public

    def sample(self, kind: str, index: int, split: Split = "train", **options: Any) -> Sample:
        """Sample `index` of a kind; the options are those of the kind's method below.

        Raises:
            ConfigError: unknown kind or split.
        """
        if kind not in KINDS:
            raise unknown_name("kind of text", kind, list(KINDS))
        if split not in ("train", "test"):
            raise unknown_name("split", split, ["train", "test"])
        stream = Stream(f"world {self.seed}/{split}/{kind}/{index}")
        if kind == "text":
            return self.natural(stream, split, **options)
        draws = Draws(stream)
        words, meta = KINDS[kind](self, draws, **options)
        return Sample(words, join([word for word, _ in words]), draws.logp, meta)

    def texts(
        self, kind: str, n: int, split: Split = "train", start: int = 0, **options: Any
    ) -> list[str]:
        """The texts of samples start … start + n - 1."""
        indices = range(start, start + n)
        return [self.sample(kind, index, split, **options).text for index in indices]

    def statements(self, n: int, split: Split = "train", **options: Any) -> list[dict[str, Any]]:
        """Claims with their truth; see `workbench.microworld.exporters.statements`."""
        from workbench.microworld import exporters

        return exporters.statements(self, n, split, **options)

    def choices(self, n: int, split: Split = "train", **options: Any) -> list[dict[str, Any]]:
        """Multiple choice; see `workbench.microworld.exporters.choices`."""
        from workbench.microworld import exporters

        return exporters.choices(self, n, split, **options)

    def document_items(
        self, n: int, split: Split = "train", **options: Any
    ) -> list[dict[str, Any]]:
        """Documents with questions; see `workbench.microworld.exporters.document_items`."""
        from workbench.microworld import exporters

        return exporters.document_items(self, n, split, **options)

    def entropy_floor(
        self, kind: str, n: int = 2000, split: Split = "test", **options: Any
    ) -> float:
        """Nats per token no model can beat; see `workbench.microworld.entropy.entropy_floor`."""
        from workbench.microworld import entropy

        return entropy.entropy_floor(self, kind, n=n, split=split, **options)

    # ------------------------------------------------------------------ documents

    def document(
        self,
        draws: Draws,
        *,
        n_facts: tuple[int, int] = (8, 24),
        n_turns: tuple[int, int] = (8, 16),
        rules: bool = True,
        empty: float = EMPTY_DOCUMENT,
    ) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """[rules] "Facts" fact{n} turn{m}; with probability `empty` no facts at all.

        Raises:
            ConfigError: a range that is empty or asks for more things than there are.
        """
        things = self.lexicon.things
        if not 1 <= n_facts[0] <= n_facts[1] <= len(things):
            raise ConfigError(f"n_facts is {n_facts}; a range inside 1 to {len(things)} is needed")
        if not 1 <= n_turns[0] <= n_turns[1]:
            raise ConfigError(f"n_turns is {n_turns}; a range that begins at 1 or more is needed")
        words: list[tuple[str, str]] = []
        rule: dict[str, Any] = {"suffix": None, "capitals": False, "banned": None}
        if rules:
            self._draw_rules(draws, rule, words)
        n = 0 if draws.coin(empty) else draws.between(*n_facts)
        m = draws.between(*n_turns)
        facts = self._draw_facts(draws, n, words)
        prompt_words = len(words)
        told = {fact["thing"] for fact in facts}
        absent = [thing for thing in things if thing not in told]
        turns = [self._draw_turn(draws, facts, absent, rule, words) for _ in range(m)]
        meta = {"rules": rule, "facts": facts, "turns": turns, "prompt_words": prompt_words}
        return words, meta

    def _draw_rules(self, draws: Draws, rule: dict[str, Any], words: list[tuple[str, str]]) -> None:
        if draws.coin(STYLE_RULE):
            if draws.coin(CAPITALS_RULE):
                rule["capitals"] = True
                words += fill(grammar.RULE_CAPITALS)
            else:
                rule["suffix"] = draws.choice(self.lexicon.suffixes)
                words += fill(grammar.RULE_SUFFIX, v=(rule["suffix"], OPEN))
        if draws.coin(BAN_RULE):
            rule["banned"] = draws.choice(list(self.lexicon.topics))
            words += fill(grammar.RULE_BAN, v=(rule["banned"], OPEN))

    def _draw_facts(
        self, draws: Draws, n: int, words: list[tuple[str, str]]
    ) -> list[dict[str, Any]]:
        remaining = list(self.lexicon.things)
        facts = []
        if n:
            words.append(("Facts", WORD))
        for _ in range(n):
            thing = remaining.pop(draws.below(len(remaining)))
            relation = grammar.RELATIONS[draws.weighted(grammar.RELATION_WEIGHTS)]
            adjective = None if relation == "colour" else draws.choice(self.lexicon.adjectives)
            value = draws.choice(self.lexicon.values(relation))
            wording = fill(
                draws.choice(grammar.FACTS[relation]),
                t=(thing, OPEN),
                a=(adjective or "", OPEN),
                v=(value, OPEN),
            )
            words += wording
            facts.append(
                {
                    "thing": thing,
                    "relation": relation,
                    "adjective": adjective,
                    "value": value,
                    "text": join([word for word, _ in wording]),
                }
            )
        return facts

    def _draw_turn(
        self,
        draws: Draws,
        facts: list[dict[str, Any]],
        absent: list[str],
        rule: dict[str, Any],
        words: list[tuple[str, str]],
    ) -> dict[str, Any]:
        is_absent = bool(absent) and (not facts or draws.coin(ABSENT_QUESTION))
        if is_absent:
            fact: dict[str, Any] = {}
            thing = draws.choice(absent)
            asked = self._absent_question(draws)
        else:
            fact = draws.choice(facts)
            thing, asked = fact["thing"], fact["relation"]
            if asked != "colour" and draws.coin(ADJECTIVE_QUESTION):
                asked = "adjective"
        question = [
            ("Q", WORD),
            *fill(draws.choice(grammar.QUESTIONS[asked]), t=(thing, OPEN)),
            ("A", WORD),
        ]
        answer, kind = self.answer(thing, asked, fact, rule)
        words += question
        turn = {
            "question": join([word for word, _ in question]),
            "thing": thing,
            "asked": asked,
            "kind": kind,
            "answer": answer,
            "word": len(words),
        }
        shouted = rule["capitals"] and answer in grammar.CAPITALISED.values()
        words.append((answer, "answer:" + ("upper" if shouted else kind)))
        if rule["suffix"]:
            words.append((rule["suffix"], SUFFIX))
        words.append((".", WORD))
        return turn

    def _absent_question(self, draws: Draws) -> str:
        """What is asked about a thing that the document does not mention.

        A question for the adjective does not show which relation it replaced, so the sum over
        both is what is counted.
        """
        weights = grammar.RELATION_WEIGHTS
        index = draws.silent_weighted(weights)
        asked = grammar.RELATIONS[index]
        with_adjective = sum(weights[:-1])  # all but the colour
        if asked == "colour":
            probability = weights[index]
        elif draws.silent_coin(ADJECTIVE_QUESTION):
            asked, probability = "adjective", with_adjective * ADJECTIVE_QUESTION
        else:
            probability = weights[index] * (1 - ADJECTIVE_QUESTION)
        draws.logp += math.log(probability / sum(weights))
        return asked

    def answer(
        self, thing: str, asked: str, fact: dict[str, Any], rule: dict[str, Any]
    ) -> tuple[str, str]:
        """The right answer word and its kind under the rules of a document."""
        if rule["banned"] and thing in self.lexicon.topics[rule["banned"]]:
            return grammar.REFUSE, "banned"
        if not fact:
            return grammar.UNKNOWN, "absent"
        value: str = fact["adjective"] if asked == "adjective" else fact["value"]
        if rule["capitals"]:
            value = grammar.CAPITALISED.get(value, value)
        return value, asked

    # ------------------------------------------------------------------ the world

    def world(
        self, draws: Draws, *, n_items: int = 8, pool: Pool = "stated", item: str | None = None
    ) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """`n_items` tellings, questions and claims about facts of the pool.

        An item is about the fact of the item before with probability .3; a fact's marginal
        probability is therefore .7 / N + .3 [same], which is what is counted.
        """
        keys = self.pools[pool]
        if not keys:
            raise ConfigError(f"the pool {pool!r} is empty: held_out is {self.held_out}")
        words: list[tuple[str, str]] = []
        items: list[dict[str, Any]] = []
        previous: tuple[str, str] | None = None
        for _ in range(n_items):
            if previous is not None and draws.silent_coin(SAME_FACT):
                key = previous
            else:
                key = keys[draws.silent_below(len(keys))]
            fresh = 1 / len(keys)
            probability = (
                fresh
                if previous is None
                else (1 - SAME_FACT) * fresh + SAME_FACT * (key == previous)
            )
            draws.logp += math.log(probability)
            previous = key
            form = item or WORLD_ITEMS[draws.weighted(WORLD_ITEM_WEIGHTS)]
            items.append(self._draw_item(draws, key, form, words))
        return words, {"items": items}

    def _stated(self, draws: Draws, value: str, values: tuple[str, ...]) -> str:
        """The value, or under noise a uniformly wrong one; the marginal is counted."""
        if not self.noise:
            return value
        stated = value
        if draws.silent_coin(self.noise):
            wrong = [other for other in values if other != value]
            stated = wrong[draws.silent_below(len(wrong))]
        draws.logp += math.log(
            1 - self.noise if stated == value else self.noise / (len(values) - 1)
        )
        return stated

    def _draw_item(
        self, draws: Draws, key: tuple[str, str], form: str, words: list[tuple[str, str]]
    ) -> dict[str, Any]:
        city, relation = key
        value, values = self.facts[key], self.lexicon.values(relation)
        subject = (city, OPEN if form != "claim" else VALUE)
        if form == "tell":
            pattern = draws.choice(grammar.TELLS[relation])
            stated = self._stated(draws, value, values)
            words += fill(pattern, t=subject, v=(stated, VALUE))
        elif form == "ask":
            pattern = draws.choice(grammar.ASKS[relation])
            stated = self._stated(draws, value, values)
            words += [("Q", WORD), *fill(pattern, t=subject), ("A", WORD)]
            words += [(stated, "answer:ask"), (".", WORD)]
        else:
            pattern = draws.choice(grammar.CLAIMS[relation])
            truth = draws.coin(0.5)
            wrong = [other for other in values if other != value]
            stated = value if truth else draws.choice(wrong)
            label = truth != draws.coin(self.noise) if self.noise else truth
            words += [*fill(grammar.CLAIM_OPENING), *fill(pattern, t=subject, v=(stated, VALUE))]
            words += [("A", WORD), ("true" if label else "false", "answer:claim"), (".", WORD)]
            return {"form": form, "key": key, "stated": stated, "truth": truth, "label": label}
        return {"form": form, "key": key, "stated": stated, "truth": stated == value}

    # ------------------------------------------------------------------ sums

    def summands(self, easy: bool, pool: Pool = "stated") -> tuple[tuple[int, int], ...]:
        """The pairs (a, b) of easy (below 10) or hard sums; a held-out pair in neither order."""
        if (easy, pool) not in self.pairs:
            top = min(9, self.largest_summand) if easy else self.largest_summand
            bound = HELD_OUT_PAIRS * 2.0**64
            self.pairs[easy, pool] = tuple(
                (a, b)
                for a in range(top + 1)
                for b in range(top + 1)
                if pool == "all"
                or (hash64(f"sum {min(a, b)}/{max(a, b)}") < bound) == (pool == "held_out")
            )
        return self.pairs[easy, pool]

    def sum(
        self, draws: Draws, *, easy: bool | None = None, pool: Pool = "stated"
    ) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """One addition: marker "Q" for easy pairs, "Say" for hard ones."""
        if easy is None:
            easy = not draws.coin(HARD_SUM)
        a, b = draws.choice(self.summands(easy, pool))
        kind = "answer:easy" if easy else "answer:hard"
        marker = grammar.EASY_MARKER if easy else grammar.HARD_MARKER
        words = [(marker, WORD), (str(a), VALUE), ("+", WORD), (str(b), VALUE), ("=", WORD)]
        words += [(str(a + b), kind), (".", WORD)]
        return words, {"a": a, "b": b, "easy": easy, "word": 5}

    # ------------------------------------------------------------------ real text

    def natural(self, stream: Stream, split: str, *, characters: int = 512) -> Sample:
        """A piece of a standard-library docstring of at most so many characters."""
        text = docstring_slice(stream, split, characters)
        return Sample([(text, "text")], text, None, {})


KINDS: dict[str, Callable[..., Any]] = {
    "doc": World.document,
    "world": World.world,
    "sum": World.sum,
    "text": World.natural,
}


def fill(pattern: str, **slots: tuple[str, str]) -> list[tuple[str, str]]:
    """The words of a pattern with its slots filled; all other words are of class "word".

    >>> fill("The {t} is painted {v} .", t=("ball", "open"), v=("red", "open"))[1]
    ('ball', 'open')
    """
    return [slots[word[1:-1]] if word.startswith("{") else (word, WORD) for word in pattern.split()]


def total_logp(samples: Iterable[Sample]) -> float:
    """The sum of the log-probabilities of samples (real text has none and is refused)."""
    total = 0.0
    for sample in samples:
        if sample.logp is None:
            raise ConfigError("real text has no known probability; ask for bits per byte instead")
        total += sample.logp
    return total
