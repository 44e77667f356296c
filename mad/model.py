"""The language-model backbone: embedding, a stack of residual layers, norm, untied head.

x ← E[ids];   x ← x + layer(norm(x)) for each layer;   logits = W norm(x) + b
[arXiv 2403.17844, "mechanistic design" protocol]
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mad.layers.layer import Accounting
from mad.registry import parse_layer
from workbench.errors import ConfigError


class LanguageModel(nn.Module):
    """Residual stack over token embeddings; positions are the layers' own business.

    Embeddings start as N(0, 0.02), linear weights as U(±1/√in), linear biases at 0 except where a
    layer marks them with `no_reinit`. Layers are any modules that map (batch, time, width) to the
    same shape causally.
    """

    def __init__(self, vocab_size: int, width: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in layers)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocab_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                if getattr(module.bias, "no_reinit", False):
                    continue
                nn.init.zeros_(module.bias)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of the target at every position."""
        x = self.embedding(ids)  # (B, L, d)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.norm(x))


def build_model(
    layers: Sequence[str], *, vocab_size: int, width: int, max_length: int, seed: int
) -> LanguageModel:
    """A language model from layer names, initialised from `seed` alone.

    Layers (a user's own among them) draw their weights from torch's global generator, so its state
    is set for the time of the construction and put back afterwards.
    """
    if not layers:
        raise ConfigError("no layers given; name at least one, e.g. --layers mh-attention swiglu")
    choices = [parse_layer(layer) for layer in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [choice.make(width, max_length) for choice in choices]
        return LanguageModel(vocab_size, width, modules)


def account(model: LanguageModel, length: int) -> list[Accounting]:
    """Cost of each layer; a layer without `accounting` is asked for its parameters only."""
    rows = []
    for layer in model.layers:
        if hasattr(layer, "accounting"):
            rows.append(layer.accounting(length))
        else:
            params = sum(p.numel() for p in layer.parameters())
            rows.append(Accounting(params, params, 0, 2 * params))
    return rows
