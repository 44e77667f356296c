"""Cached states against the model's own, labels against brute force, gates against a known rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from early_exit.adapters.base import adapt
from early_exit.data import Documents, frame, load_documents
from early_exit.features import batches, collect, labels, measure, pruned_agreement, residual
from early_exit.fitting import exit_weights
from early_exit.heads import Exits, Gates, check_exits, default_exits
from workbench.errors import ConfigError, DataError
from workbench.tiny import byte_tokenizer, tiny_model


def documents(seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 250, size=n).tolist() for n in (9, 23, 5, 14)]
    return Documents(("a", "b"), ids, [0, 1, 0, 1])


@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_cached_states_are_the_models_hidden_states(family: str):
    model = tiny_model(family)
    adapter = adapt(model)
    given = documents()
    cached = collect(adapter, (0, 2), given, batch_tokens=40)
    assert len(cached["x"]) == sum(len(ids) - 1 for ids in given.ids)
    seen: list[torch.Tensor] = []
    for block in adapter.blocks:
        block.register_forward_hook(
            lambda _, x, y: seen.append(y[0] if isinstance(y, tuple) else y)
        )
    for number, ids in enumerate(given.ids):
        own = cached["document"] == number
        assert cached["position"][own].tolist() == list(range(len(ids) - 1))
        assert cached["source"][own].tolist() == [given.source[number]] * (len(ids) - 1)
        seen.clear()
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        h = residual(adapter, cached)[own]
        for column, layer in enumerate((0, 2)):
            assert torch.allclose(h[:, column], seen[layer][0, :-1], atol=1e-5)
        logits = adapter.logits(cached["final"][own])
        assert torch.allclose(logits, out.logits[0, :-1], atol=1e-5)


@pytest.mark.parametrize("emission", ["lens", "affine", "last_block"])
def test_labels_are_those_of_the_chosen_emission(emission: str):
    adapter = adapt(tiny_model("mistral"))
    exits = Exits((1, 2), 64, 64, emission)
    if exits.translators is not None:
        torch.nn.init.normal_(exits.translators.weight, std=0.1)
    given = documents(3)
    cached = collect(adapter, (1, 2), given, emission=emission)
    measures = measure(adapter, exits, cached)
    with torch.no_grad():
        for row in range(0, len(cached["x"]), 7):
            answer = int(adapter.logits(cached["final"][row]).argmax())
            for column in range(2):
                h = cached["x"][row, column]
                if emission == "affine":
                    h = exits.translators.one(column, h)
                if emission == "last_block":
                    h = cached["last"][row, column]
                order = adapter.logits(h).argsort(descending=True).tolist()
                assert int(measures["rank"][row, column]) == order.index(answer)
                for k in (1, 15):
                    expected = int(answer in order[:k])
                    assert int(labels(measures, k)[row, column]) == expected
    assert torch.equal(measures["oracle"].long(), labels(measures, 1))


def test_pruning_to_all_blocks_is_the_full_model():
    adapter = adapt(tiny_model("mistral"))
    given = documents()
    hits = pruned_agreement(adapter, given, watch=lambda items, label: iter(items))
    assert hits[:, -1].tolist() == [len(ids) - 1 for ids in given.ids]
    ids = torch.tensor([given.ids[1]])
    with torch.no_grad():
        cut = adapter.run(adapter.embed(ids), 0, 1)
        cut = adapter.logits(adapter.run(cut, 3, 4)).argmax(-1)
        same = (cut == adapter.full(ids).argmax(-1))[0, :-1].sum()
    assert hits[1, 0] == int(same)


def test_the_backbone_sees_every_token_once():
    model = tiny_model("mistral")
    adapter = adapt(model)
    seen = []
    model.model.layers[3].mlp.register_forward_hook(lambda _, x, y: seen.append(x[0].shape[:2]))
    given = documents()
    collect(adapter, (0, 1, 2), given, batch_tokens=1)
    assert sum(rows * time for rows, time in seen) == given.tokens


def test_batches_are_whole_documents_within_the_budget():
    given = documents()
    groups = batches(given, 30)
    assert sorted(number for group in groups for number in group) == [0, 1, 2, 3]
    assert groups == [[1], [3, 0], [2]]


def test_folding_the_scaling_changes_nothing():
    gates = Gates(3, 16)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter)
    x, mean, scale = torch.randn(50, 3, 16) * 4, torch.randn(3, 16), torch.rand(3, 16) + 0.1
    with torch.no_grad():
        expected = gates.scores((x - mean) / scale)
        assert torch.allclose(gates.folded(mean, scale).scores(x), expected, atol=1e-5)


def test_exits_are_placed_and_checked():
    assert default_exits(32) == (15, 19, 23, 27)
    assert default_exits(8) == (3, 4, 5, 6)
    assert default_exits(4) == (1, 2)
    assert check_exits(default_exits(2), 2) == (0,)
    for wrong in ((), (3,), (1, 1), (2, 0), (-1,)):
        with pytest.raises(ConfigError, match="from 0 to 2"):
            check_exits(wrong, 4)
    with pytest.raises(ConfigError, match="expected one of lens, affine, last_block"):
        Exits((1,), 8, 8, "lense")


def test_weights_of_the_two_schemes():
    assert exit_weights(4, "wsum").tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert exit_weights(4, "uniform").tolist() == [0.25] * 4


def test_each_source_gets_its_share_and_documents_are_framed():
    tokenizer = byte_tokenizer()
    given = load_documents(
        tokenizer, ("microworld:sum", "microworld:world"), split="test", tokens=600, max_length=50
    )
    shares = [
        sum(len(ids) for ids, s in zip(given.ids, given.source, strict=True) if s == source)
        for source in (0, 1)
    ]
    assert all(300 <= share < 350 for share in shares)
    assert max(map(len, given.ids)) == 50
    assert frame(tokenizer, "a") == [1, *tokenizer.encode("a", add_special_tokens=False), 2]
    kept, held = given.split(4)
    assert len(kept.ids) + len(held.ids) == len(given.ids)


def test_bad_text_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="no data source"):
        load_documents(tokenizer, (), split="train", tokens=9, max_length=9)
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "good"}\n{"txet": "bad"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"texts.jsonl:2:text"):
        load_documents(tokenizer, (str(file),), split="train", tokens=9, max_length=9)


def test_states_that_are_not_finite_name_their_block():
    model = tiny_model("mistral")
    adapter = adapt(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="after block 2 holds NaN"):
        collect(adapter, (0, 2), documents())
