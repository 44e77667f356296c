"""Claims, hidden states and files, and what damaged ones are told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sdm.data import (
    FAR,
    KNOWN,
    OTHER_FACTS,
    UNKNOWABLE,
    check_labels,
    claim_documents,
    read_cache,
    read_documents,
    read_features,
    write_cache,
)
from sdm.embed import batches_by_length, encode, hidden_states, pool
from workbench.errors import DataError
from workbench.microworld import World
from workbench.tiny import byte_tokenizer, tiny_model


def test_claims_come_in_groups_balanced_and_without_repeats():
    world = World()
    rows = claim_documents(60, 20, world=world)
    assert len({row["document"] for row in rows if row["label"] >= 0}) == 120
    for split, group in (("train", KNOWN), ("test", KNOWN), ("test", OTHER_FACTS),
                         ("test", UNKNOWABLE)):  # fmt: skip
        labels = [r["label"] for r in rows if (r["split"], r["group"]) == (split, group)]
        assert sum(labels) == len(labels) / 2
    for group in FAR:
        assert [r["label"] for r in rows if r["group"] == group] == [-99] * 20
    assert rows == claim_documents(60, 20, world=world)


def test_other_facts_never_occur_in_the_pool():
    world = World()

    def facts(rows):
        found = set()
        for row in rows:
            claim = row["document"].split("True or false ?")[1]
            for city, relation in world.facts:
                word = {"country": (" is in ", "country"), "product": ("makes", "product"),
                        "mayor": ("led by", "mayor")}[relation]  # fmt: skip
                if city in claim and any(part in claim for part in word):
                    found.add((city, relation))
        return found

    rows = claim_documents(120, 40, world=world)
    pool_facts = facts([r for r in rows if r["split"] == "train"])
    others = facts([r for r in rows if r["group"] == OTHER_FACTS])
    hidden = facts([r for r in rows if r["group"] == UNKNOWABLE])
    assert pool_facts
    assert not pool_facts & others
    assert hidden <= set(world.pools["held_out"])
    assert not (pool_facts | others) & set(world.pools["held_out"])


def test_pooling_ignores_the_padding():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask).tolist() == [[2.0, 3.0], [4.0, 6.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0], [6.0]]
    assert pool(hidden, mask, "mean").tolist() == [[2.0], [4.0]]


def test_a_batch_gives_what_each_document_gives_alone():
    model, tokenizer = tiny_model("mistral", seed=0), byte_tokenizer()
    rows = encode(tokenizer, ["a", "longer text", "mid one"], 64)
    batch = hidden_states(model.eval(), rows, answers=[3, 5])
    for i, row in enumerate(rows):
        alone = hidden_states(model, [row], answers=[3, 5])
        for name in ("features", "answers"):
            assert torch.allclose(alone[name][0], batch[name][i], atol=1e-5)
    order = [i for part in batches_by_length(rows, 2) for i in part]
    assert sorted(order) == [0, 1, 2]
    assert len(rows[order[0]]) == max(map(len, rows))


def line(**changes) -> str:
    row = {"id": "a", "label": 0, "document": "x", "embedding": [1.0, 2.0], "attributes": [3.0]}
    return json.dumps({k: v for k, v in (row | changes).items() if v is not None})


def write(path, *lines):
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


def test_features_come_from_either_field_or_both(tmp_path):
    file = write(tmp_path / "x.jsonl", line(), line(id="b", label=1, embedding=[0, 5]))
    assert read_features(file).features.tolist() == [[1, 2], [0, 5]]
    assert read_features(file, use_embeddings=False).features.tolist() == [[3], [3]]
    both = read_features(file, concat_embeddings_to_attributes=True)
    assert both.features.tolist() == [[3, 1, 2], [3, 0, 5]]
    assert both.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["{"], ":1"),
        ([], "empty|no record"),
        ([line(label="0")], ":1:label"),
        ([line(label=None)], ":1:label: missing"),
        ([line(), line()], "'a' occurs twice"),
        ([line(), line(id="b", embedding=[1.0])], "record 2 .* has 1 numbers, expected 2"),
        ([line(embedding=[])], "has 0 numbers"),
        ([line(embedding=["x", 1])], r"embedding\[0\]: found 'x'"),
        ([line(embedding=None)], "embedding is missing; it has attributes"),
        (['{"id":"a","label":0,"document":"x","embedding":[NaN]}'], ":1"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, match):
    with pytest.raises(DataError, match=match):
        read_features(write(tmp_path / "x.jsonl", *lines))


def test_documents_need_their_fields_and_unique_ids(tmp_path):
    file = write(tmp_path / "d.jsonl", '{"id":"a","label":1,"document":"t","group":"g"}')
    assert read_documents(file) == [
        {"id": "a", "label": 1, "document": "t", "group": "g", "split": "train"}
    ]
    with pytest.raises(DataError, match="document"):
        read_documents(write(tmp_path / "e.jsonl", '{"id":"a","label":1}'))


def cache(folder):
    rows = [{"id": str(i), "label": i % 2, "document": "t", "split": "train"} for i in range(4)]
    return write_cache(folder, torch.arange(8.0).reshape(4, 2), torch.ones(4, 2), rows, model="m")


def test_a_folder_comes_back_as_it_was_written(tmp_path):
    data = read_cache(cache(tmp_path / "f"))
    assert data.features.tolist() == torch.arange(8.0).reshape(4, 2).tolist()
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.answers.tolist() == [[1, 1]] * 4
    half = data.select(np.array([True, False, True, False]))
    assert [row["id"] for row in half.meta] == ["0", "2"]


@pytest.mark.parametrize("name", ["features.safetensors", "meta.jsonl"])
def test_an_altered_folder_is_refused(tmp_path, name):
    folder = cache(tmp_path / "f")
    raw = bytearray((folder / name).read_bytes())
    raw[-3] ^= 1
    (folder / name).write_bytes(bytes(raw))
    with pytest.raises(DataError, match="altered"):
        read_cache(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match="missing"):
        read_cache(folder)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_cache(tmp_path)


def test_labels_outside_and_sentinels_in_training_are_refused(tmp_path):
    file = write(tmp_path / "x.jsonl", line(), line(id="b", label=-99))
    data = read_features(file)
    check_labels(data, 2, "evaluation", training=False)
    with pytest.raises(DataError, match=r"row 1 .*label -99.*scoring only"):
        check_labels(data, 2, "training", training=True)
    with pytest.raises(DataError, match="label 5"):
        check_labels(
            read_features(write(tmp_path / "y.jsonl", line(label=5))), 2, "eval", training=False
        )
