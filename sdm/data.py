"""Documents with labels and groups, and the two forms in which their features come.

A *document* is a dict {id, document, label, split, group}: `split` "train" (the pool that is
shuffled into training and calibration halves) or "test"; `group` names the rows that are reported
together. A label of -99 marks text that belongs to no class (scoring only), -1 an unknown label.

Features come as JSON lines with `id, label, document` and `embedding` and/or `attributes`, or as a
folder `features.safetensors` + `meta.jsonl` + `manifest.json` written by `sdm.cache_hidden_states`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench import storage
from workbench.errors import ConfigError, DataError
from workbench.microworld import World
from workbench.text import load_texts, read_jsonl

UNLABELED, OUT_OF_DISTRIBUTION = -1, -99
ANSWERS = (" false", " true")
"""What the built-in models say after a claim, in the order of the class indices."""
KNOWN, OTHER_FACTS, UNKNOWABLE = "stated", "stated, other facts", "unknowable"
FAR = ("far: shuffled words", "far: sums", "far: docstrings")
TEST_FACTS = 0.25
"""Share of the facts kept out of the pool, for the group "stated, other facts"."""


@dataclass(frozen=True)
class FeatureSet:
    """Rows of features with their labels and what they are."""

    features: Tensor
    """(rows, width) float32."""
    labels: np.ndarray
    """Class index, -1 unlabelled, -99 out of distribution."""
    meta: list[dict[str, Any]]
    """id, document, split and group of each row."""
    answers: np.ndarray | None = None
    """The language model's own logits of the answer words, one column per class, if known."""
    fingerprint: str = ""
    """SHA-256 of what was read."""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, mask: np.ndarray) -> FeatureSet:
        """The rows of a mask."""
        rows = np.flatnonzero(mask)
        return FeatureSet(
            self.features[torch.from_numpy(rows)],
            self.labels[rows],
            [self.meta[i] for i in rows],
            None if self.answers is None else self.answers[rows],
            self.fingerprint,
        )

    def column(self, name: str) -> np.ndarray:
        """One field of `meta` as an array of text."""
        return np.array([str(row.get(name, "")) for row in self.meta])


# ---------------------------------------------------------------- microworld claims


def claim_documents(
    n_train: int, n_test: int, *, world: World | None = None, context: int = 2
) -> list[dict[str, Any]]:
    """Claims to be judged by a language model, known, unknowable and foreign.

    Each claim follows 0 … `context` statements about other cities and ends before the answer
    word. No document occurs twice. Groups of the test split, `n_test` rows each:

        stated               drawn as the pool is: exchangeable with the calibration half
        stated, other facts  the language model knows them, the pool holds no claim about them
        unknowable           no training text of the language model states them; half are true
        far: …               the claims' words shuffled; sums; docstrings (no label)

    >>> rows = claim_documents(4, 2)
    >>> len(rows), rows[0]["split"], rows[0]["document"].endswith(" A")
    (16, 'train', True)
    """
    world = world or World()
    keys = world.pools["stated"]
    rng = np.random.Generator(np.random.Philox(key=[world.seed, len(keys)]))
    other = set(rng.permutation(len(keys))[: round(TEST_FACTS * len(keys))].tolist())
    aside = {keys[i] for i in other}
    seen: set[str] = set()

    def collect(n: int, split: str, group: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        share = 1.0 if group == UNKNOWABLE else 0.0
        wanted = [n - n // 2, n // 2]
        index = 0
        while len(rows) < n and index < 100 * n + 1000:
            claim = world.statements(1, split, unknowable=share, start=index)[0]
            label = int(claim["label"])
            apart = (claim["city"], claim["relation"]) in aside
            text = _context(world, split, group, index, context, claim["city"]) + claim["document"]
            index += 1
            if wanted[label] == 0 or text in seen:
                continue
            if group != UNKNOWABLE and apart != (group == OTHER_FACTS):
                continue
            seen.add(text)
            wanted[label] -= 1
            name = f"{split}-{group}-{len(rows)}".replace(" ", "_").replace(",", "")
            rows.append(
                {"id": name, "document": text, "label": label, "split": split, "group": group}
            )
        return rows

    known = collect(n_test, "test", KNOWN)
    rows = collect(n_train, "train", KNOWN) + known
    for group in (OTHER_FACTS, UNKNOWABLE):
        rows += collect(n_test, "test", group)
    return rows + _far_documents(world, n_test, [row["document"] for row in known])


def _context(world: World, split: str, group: str, index: int, most: int, city: str) -> str:
    """0 … `most` true statements about other cities."""
    position = 1_000_000 + index
    n_items = position % (most + 1)
    if not n_items:
        return ""
    if group == UNKNOWABLE:
        position += 500_000
    sample = world.sample("world", position, split, n_items=n_items, item="tell")  # type: ignore[arg-type]
    if any(item["key"][0] == city for item in sample.meta["items"]):
        return ""
    return sample.text


def _far_documents(world: World, n: int, claims: Sequence[str]) -> list[dict[str, Any]]:
    rng = np.random.Generator(np.random.Philox(key=[world.seed, n]))
    shuffled = []
    for text in claims:
        words = re.findall(r"\s*\S+", text)
        shuffled.append("".join(words[i] for i in rng.permutation(len(words))))
    sums = [re.sub(r"\s*\S+\s*\.?$", "", text) for text in world.texts("sum", n, "test")]
    docstrings = [text[:120] for text in load_texts("stdlib", split="test", n=n)]
    rows = []
    for group, texts in zip(FAR, (shuffled, sums, docstrings), strict=True):
        rows += [
            {
                "id": f"{group.removeprefix('far: ').replace(' ', '_')}-{i}",
                "document": text,
                "label": OUT_OF_DISTRIBUTION,
                "split": "test",
                "group": group,
            }
            for i, text in enumerate(texts)
        ]
    return rows


# ---------------------------------------------------------------- documents from files


def read_documents(path: Path | str) -> list[dict[str, Any]]:
    """The documents of a JSON-lines file with `id`, `label`, `document` (and split, group).

    Raises:
        DataError: file:line:field of the first five faults, or an id that occurs twice.
    """
    rows = read_jsonl(
        path,
        {"id": str, "label": int, "document": str},
        optional={"split": str, "group": str},
    )
    _refuse_twice(path, [row["id"] for row in rows])
    return [{"split": "train", "group": "documents", **row} for row in rows]


def _refuse_twice(path: Path | str, ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for number, name in enumerate(ids, 1):
        if name in seen:
            raise DataError(f"{path}: record {number}: id {name!r} occurs twice; make ids unique")
        seen.add(name)


def read_features(
    path: Path | str,
    *,
    use_embeddings: bool = True,
    concat_embeddings_to_attributes: bool = False,
) -> FeatureSet:
    """Features from a folder of `sdm.cache_hidden_states` or from JSON lines.

    Raises:
        DataError: nothing there, damaged, not finite, rows of different width, no such field.
    """
    path = Path(path)
    if path.is_dir():
        return read_cache(path)
    kinds = {"id": str, "label": int, "document": str}
    fields = ["attributes", "embedding"] if concat_embeddings_to_attributes else ["embedding"]
    if not (use_embeddings or concat_embeddings_to_attributes):
        fields = ["attributes"]
    rows = read_jsonl(
        path,
        kinds,
        optional={"embedding": list, "attributes": list, "logits": list, "group": str},
    )
    _refuse_twice(path, [row["id"] for row in rows])
    for number, row in enumerate(rows, 1):
        for name in fields:
            if name not in row:
                raise DataError(
                    f"{path}: record {number} ({row['id']!r}): {name} is missing; it has "
                    f"{', '.join(k for k in ('embedding', 'attributes') if k in row) or 'neither'}"
                    " (--use_embeddings reads embedding, --no-use_embeddings attributes, "
                    "--concat_embeddings_to_attributes both)"
                )
    features = torch.cat([_matrix(path, rows, name) for name in fields], 1)
    logits = all("logits" in row for row in rows)
    return FeatureSet(
        features,
        np.array([row["label"] for row in rows], dtype=np.int64),
        [{"id": r["id"], "document": r["document"], "group": r.get("group", "eval")} for r in rows],
        _matrix(path, rows, "logits").numpy() if logits else None,
        storage.sha256(path),
    )


def _matrix(path: Path, rows: list[dict[str, Any]], name: str) -> Tensor:
    width = len(rows[0][name])
    for number, row in enumerate(rows, 1):
        values = row[name]
        where = f"{path}: record {number} ({row['id']!r}): {name}"
        if len(values) != width or width == 0:
            raise DataError(f"{where} has {len(values)} numbers, expected {width or 'some'}")
        for position, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise DataError(f"{where}[{position}]: found {value!r:.40}, expected a number")
    return torch.tensor([row[name] for row in rows], dtype=torch.float32)


def read_cache(folder: Path | str) -> FeatureSet:
    """Features from a folder written by `write_cache`, verified by its hashes.

    Raises:
        DataError: a part is missing, altered or does not fit the others.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise DataError(
            f"{folder}: no manifest.json; write the folder with "
            f"python -m sdm.cache_hidden_states --out {folder}"
        )
    manifest = storage.read_json(folder / "manifest.json")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing, though manifest.json lists it")
        if storage.sha256(folder / name) != digest:
            raise DataError(f"{folder / name}: altered, its SHA-256 is not that in manifest.json")
    tensors = storage.read_safetensors(folder / "features.safetensors")
    meta = read_jsonl(folder / "meta.jsonl", {"id": str, "label": int, "document": str})
    features = tensors["features"].float()
    if len(features) != len(meta):
        raise DataError(f"{folder}: {len(features)} rows of features, {len(meta)} of meta.jsonl")
    answers = tensors["answers"].float().numpy() if "answers" in tensors else None
    labels = np.array([row["label"] for row in meta], dtype=np.int64)
    digest = storage.sha256(folder / "manifest.json")
    return FeatureSet(features, labels, meta, answers, digest)


def write_cache(
    folder: Path | str,
    features: Tensor,
    answers: Tensor | None,
    documents: Sequence[dict[str, Any]],
    **facts: Any,
) -> Path:
    """Write a folder of features; the manifest comes last and completes it."""
    folder = Path(folder)
    tensors = {"features": features} | ({} if answers is None else {"answers": answers})
    files = [
        storage.write_safetensors(folder / "features.safetensors", tensors),
        storage.write_text(
            folder / "meta.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents),
        ),
    ]
    manifest = {
        "rows": len(documents),
        "width": features.shape[1],
        "dtype": str(features.dtype).removeprefix("torch."),
        **facts,
        "files": {file.name: storage.sha256(file) for file in files},
    }
    storage.write_json(folder / "manifest.json", manifest)
    return folder


# ---------------------------------------------------------------- checks before training


def check_labels(data: FeatureSet, n_classes: int, what: str, *, training: bool) -> None:
    """Refuse labels that do not fit; -1 and -99 are allowed for scoring only.

    Raises:
        DataError: first row with a label outside of 0 … C−1.
    """
    allowed = set(range(n_classes)) | (set() if training else {UNLABELED, OUT_OF_DISTRIBUTION})
    for row, label in enumerate(data.labels):
        if int(label) not in allowed:
            name = data.meta[row].get("id", row)
            extra = "; -1 and -99 are for scoring only" if label in (-1, -99) else ""
            raise DataError(
                f"{what}: row {row} (id {name!r}): label {label}, expected 0 … {n_classes - 1}"
                f"{extra}; --class_size gives the number of classes"
            )


def require_group(groups: Sequence[str], group: str) -> None:
    """Refuse a group name that no row has."""
    if group not in groups:
        raise ConfigError(f"no rows of group {group!r}; found {', '.join(sorted(set(groups)))}")
