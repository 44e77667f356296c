"""The built-in tokenizer: one word one token, every text comes back, fewest pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import DataError
from workbench.microworld import World
from workbench.microworld.grammar import GRAMMAR_WORDS, join, surface
from workbench.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCABULARY_SIZE,
    build_tokenizer,
    microworld_tokenizer,
    word_ids,
)


@pytest.fixture(scope="module")
def tokenizer():
    return microworld_tokenizer()


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_sizes_and_specials(tokenizer):
    assert len(tokenizer) == VOCABULARY_SIZE
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (PAD_ID, BOS_ID, EOS_ID) == (0, 1, 2)
    assert tokenizer(" Q")["input_ids"][0] == BOS_ID
    assert tokenizer.decode(tokenizer(" Q where")["input_ids"], skip_special_tokens=True) == (
        " Q where"
    )


def test_every_grammar_word_is_the_token_of_the_table(tokenizer):
    ids = word_ids()
    for word in GRAMMAR_WORDS:
        assert plain(tokenizer, surface(word)) == [ids[word]]


@pytest.mark.parametrize("kind", ["doc", "world", "sum"])
def test_a_grammar_text_has_one_token_per_word(tokenizer, kind):
    ids = word_ids()
    for index in range(30):
        sample = World().sample(kind, index, "test")
        tokens = plain(tokenizer, sample.text)
        assert tokens == [ids[word] for word, _ in sample.words]
        assert tokenizer.decode(tokens) == sample.text


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    if any(special in text for special in ("<pad>", "<s>", "</s>")):
        return
    assert tokenizer.decode(plain(tokenizer, text)) == text


def test_real_text_comes_back_and_costs_half_a_token_per_byte(tokenizer):
    texts = World().texts("text", 40, "test")
    tokens = [plain(tokenizer, text) for text in texts]
    assert [tokenizer.decode(ids) for ids in tokens] == texts
    size = sum(len(text.encode("utf-8")) for text in texts)
    assert sum(map(len, tokens)) < size / 1.8


def test_a_text_is_split_into_the_fewest_pieces(tokenizer):
    text = "the return object"
    pieces = set(tokenizer.get_vocab())
    spelled = [word.replace(" ", "Ġ") for word in ("the", " return", " object")]
    best = 0
    for word in spelled:  # shortest path over the letters of each word
        cost = [0] + [10**9] * len(word)
        for end in range(1, len(word) + 1):
            for start in range(end):
                if word[start:end] in pieces:
                    cost[end] = min(cost[end], cost[start] + 1)
        best += cost[-1]
    assert len(plain(tokenizer, text)) == best


def test_a_rebuilt_tokenizer_keeps_the_word_ids():
    rebuilt = build_tokenizer(World().texts("text", 400))
    ids = word_ids()
    for word in GRAMMAR_WORDS[::7]:
        assert rebuilt.encode(surface(word), add_special_tokens=False).ids == [ids[word]]


def test_too_little_text_is_an_error():
    with pytest.raises(DataError, match="merges"):
        build_tokenizer(["a few words"])


def test_join_leaves_no_space_before_a_full_stop():
    assert join(["A", "park", "."]) == " A park."
