"""A classification head on the last hidden state of a (compressed) decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """Token ids of a text and its class."""

    ids: list[int]
    label: int


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict[str, Any]],
    labels: Sequence[str],
    max_length: int,
) -> list[Example]:
    """Token ids of ``record["texts"]`` one after the other, cut on the left.

    Raises:
        DataError: a label that is none of ``labels``.
    """
    places = {name: place for place, name in enumerate(labels)}
    examples = []
    for number, record in enumerate(records, 1):
        if record["label"] not in places:
            raise DataError(
                f"record {number}: label {record['label']!r}, training has {', '.join(labels)}"
            )
        first, *others = record["texts"]
        ids = tokenizer.encode(first)
        for text in others:
            ids += tokenizer.encode(text, add_special_tokens=False)
        examples.append(Example(ids[-max_length:], places[record["label"]]))
    return examples


class Classifier(nn.Module):
    """logits = A h_T + b with h_T the decoder's last hidden state at the last token."""

    def __init__(self, model: Any, n_labels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.model = model
        embeddings = model.get_input_embeddings().weight
        self.head = nn.Linear(embeddings.shape[1], n_labels)
        with torch.no_grad():
            self.head.weight.normal_(0.0, 0.02, generator=generator)
            self.head.bias.zero_()
        self.head.to(embeddings.device)

    def forward(
        self, ids: Int64[Tensor, "rows length"], last: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows labels"]:
        """Logits from the hidden state at position ``last``; padding is on the right."""
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        return self.head(hidden[rows, last].float())

    def loss_sum(self, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """Sum of -ln p(label), and how many labels are the likeliest."""
        width = max(len(example.ids) for example in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
        device = self.head.weight.device
        last = torch.tensor([len(example.ids) - 1 for example in examples], device=device)
        wanted = torch.tensor([example.label for example in examples], device=device)
        logits = self(ids.to(device), last)
        right = int((logits.argmax(dim=-1) == wanted).sum())
        return nn.functional.cross_entropy(logits, wanted, reduction="sum"), right
