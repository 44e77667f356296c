"""Perplexity of a model on several texts, and its ratio to the 16-bit model with a paired
interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.errors import ConfigError
from workbench.evaluate import perplexity_from_nats, token_nats
from workbench.text import load_texts, pack_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextBlocks:
    """Token blocks of one source; ``counted`` is False on padding."""

    name: str
    tokens: Int64[Tensor, "rows length"]
    counted: Bool[Tensor, "rows length"]

    @property
    def n_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.counted.sum())


def load_blocks(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    tokens: int,
    length: int,
    split: str,
    seed: int = 0,
) -> TextBlocks:
    """About ``tokens`` tokens of ``source`` in rows of ``length``; generated documents stay
    whole."""
    if tokens < length:
        raise ConfigError(f"{tokens} tokens of {source} asked for; one row already has {length}")
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    whole = source.startswith("microworld") and pad is not None and pad != end
    # enough texts for any tokenizer: a document has some 300 words, a docstring some 100
    texts = load_texts(source, n=max(64, tokens // 40), split=split, seed=seed)
    blocks = pack_blocks(tokenizer, texts, length, tokens // length, whole=whole)
    counted = blocks != pad if whole else torch.ones_like(blocks, dtype=torch.bool)
    return TextBlocks(source, blocks, counted)


def nats_by_source(
    model: PreTrainedModel,
    sources: Iterable[TextBlocks],
    *,
    batch_size: int = 8,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[str, Float[Tensor, "rows predicted"]]:
    """-ln p of every token of every source."""
    return {s.name: token_nats(model, s.tokens, batch_size) for s in progress(list(sources))}


def perplexity_columns(
    source: TextBlocks, nats: Tensor, reference: Tensor | None = None
) -> dict[str, Any]:
    """Perplexity with its 95 % interval, and (paired over blocks) its ratio to the reference
    model."""
    kept = source.counted[:, 1:].numpy()
    own = perplexity_from_nats(nats.double().numpy(), kept)
    columns: dict[str, Any] = {
        "perplexity": own.perplexity,
        "perplexity_low": own.ci_low,
        "perplexity_high": own.ci_high,
        "n_tokens": own.n_tokens,
    }
    if reference is not None:
        gap = perplexity_from_nats((nats - reference).double().numpy(), kept)
        columns |= {
            "ratio": gap.perplexity,
            "ratio_low": gap.ci_low,
            "ratio_high": gap.ci_high,
        }
    return columns
