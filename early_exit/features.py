"""One pass of the frozen backbone over each document; everything else reads the cached states.

Per token and exit: the gate's input, the cosine to the exit before; per token: the stream after
the last block (hence the full model's distribution), document, position. The state is exact
(every token has passed every block), which is what policy `defer` gives in decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from early_exit.adapters.base import Adapter
from early_exit.criteria import CRITERIA, saturation
from early_exit.data import Documents
from early_exit.heads import Exits
from workbench.errors import DataError

Watch = Callable[[Iterable[Any], str], Iterator[Any]]
"""`run.progress`: a progress bar that honours interrupts."""

CHUNK = 1024
"""Tokens whose vocabulary distributions are formed at once."""


def batches(documents: Documents, tokens: int) -> list[list[int]]:
    """Document numbers, longest first, in groups of at most `tokens` padded tokens."""
    order = sorted(range(len(documents.ids)), key=lambda i: (-len(documents.ids[i]), i))
    groups: list[list[int]] = []
    for number in order:
        longest = len(documents.ids[groups[-1][0]]) if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def pad(documents: Documents, group: list[int]) -> tuple[Int[Tensor, "n time"], Tensor]:
    """Right-padded ids (later tokens see no padding) and a mask of positions with a successor."""
    longest = len(documents.ids[group[0]])
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    mask = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, number in enumerate(group):
        length = len(documents.ids[number])
        ids[row, :length] = torch.tensor(documents.ids[number])
        mask[row, : length - 1] = True
    return ids, mask


@torch.no_grad()
def collect(
    adapter: Adapter,
    exits: tuple[int, ...],
    documents: Documents,
    *,
    emission: str = "lens",
    batch_tokens: int = 4096,
    watch: Watch = lambda items, label: iter(items),
) -> dict[str, Any]:
    """Hidden states at the exits, one forward pass per document.

    Returns a tree of tensors over all N tokens that have a successor:
    `x` (N, exits, m) gate inputs, `final` (N, d), `cosine` (N, exits), `document`, `position`,
    `source` (N), and `last` (N, exits, d), the last block's output on h_e, for that emission.
    There the last block's state is the one of a text whose tokens all left at e.

    Raises:
        DataError: a stream is not finite (names the block).
    """
    parts: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        parts.setdefault(name, []).append(value.cpu())

    for group in watch(batches(documents, batch_tokens), "hidden states"):
        ids, mask = pad(documents, group)
        mask_device = mask.to(adapter.device)
        hidden = previous = adapter.embed(ids.to(adapter.device))
        inputs, cosines, lasts, low = [], [], [], 0
        for layer in exits:
            before = adapter.run(hidden, low, layer) if layer > low else hidden
            hidden = adapter.run(before, layer, layer + 1)
            _require_finite(hidden[mask_device], layer)
            inputs.append(adapter.streams(before, hidden)[mask_device])
            cosines.append(saturation(hidden[mask_device], previous[mask_device]))
            if emission == "last_block":
                out = adapter.run(hidden, adapter.n_layers - 1, adapter.n_layers)
                lasts.append(out[mask_device])
            previous, low = hidden, layer + 1
        final = adapter.run(hidden, low, adapter.n_layers)[mask_device]
        _require_finite(final, adapter.n_layers - 1)
        add("x", torch.stack(inputs, dim=1))
        add("cosine", torch.stack(cosines, dim=1))
        add("final", final)
        if lasts:
            add("last", torch.stack(lasts, dim=1))
        rows, columns = mask.nonzero(as_tuple=True)
        add("document", torch.tensor(group)[rows])
        add("position", columns)
        add("source", torch.tensor([documents.source[number] for number in group])[rows])
    return {name: torch.cat(value) for name, value in parts.items()}


def _require_finite(hidden: Tensor, layer: int) -> None:
    if not torch.isfinite(hidden).all():
        raise DataError(
            f"the stream after block {layer} holds NaN or infinite values; the weights are damaged "
            "or the number format is too narrow (try --dtype float32)"
        )


def residual(adapter: Adapter, features: dict[str, Any]) -> Float[Tensor, "n exits width"]:
    """h_e from the gate's input (two summed streams for state-space models)."""
    x = features["x"]
    if adapter.gate_width == adapter.width:
        return x
    return x[..., : adapter.width] + x[..., adapter.width :]


@torch.no_grad()
def measure(
    adapter: Adapter,
    exits: Exits,
    features: dict[str, Any],
    *,
    watch: Watch = lambda items, label: iter(items),
) -> dict[str, Any]:
    """What each exit would emit, and every criterion's score, from cached states.

    Returns `answer` (N) the full model's argmax, `token` (N, exits) the exit's own, `rank`
    (N, exits) how many tokens the exit prefers to the answer (0 = agreement), and one (N, exits)
    array per criterion.
    """
    device = adapter.device
    stream = features["last"] if exits.emission == "last_block" else residual(adapter, features)
    parts: dict[str, list[Tensor]] = {}
    count = len(stream)
    on_logits = {k: c.score for k, c in CRITERIA.items() if c.looks_at == "logits"}
    for low in watch(range(0, count, CHUNK), "distributions"):
        part = slice(low, low + CHUNK)
        answer = adapter.logits(features["final"][part].to(device)).argmax(-1)
        h = stream[part].to(device)
        if exits.translators is not None:
            h = exits.translators(h)
        logits = adapter.logits(h)
        own = logits.gather(-1, answer[:, None, None].expand(-1, h.shape[1], 1))
        found = {"answer": answer, "token": logits.argmax(-1), "rank": (logits > own).sum(-1)}
        for name, score in on_logits.items():
            assert score is not None
            found[name] = score(logits)
        found["gate"] = exits.gates.scores(features["x"][part].to(device))
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    result: dict[str, Any] = {name: torch.cat(value) for name, value in parts.items()}
    result["saturation"] = features["cosine"]
    result["fixed"] = torch.ones(count, len(exits.exits))
    result["oracle"] = (result["token"] == result["answer"][:, None]).float()
    return result


def labels(measures: dict[str, Any], topk: int) -> Int[Tensor, "n exits"]:
    """1 where the full model's argmax is among the exit's `topk` best.

    q = 1[argmax p_{L-1} ∈ top-k(p_e)]; k = 1 is "emits the same token", k = 15 the published one.
    """
    return (measures["rank"] < topk).long()


@torch.no_grad()
def pruned_agreement(
    adapter: Adapter, documents: Documents, *, batch_tokens: int = 4096, watch: Watch
) -> Float[np.ndarray, "documents kept"]:
    """Tokens per document on which a model cut to blocks 0..k-1 and L-1 agrees with the full one.

    Column k - 1 holds the model of k + 1 blocks, k = 1..L-1; the last column is the full model.
    """
    top = adapter.n_layers
    hits = np.zeros((len(documents.ids), top - 1))
    for group in watch(batches(documents, batch_tokens), "layer pruning"):
        ids, mask = pad(documents, group)
        hidden = adapter.embed(ids.to(adapter.device))
        answers = []
        for k in range(1, top):
            hidden = adapter.run(hidden, k - 1, k)
            cut = adapter.logits(adapter.run(hidden, top - 1, top)).argmax(-1).cpu()
            answers.append(cut)
        for k, answer in enumerate(answers):
            same = (answer == answers[-1]) & mask
            hits[group, k] = same.sum(1).numpy()
    return hits
