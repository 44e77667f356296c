# ruff: noqa: SIM905  (word lists read better as sentences)
"""The words and sentence patterns of the microworld.

A pattern is a string of words; `{t}` is the thing or city, `{v}` the value, `{a}` the adjective.
Every word is one token of the built-in tokenizer (`workbench.tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

TOPICS: dict[str, tuple[str, ...]] = {
    "tool": tuple("hammer saw drill rope ladder nail brush axe shovel bucket wrench lamp".split()),
    "toy": tuple("ball doll kite puzzle robot marble dice card balloon train puppet swing".split()),
    "food": tuple("apple bread cheese cake pear plum honey soup onion lemon melon cookie".split()),
    "music": tuple(
        "drum flute violin guitar horn piano harp bell trumpet cello whistle banjo".split()
    ),
}
ADJECTIVES = tuple("big small old new heavy light clean dirty round broken cheap rare".split())
PLACES = tuple(
    "park hill lake river school library market station museum garden forest beach bridge tower "
    "castle church harbour farm barn cellar attic kitchen office hotel bakery theatre stadium "
    "airport hospital temple village island valley cave desert meadow factory workshop tunnel "
    "square".split()
)
NAMES = tuple(
    "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Peter Quinn "
    "Rosa Sam Tina Uma Victor Wendy Xavier Yara Zoe Adam Bella Cyrus Dora Erik Fiona".split()
)
COLOURS = tuple("red blue green yellow black white brown pink purple orange grey golden".split())
CITIES = tuple(
    head + tail
    for head in ("Bel", "Dor", "Fal", "Kar", "Lum", "Nor", "Tal", "Vel")
    for tail in ("ansk", "burg", "eda", "ford", "ina", "moor", "ona", "wick")
)
COUNTRIES = tuple(
    head + tail
    for head in ("Ar", "Bru", "Cas", "Dra", "Est", "Fro", "Gal", "Hol")
    for tail in ("donia", "vania")
)
PRODUCTS = tuple(
    "salt silk tea wine wool glass steel paper copper coal rice cotton pepper amber oil "
    "timber".split()
)
SUFFIXES = ("sir", "friend", "indeed", "thanks")
UNKNOWN, REFUSE = "unknown", "refuse"
LARGEST_SUMMAND = 49
NUMBERS = tuple(str(n) for n in range(2 * LARGEST_SUMMAND + 1))

RULE_SUFFIX = "Rule end with {v} ."
RULE_CAPITALS = "Rule use capitals ."
RULE_BAN = "Rule any {v} question gets refuse ."
FACTS = {
    "place": (
        "The {a} {t} is in the {v} .",
        "You can find the {a} {t} at the {v} .",
        "The {a} {t} was put in the {v} .",
        "The {a} {t} moved to the {v} .",
    ),
    "owner": ("The {a} {t} belongs to {v} .", "The {a} {t} was given to {v} ."),
    "colour": ("The {t} is painted {v} .", "The {t} has the colour {v} ."),
}
QUESTIONS = {
    "place": (
        "where is the {t} ?",
        "which place holds the {t} ?",
        "tell me where the {t} is hidden ?",
        "I need to find the {t} .",
    ),
    "owner": ("who owns the {t} ?", "tell me who has the {t} ?", "which owner has the {t} ?"),
    "colour": ("what colour is the {t} ?", "tell me the colour of the {t} ?"),
    "adjective": ("which kind is the {t} ?", "tell me the kind of the {t} ?"),
}
RELATIONS = ("place", "owner", "colour")
RELATION_WEIGHTS = (0.455, 0.3, 0.245)

WORLD_RELATIONS = ("country", "product", "mayor")
TELLS = {
    "country": ("{t} is in {v} .", "{t} is a city in {v} .", "The country of {t} is {v} ."),
    "product": ("{t} makes {v} .", "People in {t} make {v} .", "The product of {t} is {v} ."),
    "mayor": ("{t} is led by {v} .", "The head of {t} is {v} .", "The mayor of {t} is {v} ."),
}
ASKS = {
    "country": ("which country is {t} in ?", "tell me the country of {t} ?"),
    "product": ("what does {t} make ?", "tell me the product of {t} ?"),
    "mayor": ("who is the mayor of {t} ?", "tell me who leads {t} ?"),
}
# value last, and worded like a telling: what the model expects next can be compared with it
CLAIMS = {
    "country": ("{t} is in {v} .", "The country of {t} is {v} ."),
    "product": ("{t} makes {v} .", "The product of {t} is {v} ."),
    "mayor": ("{t} is led by {v} .", "The mayor of {t} is {v} ."),
}
CLAIM_OPENING = "True or false ?"
EASY_MARKER, HARD_MARKER = "Q", "Say"


@dataclass(frozen=True)
class Lexicon:
    """The open word classes; smaller ones make small sub-grammars that can be enumerated."""

    topics: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(TOPICS))
    """Topic word → its things."""
    adjectives: tuple[str, ...] = ADJECTIVES
    """What a thing may be like."""
    places: tuple[str, ...] = PLACES
    """Values of a place fact."""
    names: tuple[str, ...] = NAMES
    """Owners and mayors."""
    colours: tuple[str, ...] = COLOURS
    """Values of a colour fact."""
    cities: tuple[str, ...] = CITIES
    """Subjects of the world's facts."""
    countries: tuple[str, ...] = COUNTRIES
    """Values of the relation "country"."""
    products: tuple[str, ...] = PRODUCTS
    """Values of the relation "product"."""
    suffixes: tuple[str, ...] = SUFFIXES
    """Words a rule may ask every answer to end with."""

    @property
    def things(self) -> tuple[str, ...]:
        """All things, topic after topic."""
        return tuple(thing for things in self.topics.values() for thing in things)

    def values(self, relation: str) -> tuple[str, ...]:
        """The possible values of a relation of documents or of the world."""
        return {
            "place": self.places,
            "owner": self.names,
            "colour": self.colours,
            "adjective": self.adjectives,
            "country": self.countries,
            "product": self.products,
            "mayor": self.names,
        }[relation]


def _pattern_words() -> list[str]:
    patterns = [RULE_SUFFIX, RULE_CAPITALS, RULE_BAN, CLAIM_OPENING]
    for table in (FACTS, QUESTIONS, TELLS, ASKS, CLAIMS):
        patterns += [pattern for group in table.values() for pattern in group]
    words = [word for pattern in patterns for word in pattern.split() if not word.startswith("{")]
    return [*words, "Facts", "Q", "A", "true", "false", EASY_MARKER, HARD_MARKER, "+", "="]


CONTENT_WORDS: dict[str, tuple[str, ...]] = {
    **TOPICS,
    "adjective": ADJECTIVES,
    "place": PLACES,
    "name": NAMES,
    "colour": COLOURS,
    "city": CITIES,
    "country": COUNTRIES,
    "product": PRODUCTS,
}
"""Category → its words, without the upper-case twins and the numbers."""
CAPITALISED: dict[str, str] = {word: word.upper() for word in (*PLACES, *NAMES, *COLOURS)}
"""Words that have an upper-case twin, used under the rule "use capitals"."""
FUNCTION_WORDS: tuple[str, ...] = tuple(
    word
    for word in dict.fromkeys([*_pattern_words(), *SUFFIXES, UNKNOWN, REFUSE, *TOPICS])
    if not any(word in words for words in CONTENT_WORDS.values())
)
GRAMMAR_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *FUNCTION_WORDS,
            *(word for words in CONTENT_WORDS.values() for word in words),
            *CAPITALISED.values(),
            *NUMBERS,
        ]
    )
)
"""Every word the grammar can say, in a fixed order."""


def surface(word: str) -> str:
    """A word as it stands in running text: a full stop sticks, all else has a leading space."""
    return word if word == "." else " " + word


def join(words: list[str]) -> str:
    """The running text of words; begins with a space, so that each word is one token.

    >>> join(["Q", "where", "is", "the", "ball", "?"])
    ' Q where is the ball ?'
    """
    return "".join(map(surface, words))
