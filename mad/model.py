"""The two backbones: a language model over a stack of layers, and an auto-encoder.

Language model     x ← E[ids] (+ P);   x ← x + layer(norm(x)) for each layer;   W norm(x) + b
Auto-encoder       the same stack as encoder, pooled over time to one code z of the model's width;
                   position j is decoded from z + S_j by two layers of a perceptron.
[arXiv 2403.17844, "mechanistic design" protocol and "compression"]
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mad.layers.layer import Accounting
from mad.registry import parse_layer
from workbench.errors import ConfigError, unknown_name

Norm = Callable[[int], nn.Module]
"""Makes the normalisation of a given width."""

PositionEmbeds = Callable[[int, int], Tensor | nn.Embedding]
"""Makes a table (max_length, width) that is added to the embeddings."""


def rms_norm(width: int) -> nn.Module:
    """The default normalisation: weight only, eps 1e-5."""
    return nn.RMSNorm(width, eps=1e-5)


def sinusoids(length: int, width: int) -> Float[Tensor, "length width"]:
    """Rows [sin(j w), cos(j w)] with w_i = exp(−i ln(10000) / (d/2 − 1)), zero-padded if d is odd.

    >>> sinusoids(2, 5).shape, sinusoids(1, 4).tolist()
    (torch.Size([2, 5]), [[0.0, 0.0, 1.0, 1.0]])
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float64)
    rates = 10000.0 ** (-index / max(half - 1, 1))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, width - 2 * half)).float()


def stays(parameter: Tensor | None) -> bool:
    """True for a parameter that its layer initialised itself (marked `no_reinit`), or none."""
    return parameter is None or getattr(parameter, "no_reinit", False)


class Stack(nn.Module):
    """Token embeddings and residual layers: what both backbones share."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: Sequence[nn.Module],
        *,
        norm: Norm = rms_norm,
        position_embeds: PositionEmbeds | None = None,
        embed_drop_rate: float = 0.0,
        max_length: int = 1280,
    ) -> None:
        super().__init__()
        if not 0 <= embed_drop_rate < 1:
            raise ConfigError(f"embed_drop_rate={embed_drop_rate} lies outside [0, 1)")
        self.make_norm = norm
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norm(width) for _ in layers)
        self.positions: nn.Parameter | None = None
        if position_embeds is not None:
            table = position_embeds(max_length, width)
            table = table.weight if isinstance(table, nn.Embedding) else table
            if table.shape != (max_length, width):
                raise ConfigError(
                    f"position_embeds made a table of shape {tuple(table.shape)}; expected "
                    f"(max_length, width) = ({max_length}, {width})"
                )
            self.positions = nn.Parameter(table.detach().clone())
        self.drop = nn.Dropout(embed_drop_rate)

    def add_head(self, vocab_size: int) -> None:
        """The last norm and the linear map to logits."""
        width = self.embedding.embedding_dim
        self.norm = self.make_norm(width)
        self.head = nn.Linear(width, vocab_size)

    def embed(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """Embeddings of the tokens, with positions if there are any."""
        x = self.embedding(ids)
        if self.positions is not None:
            if ids.shape[1] > len(self.positions):
                raise ConfigError(
                    f"{ids.shape[1]} positions, but position_embeds has {len(self.positions)}; "
                    "raise max_length"
                )
            x = x + self.positions[: ids.shape[1]]
        return self.drop(x)

    def mix(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The residual layers, each after its norm."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x

    def initialise(self, linear_std: float | None = None) -> None:
        """Embeddings from N(0, 0.02), biases of linear maps 0, their weights as torch has them.

        `linear_std` draws the weights from a normal distribution instead. What a layer marks with
        `no_reinit` stays.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if linear_std is not None and not stays(module.weight):
                nn.init.normal_(module.weight, std=linear_std)
            if not stays(module.bias):
                nn.init.zeros_(module.bias)


class StackOptions(TypedDict, total=False):
    """What every backbone may be given by name; `Stack` has the defaults."""

    norm: Norm
    position_embeds: PositionEmbeds | None
    embed_drop_rate: float
    max_length: int


class LanguageModel(Stack):
    """Residual stack over token embeddings; positions are the layers' own business.

    Embeddings start as N(0, 0.02), linear weights as U(±1/√in), linear biases at 0 except where a
    layer marks them with `no_reinit`. Layers are any modules that map (batch, time, width) to the
    same shape causally.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: Sequence[nn.Module],
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(vocab_size, width, layers, **options)
        self.add_head(vocab_size)
        self.initialise()

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of the target at every position."""
        return self.head(self.norm(self.mix(self.embed(ids))))


class AutoEncoder(Stack):
    """Everything the sequence holds through one vector: encode, pool, decode each position.

    z = pool(mix(embed(ids)));   h_j = z + S_j;   h ← gelu(W norm(h) + b) twice;   W norm(h) + b

    Pools: `last` the last position, `cls` one learned position after it (layers then see one more),
    `avg` the mean over time. Exactly as many positions are decoded as were read. Linear weights
    start as N(0, 0.02) and biases at 0, except where a layer marks them with `no_reinit`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: Sequence[nn.Module],
        *,
        global_pool: Literal["last", "cls", "avg"] = "last",
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(vocab_size, width, layers, **options)
        if global_pool not in ("last", "cls", "avg"):
            raise unknown_name("global_pool", global_pool, ("last", "cls", "avg"))
        self.global_pool = global_pool
        self.cls = nn.Parameter(torch.randn(width)) if global_pool == "cls" else None
        self.decoder = nn.Sequential(
            self.make_norm(width),
            nn.Linear(width, width),
            nn.GELU(),
            self.make_norm(width),
            nn.Linear(width, width),
            nn.GELU(),
        )
        self.add_head(vocab_size)
        self.initialise(linear_std=0.02)

    def encode(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch width"]:
        """The code of each sequence."""
        x = self.embed(ids)
        if self.cls is not None:
            x = torch.cat([x, self.cls.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        x = self.mix(x)
        return x.mean(dim=1) if self.global_pool == "avg" else x[:, -1]

    def decode(
        self, code: Float[Tensor, "batch width"], length: int
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of `length` positions from the code alone."""
        table = sinusoids(length, code.shape[-1]).to(code)
        return self.head(self.norm(self.decoder(code[:, None] + table)))

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of the target at every position, all of them through the code."""
        return self.decode(self.encode(ids), ids.shape[1])


BACKBONES: dict[str, type[Stack]] = {"language-model": LanguageModel, "autoencoder": AutoEncoder}
"""Backbones by their published names."""


def build_model(
    layers: Sequence[str],
    *,
    vocab_size: int,
    width: int,
    max_length: int,
    seed: int,
    backbone: str = "language-model",
    **options: object,
) -> Stack:
    """A model from layer names, initialised from `seed` alone.

    `options` are the backbone's own: `norm`, `position_embeds`, `embed_drop_rate`, `global_pool`.
    Layers (a user's own among them) draw their weights from torch's global generator, so its state
    is set for the time of the construction and put back afterwards.
    """
    if not layers:
        raise ConfigError("no layers given; name at least one, e.g. --layers mh-attention swiglu")
    if backbone not in BACKBONES:
        raise unknown_name("backbone", backbone, BACKBONES)
    make: Any = BACKBONES[backbone]
    known = [name for name in inspect.signature(make).parameters if name != "options"]
    known += StackOptions.__annotations__
    for name in options:
        if name not in known:
            raise unknown_name(f"option of backbone {backbone}", name, known)
    choices = [parse_layer(layer) for layer in layers]
    reach = max_length + (options.get("global_pool") == "cls")  # the pooled position is one more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [
            choice.make(width, reach, layer_id=index, n_layers=len(choices))
            for index, choice in enumerate(choices)
        ]
        return make(vocab_size, width, modules, max_length=max_length, **options)


def account(model: Stack, length: int) -> list[Accounting]:
    """Cost of each layer; a layer without `accounting` is asked for its parameters only."""
    return [account_layer(layer, length) for layer in model.layers]


def account_layer(layer: nn.Module, length: int) -> Accounting:
    """Cost of one layer; of a module that has no `accounting`, its parameters and linear maps."""
    if hasattr(layer, "accounting"):
        return layer.accounting(length)
    params = sum(p.numel() for p in layer.parameters())
    return Accounting(params, params, 0, 2 * params)
