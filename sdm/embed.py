"""Hidden states of any Hugging Face causal language model as features.

    features = mean over tokens of the last layer's hidden states ‖ hidden state of the last token

Documents are read once, in batches of similar length, the padding masked; they are not generated
from. The last token stands right before the answer, so its state holds what the model is about to
say; the logits of the answer words are kept beside the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pooling = Literal["mean+last", "mean", "last"]


def pool(
    hidden: Float[Tensor, "batch time width"],
    mask: Int[Tensor, "batch time"],
    pooling: Pooling = "mean+last",
) -> Float[Tensor, "batch features"]:
    """Mean over the unmasked tokens, state of the last unmasked token, or both in this order."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)
    final = hidden[torch.arange(len(hidden), device=mask.device), last]
    parts = {"mean": [mean], "last": [final], "mean+last": [mean, final]}
    return torch.cat(parts[pooling], 1)


def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """First token of each answer word.

    Raises:
        ConfigError: two answers begin with the same token.
    """
    ids = [tokenizer.encode(answer, add_special_tokens=False)[:1] for answer in answers]
    flat = [one[0] for one in ids if one]
    if len(flat) < len(answers) or len(set(flat)) < len(answers):
        raise ConfigError(f"--answers {list(answers)}: they do not differ in their first token")
    return flat


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], max_length: int
) -> list[list[int]]:
    """Token ids of each document, with the begin token where the tokenizer has one.

    The *last* `max_length` tokens are kept, because the end carries the question.
    """
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    rows = []
    for number, text in enumerate(documents):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids and not begin:
            raise DataError(f"document {number} is empty and the tokenizer has no begin token")
        rows.append(begin + ids[-(max_length - len(begin)) :])
    return rows


def batches_by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length; the longest come first."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    answers: Sequence[int],
    layer: int = -1,
    pooling: Pooling = "mean+last",
) -> dict[str, Any]:
    """Features and answer logits of one batch of token rows, as {"features", "answers"}."""
    device = model.device
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):  # padding on the right: a causal model never looks at it
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    ids, mask = ids.to(device), mask.to(device)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states
    if not -len(states) <= layer < len(states):
        raise ConfigError(f"--layer {layer}: the model has {len(states)} hidden states")
    features = pool(states[layer].float(), mask, pooling)
    last = (mask.sum(1) - 1).cpu()
    logits = output.logits[torch.arange(len(rows)), last][:, list(answers)].float()
    return {"features": features.cpu(), "answers": logits.cpu()}
