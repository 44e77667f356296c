from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from workbench.errors import DataError
from workbench.evaluate import (
    bits_per_byte,
    choice_scores,
    encode_pair,
    perplexity,
    perplexity_from_nats,
    proportion_interval,
    token_nats,
)
from workbench.text import pack_blocks
from workbench.tiny import VOCAB_SIZE, byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("mistral")


def blocks(rows: int = 5, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)


class Uniform(torch.nn.Module):
    """Every token is equally likely."""

    config = type("config", (), {"max_position_embeddings": 64})

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, 2)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, VOCAB_SIZE)
        return type("out", (), {"logits": logits})


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = perplexity(Uniform(), blocks())
    assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert result.ci_low == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert result.n_tokens == 5 * 19
    tokenizer = byte_tokenizer()
    texts = ["abc é", "d" * 100, ""]
    bits = bits_per_byte(Uniform(), tokenizer, texts, length=16)
    assert float(bits) == pytest.approx(math.log2(VOCAB_SIZE), rel=1e-6)  # a token is a byte
    assert bits.n_bytes == bits.n_tokens == 106


def test_nats_equal_the_loss_of_transformers_and_do_not_depend_on_batches(model):
    ids = blocks()
    nats = token_nats(model, ids, batch_size=2)
    assert nats.shape == (5, 19)
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(nats.mean()) == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close(nats, token_nats(model, ids, batch_size=5), atol=1e-5, rtol=1e-5)
    assert not model.training


def test_evaluation_leaves_the_mode_as_it_was():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    first, second = token_nats(model, blocks()), token_nats(model, blocks())
    assert torch.equal(first, second)  # no dropout
    assert model.training


def test_padding_does_not_count(model):
    tokenizer = byte_tokenizer()
    whole = pack_blocks(tokenizer, ["some text here"] * 4, 16)
    padded = torch.cat([whole, torch.zeros(len(whole), 9, dtype=torch.long)], dim=1)
    plain, masked = perplexity(model, whole), perplexity(model, padded, ignore_id=0)
    assert masked.n_tokens == plain.n_tokens
    assert masked.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-5)
    with pytest.raises(DataError, match="padding"):
        perplexity(model, torch.zeros(1, 4, dtype=torch.long), ignore_id=0)


def test_interval_covers_the_truth_as_often_as_it_says():
    """95 % percentile intervals over 60 blocks: at least 88 % of 300 cover (P[fewer] < 1e-5)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        level = rng.normal(2.0, 0.3, size=(60, 1))  # tokens of one block go together
        nats = level + rng.normal(0, 0.5, size=(60, 8))
        found = perplexity_from_nats(nats)
        covered += found.ci_low <= math.exp(2.0) <= found.ci_high
    assert covered >= 264


def test_interval_repeats_contains_the_estimate_and_needs_two_blocks():
    rng = np.random.default_rng(1)
    nats = rng.exponential(size=(20, 5))
    one, two = perplexity_from_nats(nats), perplexity_from_nats(nats)
    assert one == two
    assert one.ci_low < one.perplexity < one.ci_high
    assert math.isnan(perplexity_from_nats(nats[:1]).ci_low)


def test_proportion_interval_is_the_exact_one():
    assert proportion_interval(0, 500)[1] == pytest.approx(1 - 0.025 ** (1 / 500))  # closed form
    low, high = proportion_interval(30, 40)
    expected = binomtest(30, 40).proportion_ci(method="exact")
    assert (low, high) == (expected.low, expected.high)
    with pytest.raises(DataError):
        proportion_interval(0, 0)


# ---------------------------------------------------------------- choices

ITEMS = [
    {"query": "where is it ?", "choices": [" park", " the old hill", " x"], "gold": 0},
    {"query": "who has it ? ", "choices": ["Finn", "nobody at all"], "gold": 1},
    {"query": "", "choices": ["a", "b", "c", "d"], "gold": 2},
]


def test_choice_scores_are_sums_of_log_probabilities(model):
    tokenizer = byte_tokenizer()
    found = choice_scores(model, tokenizer, ITEMS)
    for item, scored in zip(ITEMS, found.items, strict=True):
        for choice, value in zip(item["choices"], scored["log_likelihoods"], strict=True):
            ids = [1, *tokenizer.encode(item["query"] + choice, add_special_tokens=False)]
            with torch.inference_mode():
                logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            n = len(choice.encode()) + (1 if item["query"].endswith(" ") else 0)
            expected = sum(float(logp[t - 1, ids[t]]) for t in range(len(ids) - n, len(ids)))
            assert value == pytest.approx(expected, abs=2e-4)
        best = max(range(len(item["choices"])), key=scored["log_likelihoods"].__getitem__)
        assert scored["choice"] == best
        assert scored["correct"] == (best == item["gold"])
    assert found.accuracy == sum(i["correct"] for i in found.items) / 3
    assert found.ci_low <= found.accuracy <= found.ci_high


def test_raw_and_normalised_answers_can_differ():
    items = [{"query": "q", "choices": ["aa", "b"], "gold": 0}]
    found = choice_scores(Uniform(), byte_tokenizer(), items)
    assert found.items[0]["choice"] == 1  # fewer tokens, higher likelihood
    assert found.items[0]["choice_normalised"] == 0  # equal per byte: the tie goes to the first
    assert (found.accuracy, found.accuracy_normalised) == (0.0, 1.0)


@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_scores_do_not_depend_on_the_batch_size(family):
    model, tokenizer = tiny_model(family), byte_tokenizer()
    items = ITEMS * 3
    one = choice_scores(model, tokenizer, items, batch_size=1)
    for size in (2, 7, 64):
        other = choice_scores(model, tokenizer, items, batch_size=size)
        for a, b in zip(one.items, other.items, strict=True):
            assert a["choice"] == b["choice"]
            np.testing.assert_allclose(a["log_likelihoods"], b["log_likelihoods"], atol=1e-4)


def test_a_long_query_is_cut_on_the_left(model):
    tokenizer = byte_tokenizer()
    item = {"query": "z" * 900 + "where", "choices": [" a", " b"], "gold": 0}
    short = {**item, "query": item["query"][-62:]}
    found = choice_scores(model, tokenizer, [item], max_length=64)
    expected = choice_scores(model, tokenizer, [short], max_length=64)
    np.testing.assert_allclose(
        found.items[0]["log_likelihoods"], expected.items[0]["log_likelihoods"], atol=1e-4
    )


def test_pairs_are_cut_where_the_context_ends():
    tokenizer = byte_tokenizer()
    head, tail = encode_pair(tokenizer, "ab  ", "c")
    assert head == tokenizer.encode("ab")  # with <s>
    assert tokenizer.decode(tail) == "  c"
    assert encode_pair(tokenizer, "", "c")[0] == [1]
    tokenizer.backend_tokenizer.post_processor = None  # one that puts no <s> before a text
    assert encode_pair(tokenizer, "ab", "c")[0] == head[1:]
    assert encode_pair(tokenizer, "", "c")[0] == [1]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "gold"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "at least 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "0 to 1"),
        ({"query": 3, "choices": ["a", "b"], "gold": 1}, "query"),
        ({"query": "q", "choices": ["a", ""], "gold": 1}, "no tokens"),
    ],
)
def test_bad_items_are_named(model, item, message):
    with pytest.raises(DataError, match=message):
        choice_scores(model, byte_tokenizer(), [item])


def test_bad_blocks_are_named(model):
    with pytest.raises(DataError, match="0 to 258"):
        token_nats(model, torch.full((1, 4), 259))
    with pytest.raises(DataError, match="shape"):
        token_nats(model, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(DataError, match="no items"):
        choice_scores(model, byte_tokenizer(), [])
