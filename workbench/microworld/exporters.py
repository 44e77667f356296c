"""The microworld as data sets: labelled statements, multiple choice, documents with questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError
from workbench.microworld import grammar
from workbench.microworld.grammar import join, surface
from workbench.microworld.prng import Stream

if TYPE_CHECKING:
    from workbench.microworld.sampling import World


def statements(
    world: World, n: int, split: str = "train", *, unknowable: float = 0.25, start: int = 0
) -> list[dict[str, Any]]:
    """`n` claims about the world, half of them true: a document to judge and its label.

    A document ends with " A", so that the next token is " true" or " false". Kind "stated": the
    fact occurs in training; "unknowable": it is held out, nobody can know. `unknowable` is the
    share of the latter.

    >>> from workbench.microworld import World
    >>> World().statements(1)[0]["document"].endswith(" A")
    True
    """
    if not 0 <= unknowable <= 1:
        raise ConfigError(f"unknowable is {unknowable}; a share in [0, 1] is needed")
    rows = []
    for index in range(start, start + n):
        stream = Stream(f"world {world.seed}/{split}/statement/{index}")
        hidden = stream.uniform() < unknowable
        keys = world.pools["held_out" if hidden else "stated"]
        city, relation = keys[stream.below(len(keys))]
        value, values = world.facts[city, relation], world.lexicon.values(relation)
        wordings = grammar.CLAIMS[relation]
        wording = wordings[stream.below(len(wordings))]
        truth = stream.below(2) == 1
        if not truth:
            wrong = [other for other in values if other != value]
            value = wrong[stream.below(len(wrong))]
        label = truth != (stream.uniform() < world.noise)
        words = f"{grammar.CLAIM_OPENING} {wording.format(t=city, v=value)} A".split()
        rows.append(
            {
                "id": f"{split}-{world.seed}-{index}",
                "document": join(words),
                "label": int(label),
                "kind": "unknowable" if hidden else "stated",
                "city": city,
                "relation": relation,
                "value": value,
            }
        )
    return rows


def _choices(stream: Stream, answer: str, pool: list[str], fallback: list[str]) -> list[str]:
    """The answer and three others, in random order; others from the pool first."""
    others = [word for word in dict.fromkeys(pool) if word != answer]
    spare = [word for word in fallback if word != answer and word not in others]
    picked = []
    while len(picked) < 3 and (others or spare):
        source = others or spare
        picked.append(source.pop(stream.below(len(source))))
    picked.insert(stream.below(len(picked) + 1), answer)
    return picked


def document_items(
    world: World,
    n: int,
    split: str = "train",
    *,
    n_facts: tuple[int, int] = (8, 24),
    n_questions: int = 8,
    rules: bool = True,
    start: int = 0,
) -> list[dict[str, Any]]:
    """`n` documents, each with questions, right answers and choices from the same document.

    `prompt + question` is what the model reads, `answer` is its next token; the reply ends with
    the suffix, if a rule asks for one, and a full stop. Without the prompt the right answer to
    every question is " unknown" (that is how the built-in models are trained).

    Each item: prompt, facts (texts), rules {suffix, capitals, banned}, questions: a list of
    {question, answer, reply, choices, gold, kind, thing}; kind is place, owner, colour, adjective,
    absent (the document does not tell) or banned.
    """
    items = []
    for index in range(start, start + n):
        sample = world.sample(
            "doc",
            index,
            split,  # type: ignore[arg-type]
            n_facts=n_facts,
            n_turns=(n_questions, n_questions),
            rules=rules,
            empty=0.0,
        )
        rule, facts = sample.meta["rules"], sample.meta["facts"]
        stream = Stream(f"world {world.seed}/{split}/choices/{index}")
        shout = grammar.CAPITALISED if rule["capitals"] else {}
        questions = []
        for turn in sample.meta["turns"]:
            asked = turn["asked"]
            if asked == "adjective":
                told = [fact["adjective"] for fact in facts if fact["adjective"]]
            else:
                told = [fact["value"] for fact in facts if fact["relation"] == asked]
            told = [shout.get(word, word) for word in told]
            spare = [shout.get(word, word) for word in world.lexicon.values(asked)]
            options = _choices(stream, turn["answer"], told, spare)
            reply = [turn["answer"], *([rule["suffix"]] if rule["suffix"] else []), "."]
            questions.append(
                {
                    "question": turn["question"],
                    "answer": surface(turn["answer"]),
                    "reply": join(reply),
                    "choices": [surface(option) for option in options],
                    "gold": options.index(turn["answer"]),
                    "kind": turn["kind"],
                    "thing": turn["thing"],
                }
            )
        prompt_words = [word for word, _ in sample.words[: sample.meta["prompt_words"]]]
        items.append(
            {
                "id": f"{split}-{world.seed}-{index}",
                "prompt": join(prompt_words),
                "facts": [fact["text"] for fact in facts],
                "rules": rule,
                "questions": questions,
            }
        )
    return items


def choices(
    world: World,
    n: int,
    split: str = "train",
    *,
    n_facts: tuple[int, int] = (8, 24),
    start: int = 0,
) -> list[dict[str, Any]]:
    """`n` multiple-choice questions {query, choices, gold}, each on a document of its own.

    The wrong choices are values of the same document; absent and banned things are not asked.
    """
    rows = []
    index = start
    while len(rows) < n:
        item = document_items(
            world, 1, split, n_facts=n_facts, n_questions=1, rules=False, start=index
        )[0]
        index += 1
        question = item["questions"][0]
        if question["kind"] in ("absent", "adjective"):
            continue
        rows.append(
            {
                "id": item["id"],
                "query": item["prompt"] + question["question"],
                "choices": question["choices"],
                "gold": question["gold"],
            }
        )
    return rows
