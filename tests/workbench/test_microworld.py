"""The microworld: equal bits everywhere, exact probabilities, honest splits, right answers."""

import hashlib
import math
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import ConfigError
from workbench.microworld import Sample, World, grammar
from workbench.microworld.entropy import floor_of
from workbench.microworld.grammar import Lexicon
from workbench.microworld.natural import docstring_slice, docstrings_of, stdlib_docstrings
from workbench.microworld.prng import GOLDEN, MASK, Draws, Stream, hash64
from workbench.microworld.sampling import HARD_SUM, SAME_FACT, total_logp

# ---------------------------------------------------------------- bits


def test_splitmix64_matches_the_published_sequence():
    stream = Stream("any")
    stream.state = 1234567
    assert [stream.bits() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_first_megabyte_is_the_same_on_every_platform():
    world, digest, size, index = World(), hashlib.sha256(), 0, 0
    while size < 1_000_000:
        for kind in ("doc", "world", "sum"):
            data = world.sample(kind, index).text.encode("utf-8")
            digest.update(data)
            size += len(data)
        index += 1
    assert digest.hexdigest() == FIRST_MEGABYTE


FIRST_MEGABYTE = "c401ec6d8af73fe0c5a655ed047cfcee31bd82f9dbfab639cff6f7408a9c96b8"


def test_streams_of_neighbouring_names_share_no_draw():
    n = 50_000
    names = [f"world {seed}/{split}/doc/0" for seed in (0, 1) for split in ("train", "test")]
    seen = [{stream.bits() for _ in range(n)} for stream in map(Stream, names)]
    for i, one in enumerate(seen):
        assert len(one) == n
        for other in seen[:i]:
            assert not one & other
    # the mistake this guards against: seeds that are multiples of the generator's own step
    shifted = []
    for seed in (1, 2):
        stream = Stream("")
        stream.state = seed * GOLDEN & MASK
        shifted.append({stream.bits() for _ in range(1000)})
    assert len(shifted[0] & shifted[1]) == 999


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=20), st.integers(1, 10**6))
def test_draws_stay_in_range(name, n):
    stream = Stream(name)
    assert all(0 <= stream.below(n) < n for _ in range(20))
    assert all(0 <= stream.uniform() < 1 for _ in range(20))


def test_a_sample_depends_on_seed_split_kind_and_index_alone():
    assert World().sample("doc", 3) == World().sample("doc", 3)
    texts = {
        World(seed=seed).sample("doc", index, split).text
        for seed in (0, 1)
        for split in ("train", "test")
        for index in (3, 4)
    }
    assert len(texts) == 8


# ---------------------------------------------------------------- probabilities


class Enumerated(Draws):
    """Draws that walk through every outcome, one path per run, with the path's probability."""

    def __init__(self, path):
        super().__init__(Stream("unused"))
        self.path, self.place, self.options, self.probability = path, 0, [], 1.0

    def _next(self, probabilities):
        choice = self.path[self.place] if self.place < len(self.path) else 0
        self.place += 1
        self.options.append((choice, len(probabilities)))
        self.probability *= probabilities[choice]
        return choice

    def silent_coin(self, probability):
        outcomes = [(True, probability), (False, 1 - probability)]
        possible = [pair for pair in outcomes if pair[1] > 0]
        return possible[self._next([p for _, p in possible])][0]

    def silent_below(self, n):
        return self._next([1 / n] * n)

    def silent_weighted(self, weights):
        return self._next([weight / sum(weights) for weight in weights])


def enumerate_texts(draw):
    """Text → (summed path probability, the sampler's own probability)."""
    totals, claimed, path = defaultdict(float), {}, []
    while True:
        draws = Enumerated(path)
        words, _ = draw(draws)
        text = " ".join(word for word, _ in words)
        totals[text] += draws.probability
        assert claimed.setdefault(text, draws.logp) == pytest.approx(draws.logp, abs=1e-12)
        path = [choice for choice, _ in draws.options]
        counts = [count for _, count in draws.options]
        while path and path[-1] + 1 == counts[len(path) - 1]:
            path.pop()
        if not path:
            return totals, claimed
        path[-1] += 1


TINY = Lexicon(
    topics={"tool": ("hammer",), "toy": ("ball",)},
    adjectives=("big", "old"),
    places=("park", "hill"),
    names=("Anna", "Ben"),
    colours=("red", "blue"),
    cities=("Belansk", "Dorford"),
    countries=("Ardonia", "Bruvania", "Casdonia"),
    products=("salt", "tea"),
    suffixes=("sir", "friend"),
)


@pytest.mark.parametrize(
    ("world", "draw"),
    [
        pytest.param(
            World(lexicon=TINY, n_cities=1),
            lambda w, d: w.document(d, n_facts=(1, 1), n_turns=(1, 1), empty=0.25),
            id="document with rules",
        ),
        pytest.param(
            World(lexicon=TINY, n_cities=1),
            lambda w, d: w.document(d, n_facts=(1, 2), n_turns=(1, 1), rules=False, empty=0.0),
            id="document of one or two facts",
        ),
        pytest.param(
            World(lexicon=TINY, n_cities=2, held_out=0, noise=0.1),
            lambda w, d: w.world(d, n_items=2),
            id="world with repeats and noise",
        ),
        pytest.param(World(largest_summand=3), lambda w, d: w.sum(d, pool="all"), id="sums"),
    ],
)
def test_probabilities_of_a_small_grammar_are_exact(world, draw):
    totals, claimed = enumerate_texts(lambda draws: draw(world, draws))
    assert sum(math.exp(logp) for logp in claimed.values()) == pytest.approx(1, abs=1e-12)
    for text, probability in totals.items():
        assert math.exp(claimed[text]) == pytest.approx(probability, rel=1e-9)


def test_entropy_of_sums_in_closed_form():
    world = World()
    easy, hard = len(world.summands(True)), len(world.summands(False))
    # seven words and the closing </s>
    assert world.entropy_floor("sum", n=5, easy=True) == pytest.approx(math.log(easy) / 8)
    level = -HARD_SUM * math.log(HARD_SUM) - (1 - HARD_SUM) * math.log(1 - HARD_SUM)
    exact = (level + (1 - HARD_SUM) * math.log(easy) + HARD_SUM * math.log(hard)) / 8
    # the mean of 4000 terms with a standard deviation of 0.21 nats per token
    assert world.entropy_floor("sum", n=4000) == pytest.approx(exact, abs=5 * 0.21 / 4000**0.5)


def test_floor_counts_the_end_of_text_as_a_token():
    sample = Sample([("Q", "word"), (".", "word")], " Q.", -3.0, {})
    assert floor_of([sample, sample]) == pytest.approx(1.0)


def test_repeats_are_counted_by_their_marginal():
    world = World(held_out=0)
    n = len(world.facts)
    same = different = None
    for index in range(400):
        sample = world.sample("world", index, n_items=2, item="tell")
        first, second = (item["key"] for item in sample.meta["items"])
        shared = -math.log(n) - 2 * math.log(3)  # first fact, three wordings each
        if first == second:
            same = sample.logp - shared
        else:
            different = sample.logp - shared
    assert same is not None
    assert different is not None
    assert same == pytest.approx(math.log((1 - SAME_FACT) / n + SAME_FACT))
    assert different == pytest.approx(math.log((1 - SAME_FACT) / n))


# ---------------------------------------------------------------- what is held out


def test_held_out_facts_are_never_touched_in_training():
    world = World()
    assert len(world.held_out_facts) == round(0.23 * 192)
    text = "".join(world.texts("world", 4000))
    for city, relation in world.held_out_facts:
        for pattern in (*grammar.TELLS[relation], *grammar.CLAIMS[relation]):
            opening = grammar.join(pattern.format(t=city, v="").rstrip(" .").split()) + " "
            found = {rest.split(".")[0] for rest in text.split(opening)[1:]}
            # "X is in …" also opens "X is …" of other relations: look at the value's class
            assert not found & set(world.lexicon.values(relation))
        for pattern in grammar.ASKS[relation]:
            assert grammar.join(pattern.format(t=city).split()) not in text
    stated = next(iter(world.pools["stated"]))
    told = grammar.TELLS[stated[1]][0].format(t=stated[0], v=world.facts[stated])
    assert grammar.join(told.split()) in text  # the search above does find things


def test_held_out_sums_are_a_tenth_in_neither_order_and_no_function_of_the_result():
    world = World()
    trained, unseen = set(world.summands(False)), set(world.summands(False, "held_out"))
    assert len(trained) + len(unseen) == 50 * 50
    assert not {(b, a) for a, b in unseen} & trained
    assert 0.07 < len(unseen) / 2500 < 0.13
    for modulus in (3, 7, 10):
        for pairs in (trained, unseen):
            assert {(a + b) % modulus for a, b in pairs} == set(range(modulus))
    assert set(world.summands(True)) <= trained
    sums = [world.sample("sum", i).meta for i in range(2000)]
    assert not {(one["a"], one["b"]) for one in sums} & unseen


def test_noise_replaces_the_stated_share_of_answers():
    world = World(noise=0.2)
    items = [i for k in range(500) for i in world.sample("world", k, item="ask").meta["items"]]
    wrong = sum(item["stated"] != world.facts[item["key"]] for item in items)
    # 4000 coins of .2: standard deviation .0063, five of them
    assert wrong / len(items) == pytest.approx(0.2, abs=0.032)
    labels = [i for k in range(500) for i in world.sample("world", k, item="claim").meta["items"]]
    flipped = sum(item["label"] != item["truth"] for item in labels)
    assert flipped / len(labels) == pytest.approx(0.2, abs=0.032)


# ---------------------------------------------------------------- a second reader


def read_document(prompt):
    """Thing → (relation, value, adjective) and the rules, from the text alone."""
    patterns = [
        (r"The (\w+) (\w+) (?:is in|was put in|moved to) the (\w+)\.", "place"),
        (r"You can find the (\w+) (\w+) at the (\w+)\.", "place"),
        (r"The (\w+) (\w+) (?:belongs|was given) to (\w+)\.", "owner"),
    ]
    facts = {}
    for pattern, relation in patterns:
        for adjective, thing, value in re.findall(pattern, prompt):
            facts[thing] = (relation, value, adjective)
    for thing, value in re.findall(r"The (\w+) (?:is painted|has the colour) (\w+)\.", prompt):
        facts[thing] = ("colour", value, None)
    suffix = re.search(r"Rule end with (\w+)\.", prompt)
    banned = re.search(r"Rule any (\w+) question", prompt)
    return facts, {
        "suffix": suffix[1] if suffix else None,
        "capitals": "Rule use capitals." in prompt,
        "banned": banned[1] if banned else None,
    }


def right_answer(question, facts, rules):
    thing = next(t for t in World().lexicon.things if f" {t} " in question or f" {t}." in question)
    if rules["banned"] and thing in grammar.TOPICS[rules["banned"]]:
        return " refuse"
    if thing not in facts:
        return " unknown"
    _, value, adjective = facts[thing]
    if "kind" in question:
        return " " + adjective
    return " " + (value.upper() if rules["capitals"] else value)


def log_probability(text, n_facts, n_turns):
    """log p of a document from its text alone, with the grammar's numbers written out again."""
    facts, rules = read_document(text.partition(" Q ")[0])
    style = 0.25 / 4 if rules["suffix"] else 0.25 if rules["capitals"] else 0.5
    factors = [style, 0.4 / 4 if rules["banned"] else 0.6, 1 / (n_turns[1] - n_turns[0] + 1)]
    factors += [15 / 16 / (n_facts[1] - n_facts[0] + 1) if facts else 1 / 16]
    for told, (relation, _, _) in enumerate(facts.values()):
        factors.append(1 / (48 - told))
        factors.append(
            {
                "place": 0.455 / 4 / 12 / 40,
                "owner": 0.3 / 2 / 12 / 32,
                "colour": 0.245 / 2 / 12,
            }[relation]
        )
    for turn in text.split(" Q ")[1:]:
        words = turn.split(" A ")[0].replace(".", " .").split()
        thing = next(word for word in words if word in World().lexicon.things)
        asked = next(
            (kind for kind in ("kind", "colour", "owns", "who", "owner") if kind in words), "place"
        )
        wordings = {"kind": 2, "colour": 2, "place": 4}.get(asked, 3)
        if thing in facts:
            factors += [0.9 if facts else 1.0, 1 / len(facts)]
            hard = 1.0 if facts[thing][0] == "colour" else 0.1 if asked == "kind" else 0.9
        else:
            factors += [0.1 if facts else 1.0, 1 / (48 - len(facts))]
            hard = {"kind": 0.755 * 0.1, "colour": 0.245, "place": 0.455 * 0.9}.get(asked, 0.27)
        factors += [hard, 1 / wordings]
    return sum(map(math.log, factors))


def test_a_second_reader_finds_the_same_probability():
    for index in range(200):
        sample = World().sample("doc", index, n_facts=(2, 12), n_turns=(1, 9))
        again = log_probability(sample.text, (2, 12), (1, 9))
        assert again == pytest.approx(sample.logp, abs=1e-9)


def test_documents_answer_as_a_second_reader_does():
    kinds = Counter()
    for item in World().document_items(150, "test", n_facts=(3, 20)):
        facts, rules = read_document(item["prompt"])
        assert rules == item["rules"]
        assert len(facts) == len(item["facts"])
        assert all(fact in item["prompt"] for fact in item["facts"])
        for question in item["questions"]:
            assert question["answer"] == right_answer(question["question"], facts, rules)
            assert question["choices"][question["gold"]] == question["answer"]
            assert len(set(question["choices"])) == 4
            ending = f" {rules['suffix']}." if rules["suffix"] else "."
            assert question["reply"] == question["answer"] + ending
            kinds[question["kind"]] += 1
    assert set(kinds) == {"place", "owner", "colour", "adjective", "absent", "banned"}


def test_without_facts_everything_is_unknown_or_refused():
    for index in range(40):
        sample = World().sample("doc", index, empty=1.0)
        assert "Facts" not in sample.text
        assert {turn["answer"] for turn in sample.meta["turns"]} <= {"unknown", "refuse"}


def test_statements_are_half_true_and_labelled_by_the_world():
    world = World()
    rows = world.statements(1000, "test")
    labels = [row["label"] for row in rows]
    assert sum(labels) == pytest.approx(500, abs=5 * 16)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["unknowable"] == pytest.approx(250, abs=5 * 14)
    for row in rows:
        key = (row["city"], row["relation"])
        assert row["label"] == int(world.facts[key] == row["value"])
        assert (row["kind"] == "unknowable") == (key in world.held_out_facts)
        assert row["value"] in row["document"]
    assert len({row["id"] for row in rows}) == 1000
    assert all(row["kind"] == "stated" for row in world.statements(50, unknowable=0.0))


def test_choices_hold_the_answer_once():
    for row in World().choices(40, "test"):
        facts, rules = read_document(row["query"])
        question = row["query"][row["query"].rindex(" Q ") :]
        answers = [row["choices"][row["gold"]]]
        assert answers == [right_answer(question, facts, rules)]
        assert len(set(row["choices"])) == 4


def test_classes_mark_the_answers():
    sample = World().sample("doc", 5, "test", empty=0.0)
    marked = [i for i, (_, word_class) in enumerate(sample.words) if word_class[:6] == "answer"]
    assert marked == [turn["word"] for turn in sample.meta["turns"]]
    assert [sample.words[i][0] for i in marked] == [t["answer"] for t in sample.meta["turns"]]


# ---------------------------------------------------------------- real text


def test_docstrings_are_found_where_python_sees_them():
    source = (
        '"""Module."""\n'
        '# a comment with """ in it\n'
        'x = \'"""\'\n'
        "def f():\n"
        "    r'''Raw\n\n    and indented.'''\n"
        '    y = """a value,\nno docstring"""\n'
        '    return "it\'s"\n'
        '    """After \\""" a quote."""\n'
    )
    assert docstrings_of(source) == ["Module.", "Raw\n\nand indented.", 'After \\""" a quote.']


def test_a_docstring_is_on_one_side_of_the_split_only():
    train, test = stdlib_docstrings("train"), stdlib_docstrings("test")
    assert not set(train) & set(test)
    assert 0.02 < len(test) / (len(train) + len(test)) < 0.08
    joined = set(test)
    for index in range(50):
        text = World().sample("text", index, "test", characters=200).text
        assert len(text) <= 200
        assert any(text in whole for whole in joined)
    assert docstring_slice(Stream("a"), "train", 10**6) in set(train)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: World(noise=1.0), "noise"),
        (lambda: World(held_out=-0.1), "held_out"),
        (lambda: World(n_cities=65), "n_cities"),
        (lambda: World(largest_summand=50), "largest_summand"),
        (lambda: World().sample("dog", 0), "nearest: doc"),
        (lambda: World().sample("doc", 0, "val"), "split"),  # type: ignore[arg-type]
        (lambda: World().sample("doc", 0, n_facts=(0, 3)), "n_facts"),
        (lambda: World().sample("doc", 0, n_facts=(3, 49)), "n_facts"),
        (lambda: World().sample("doc", 0, n_turns=(3, 2)), "n_turns"),
        (lambda: World(held_out=0.0).sample("world", 0, pool="held_out"), "empty"),
        (lambda: World().statements(1, unknowable=2.0), "unknowable"),
        (lambda: total_logp([World().sample("text", 0)]), "no known probability"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_names_are_hashed_as_blake2b_says():
    digest = hashlib.blake2b(b"abc", digest_size=8).digest()
    assert hash64("abc") == int.from_bytes(digest, "little")
