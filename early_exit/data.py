"""Documents as token lists, from several sources, a token budget for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import DataError
from workbench.text import load_texts


@dataclass
class Documents:
    """Token lists and where each came from."""

    sources: tuple[str, ...]
    """Names of the sources."""
    ids: list[list[int]] = field(default_factory=list)
    """One list of token ids per document, framed as the tokenizer's <s> text </s>."""
    source: list[int] = field(default_factory=list)
    """Index into `sources` per document."""

    @property
    def tokens(self) -> int:
        """Number of tokens in all."""
        return sum(map(len, self.ids))

    def take(self, keep: Sequence[int]) -> Documents:
        """The documents with these numbers."""
        return Documents(self.sources, [self.ids[i] for i in keep], [self.source[i] for i in keep])

    def split(self, every: int) -> tuple[Documents, Documents]:
        """All but every n-th document, and every n-th (so that both have all sources).

        >>> documents = Documents(("a",), [[1], [2], [3], [4]], [0] * 4)
        >>> [part.ids for part in documents.split(4)]
        [[[1], [2], [3]], [[4]]]
        """
        held = [i for i in range(len(self.ids)) if i % every == every - 1]
        kept = [i for i in range(len(self.ids)) if i % every != every - 1]
        return self.take(kept), self.take(held)


def load_documents(
    tokenizer: Any,
    sources: Sequence[str],
    *,
    split: str,
    tokens: int,
    max_length: int,
    seed: int = 0,
) -> Documents:
    """About `tokens` tokens, in equal parts from each source, documents cut at `max_length`.

    Raises:
        DataError: no source, or none of a source's texts has two tokens.
    """
    if not sources:
        raise DataError("no data source; give --data microworld:doc stdlib PATH …")
    documents = Documents(tuple(sources))
    budget = max(2, tokens // len(sources))
    for index, source in enumerate(sources):
        for ids in _until(tokenizer, source, split, budget, max_length, seed):
            documents.ids.append(ids)
            documents.source.append(index)
    return documents


def _until(
    tokenizer: Any, source: str, split: str, budget: int, max_length: int, seed: int
) -> list[list[int]]:
    """Documents of one source until the budget is used; asks for twice as many until it is."""
    count = max(8, budget // 150)
    while True:
        texts = load_texts(source, n=count, split=split, seed=seed)
        found: list[list[int]] = []
        used = 0
        for text in texts:
            ids = frame(tokenizer, text)[:max_length]
            if len(ids) < 2:
                continue
            found.append(ids)
            used += len(ids)
            if used >= budget:
                return found
        if len(texts) < count or count > 10**6:
            break
        count *= 2
    if not found:
        raise DataError(f"{source}: no text of at least two tokens in split {split!r}")
    return found


def frame(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `<s> text </s>`, as far as the tokenizer has these two."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.bos_token_id is not None:
        ids = [int(tokenizer.bos_token_id), *ids]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, int(tokenizer.eos_token_id)]
    return ids
