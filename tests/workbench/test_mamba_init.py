"""The structured start of the state-space models: what is written is there before any training."""

import numpy as np
import pytest
import torch

from workbench.backbones import mamba_init
from workbench.backbones.batches import Encoder
from workbench.backbones.mamba_init import CONTENT, SLOT
from workbench.backbones.manifest import WEIGHTS, read_manifest
from workbench.backbones.recipes import find_recipe
from workbench.backbones.training import build_model
from workbench.errors import ConfigError
from workbench.mamba import fast_mamba
from workbench.microworld import World, grammar
from workbench.tokenizer import word_ids

RECALLED = ("answer:place", "answer:owner", "answer:colour")
NAMES = ("micro-mamba", "micro-mamba2")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return build_model(find_recipe(request.param)).eval()


def documents(n, n_facts):
    world, encode = World(), Encoder()
    for index in range(n):
        yield encode(
            world.sample("doc", 77_000 + index, "test", n_facts=(n_facts, n_facts), n_turns=(6, 6))
        )


@torch.no_grad()
def hidden_states(model, ids):
    with fast_mamba():
        return model(
            input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
        ).hidden_states


def test_parameters_are_within_ten_percent_of_micro_mistral(model):
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1_509_504, rel=0.1)


def test_layer_0_puts_the_word_three_back_into_the_slot(model):
    sample = next(documents(1, 8))
    ids = word_ids()
    things = [ids[thing] for topic in grammar.TOPICS.values() for thing in topic]
    slot = hidden_states(model, sample.ids)[1][0, :, SLOT]
    places = [t for t, token in enumerate(sample.ids) if token in things and t + 3 < len(slot)]
    filled = torch.stack([slot[t + 3] for t in places])
    # equal things fill the slot equally, different things differently
    same = [sample.ids[t] for t in places]
    cosines = torch.nn.functional.cosine_similarity(filled[:, None], filled[None], dim=-1)
    for i, a in enumerate(same):
        for j, b in enumerate(same):
            assert (cosines[i, j] > 0.8) == (a == b)


def test_the_untrained_memory_answers_questions_on_documents(model):
    """Among the words that could be an answer (case apart), the stated one is written."""
    embedding = model.get_input_embeddings().weight.detach()[:, CONTENT]
    ids = word_ids()
    candidates = torch.tensor([ids[w] for w in (*grammar.PLACES, *grammar.NAMES, *grammar.COLOURS)])
    lower = {ids[up]: ids[low] for low, up in grammar.CAPITALISED.items()}
    hits = []
    for sample in documents(10, 8):
        final = hidden_states(model, sample.ids)[-1][0, :, CONTENT]
        for place, word_class in enumerate(sample.classes):
            if word_class in RECALLED or word_class == "answer:upper":
                scores = embedding[candidates] @ final[place - 1]
                right = lower.get(sample.ids[place], sample.ids[place])
                hits.append(int(candidates[scores.argmax()]) == right)
    assert len(hits) >= 30
    assert np.mean(hits) >= 0.9  # chance is 1 in 84


def test_the_start_is_a_function_of_the_seed(model):
    recipe = find_recipe("micro-mamba2" if "Mamba2" in type(model).__name__ else "micro-mamba")
    again, other = build_model(recipe), build_model(recipe, seed=1)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_another_size_is_refused():
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    small = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match="160, 16"):
        mamba_init.initialise_mamba(MambaForCausalLM(MambaConfig(**small)), 0)
    model = Mamba2ForCausalLM(Mamba2Config(num_heads=4, head_dim=32, n_groups=1, **small))
    with pytest.raises(ConfigError, match="160, 64, 32, 1"):
        mamba_init.initialise_mamba2(model, 0)


# ── the shipped weights ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    import transformers

    recipe = find_recipe(request.param)
    stock = getattr(transformers, recipe.architecture)
    return stock.from_pretrained(str(WEIGHTS / request.param), dtype=torch.float32).eval()


def test_shipped_weights_load_in_the_stock_class_and_the_hook_changes_nothing(shipped):
    sample = next(documents(1, 5))
    ids = torch.tensor([sample.ids])
    with torch.no_grad():
        stock = shipped(input_ids=ids, use_cache=False).logits
        with fast_mamba():
            ours = shipped(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_shipped_weights_continue_a_cached_document_by_whole_questions(shipped):
    sample = next(documents(1, 5))
    ids = torch.tensor([sample.ids])
    cut = ids.shape[1] // 2
    with torch.no_grad(), fast_mamba():
        full = shipped(input_ids=ids, use_cache=False).logits
        head = shipped(input_ids=ids[:, :cut], use_cache=True)
        tail = shipped(input_ids=ids[:, cut:], cache_params=head.cache_params, use_cache=True)
    torch.testing.assert_close(tail.logits, full[:, cut:], rtol=1e-4, atol=1e-4)


def test_what_the_models_are_shipped_for():
    figures = {name: read_manifest()[name]["figures"] for name in NAMES}
    mamba2, mamba = figures["micro-mamba2"], figures["micro-mamba"]
    assert mamba2["world/ask_stated"] >= 0.95
    assert mamba2["world/claim_stated"] >= 0.85
    assert all(mamba2[f"documents/{n}_facts"] >= 0.6 for n in (8, 16, 24, 40))
    assert mamba["world/ask_stated"] >= 0.95
    assert mamba["world/claim_stated"] >= 0.85
    for one in figures.values():  # what was never stated is not known
        assert one["world/ask_held_out"] <= 0.15
        assert 0.4 <= one["world/claim_held_out"] <= 0.6
