"""What every family must offer: embed, run blocks, fill skipped state, norm, head, cache.

The blocks are driven one by one with the model's own weights; `adapt` compares the result with
the model's own forward pass before anything else is done with it, so a layout that merely looks
familiar is refused instead of decoded wrongly.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import ConfigError, DataError, unknown_name

Policy = Literal["propagate", "defer", "copy_token", "copy_layer", "skip"]
"""What happens to the state of the blocks a token skips."""

ADAPTERS: dict[str, str] = {
    "attention": "early_exit.adapters.attention:AttentionAdapter",
    "mamba": "early_exit.adapters.mamba:MambaAdapter",
}
"""Family → class. Add a family with `ADAPTERS["mine"] = "package.module:Class"`."""


class State(Protocol):
    """The decoding state of all blocks; `lengths[j]` tokens have passed through block j."""

    lengths: list[int]

    def snapshot(self) -> Any:
        """A description of the present state that costs no copy of it."""
        ...

    def rollback(self, snapshot: Any) -> None:
        """Return to a snapshot, bit for bit."""
        ...


@dataclass(frozen=True)
class Costs:
    """Arithmetic of one token, in multiply-accumulate weights (one block = `block`)."""

    layers: int
    """Number of blocks L."""
    block: int
    """Matrix weights of one block; 218,103,808 for Mistral-7B."""
    fill: int
    """Weights used to fill one skipped block's state under `propagate`."""
    vocabulary: int
    """Weights of the output head V·d: one emission, or one check that looks at the vocabulary."""
    gate: int
    """Weights of one gate."""
    context: float
    """Multiply-accumulates per block and token of context (attention: 2·heads·head width)."""
    mixer: float
    """Multiply-accumulates per block and token of the recurrence (state-space models)."""

    @property
    def kappa(self) -> float:
        """Share of a block that `propagate` still computes (κ; 1/26 for Mistral-7B)."""
        return self.fill / self.block

    def block_at(self, context: float) -> float:
        """Multiply-accumulates of one block for one token with `context` tokens before it."""
        return self.block + self.context * context + self.mixer


class Adapter(ABC):
    """Drives the blocks of one causal language model. Subclasses know one family.

    Notation: L blocks 0..L-1, `h_j` the residual stream after block j, exit e sits after block e.
    """

    family = ""
    model: Any
    blocks: Sequence[nn.Module]
    embedding: nn.Module
    norm: nn.Module
    head: nn.Module

    @property
    def n_layers(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def vocab(self) -> int:
        """Number of output tokens V."""
        return int(self.model.config.vocab_size)

    @property
    def gate_width(self) -> int:
        """Width m of a gate's input: d, or 2·d where the family feeds two streams."""
        return self.width

    @property
    def device(self) -> torch.device:
        """Where the first block's weights are."""
        return next(self.blocks[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the residual stream."""
        return next(self.blocks[0].parameters()).dtype

    def embed(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """The residual stream before block 0."""
        return self.embedding(ids)

    def final_norm(
        self, hidden: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        """N(h): the model's last norm."""
        return rms_norm(self.norm, hidden)

    def lm_head(
        self, normed: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time vocab"]:
        """U x: the output head, without the norm."""
        return self.head(normed)

    def logits(
        self, hidden: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time vocab"]:
        """U N(h): the logit lens of a residual stream."""
        return self.head(rms_norm(self.norm, hidden))

    def streams(
        self,
        before: Float[Tensor, "batch time width"],
        after: Float[Tensor, "batch time width"],
    ) -> Float[Tensor, "batch time m"]:
        """The gate's input from the stream before and after the exit's block."""
        del before
        return after

    @abstractmethod
    def run(
        self,
        hidden: Float[Tensor, "batch time width"],
        low: int,
        high: int,
        state: Any = None,
        start: int = 0,
    ) -> Float[Tensor, "batch time width"]:
        """Blocks low..high-1 over tokens at positions start, start+1, …

        With a state the tokens continue it (and are appended); without one they are a whole text.
        """

    @abstractmethod
    def fill(
        self,
        hidden: Float[Tensor, "batch time width"],
        low: int,
        high: int,
        state: Any,
        start: int,
        policy: Policy = "propagate",
    ) -> None:
        """Give blocks low..high-1 a state for tokens that do not pass through them."""

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty state for `capacity` tokens."""

    @abstractmethod
    def costs(self) -> Costs:
        """Arithmetic of one block, one fill, one vocabulary check."""

    def policies(self) -> tuple[str, ...]:
        """State policies this family can follow."""
        return ("propagate", "defer", "copy_token", "skip")

    @torch.no_grad()
    def full(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """The full model's logits, computed block by block."""
        return self.logits(self.run(self.embed(ids), 0, self.n_layers))

    @torch.no_grad()
    def disagreement(self, ids: Int[Tensor, "batch time"]) -> float:
        """Largest difference between our logits and the model's own forward pass."""
        own = self.full(ids)
        theirs = self.model(input_ids=ids, use_cache=False).logits
        return float((own - theirs.to(own.dtype)).abs().max())


def adapt(model: Any, name: str = "auto", check: bool = True) -> Adapter:
    """The adapter of a causal language model, verified against the model itself.

    Raises:
        ConfigError: unknown name; a layout without the needed attributes (the first missing one is
            named); or logits that differ from the model's own forward pass.
    """
    if name == "auto":
        name = "mamba" if hasattr(model, "backbone") else "attention"
    if name not in ADAPTERS:
        raise unknown_name("adapter", name, ADAPTERS)
    module, _, attribute = ADAPTERS[name].partition(":")
    adapter: Adapter = getattr(importlib.import_module(module), attribute)(model)
    if check:
        _check(adapter)
    return adapter


def _check(adapter: Adapter) -> None:
    length = 9
    ids = (torch.arange(length, device=adapter.device) * 7 + 3).remainder(adapter.vocab)[None]
    was_training = adapter.model.training
    adapter.model.eval()
    error = adapter.disagreement(ids)
    adapter.model.train(was_training)
    loose = adapter.dtype in (torch.float16, torch.bfloat16)
    limit = 0.25 if loose else 2e-3
    if not math.isfinite(error):
        raise DataError(
            f"{type(adapter.model).__name__}: its logits are not finite; the weights hold NaN or "
            "infinite values or the number format is too narrow (try --dtype float32)"
        )
    if not error <= limit:
        raise ConfigError(
            f"{type(adapter.model).__name__} has the attributes of the {adapter.family} layout but "
            f"computes something else: logits differ by {error:.2g} (allowed {limit:g}). It needs "
            "its own adapter; register one in early_exit.adapters.base.ADAPTERS"
        )


def need(holder: Any, path: str, model: Any) -> Any:
    """The attribute at a dotted path.

    Raises:
        ConfigError: naming the first attribute that is missing.
    """
    current, seen = holder, type(model).__name__
    for part in path.split("."):
        if not hasattr(current, part):
            raise ConfigError(
                f"unsupported backbone {type(model).__name__}: {seen} has no attribute {part!r}. "
                "Expected the Llama/Mistral layout (model.embed_tokens, model.layers, model.norm, "
                "model.rotary_emb, lm_head) or the Mamba layout (backbone.embeddings, "
                "backbone.layers, backbone.norm_f, lm_head); write an adapter for another one"
            )
        seen = f"{seen}.{part}"
        current = getattr(current, part)
    return current


def rms_norm(module: nn.Module, hidden: Tensor) -> Tensor:
    """A root-mean-square norm in at least single precision; other norms are called as they are.

    g ⊙ h / sqrt(mean(h²) + ε). The model classes compute it in float32 whatever the weights' type,
    which would hide errors below 1e-7 in a double-precision check.
    """
    epsilon = getattr(module, "variance_epsilon", None)
    if epsilon is None:
        return module(hidden)
    if hidden.dtype not in (torch.float32, torch.float64):
        return module(hidden)
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    return module.weight * (hidden * scale)


def plain_linear(module: nn.Module) -> bool:
    """Whether a projection is an ordinary `nn.Linear`, whose weight may be sliced and stacked."""
    return type(module) is nn.Linear
