"""How much the model's loss rises when the output of one linear layer is disturbed.

    dL ~ 1/2 sum_t sum_o E[g_to^2] dy_to^2,        g = d(nats) / d(layer output)

with g from the text's own tokens (``fisher``: empirical Fisher) or from tokens drawn from the
model itself (``kl``: the Hessian of KL(model || disturbed model), [Kunstner et al. 2019]). The
error of a randomised Hadamard rotated weight is spread evenly over the outputs, so the mean over
outputs is what counts: loss per token ~ s tr(E H E^T), s = 1/2 sum_t sum_o g_to^2 / (N m).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from workbench.errors import ConfigError, DataError

KINDS = ("fisher", "kl", "uniform")


def output_sensitivity(
    model: nn.Module,
    tokens: Int64[Tensor, "rows length"],
    names: Sequence[str],
    *,
    kind: str = "fisher",
    mask: Bool[Tensor, "rows length"] | None = None,
    batch_size: int = 8,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[str, float]:
    """s of every named layer: nats per token per unit of tr(E H E^T), H unscaled.

    One forward and one backward pass per batch; parameters get no gradients and are left as they
    were. Padding (``mask`` False) neither counts as target nor as token.

    Raises:
        ConfigError: unknown kind, or ``kl`` without a generator.
        DataError: no token to predict, or gradients that are not finite.
    """
    if kind not in KINDS[:2]:
        raise ConfigError(f"sensitivity {kind!r}: choose from fisher, kl")
    if kind == "kl" and generator is None:
        raise ConfigError("sensitivity kl draws tokens from the model: give a generator")
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    total = int(keep[:, 1:].sum())
    if not total:
        raise DataError("no token to predict: every target is padding")
    sums = dict.fromkeys(names, 0.0)
    wide: dict[str, int] = {}

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            wide[name] = output.shape[-1]

            def take(gradient: Tensor) -> None:
                sums[name] += float(gradient.float().square().sum(dtype=torch.float64))

            output.register_hook(take)

        return hook

    def wake(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embedding.register_forward_hook(wake))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        device = next(model.parameters()).device
        pairs = list(zip(tokens.split(batch_size), keep.split(batch_size), strict=True))
        for ids, kept in progress(pairs):
            with torch.enable_grad():
                _loss(model, ids.to(device), kept.to(device), kind, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    found = {name: 0.5 * sums[name] / (total * wide.get(name, 1)) for name in names}
    bad = [name for name, value in found.items() if not value < float("inf")]
    if bad:
        raise DataError(f"{bad[0]}: gradients of the output are not finite")
    return found


def _loss(
    model: nn.Module, ids: Tensor, kept: Tensor, kind: str, generator: torch.Generator | None
) -> Tensor:
    """Sum of nats over the counted targets."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    targets = ids[:, 1:]
    if kind == "kl":
        chances = logits.detach().softmax(-1).flatten(0, 1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)
        targets = drawn.view(targets.shape).to(ids.device)
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(targets.shape)
    return (nats * kept[:, 1:]).sum()
