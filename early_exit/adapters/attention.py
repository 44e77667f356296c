"""Attention decoders of the Llama/Mistral structure: rotary positions, grouped heads, SwiGLU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from early_exit.adapters.base import Adapter, Costs, Policy, need, plain_linear, rms_norm
from workbench.errors import ConfigError


class AttentionState:
    """Keys (rotated) and values of all blocks in two preallocated arrays; append only.

    `positions[j]` holds the text position of every entry, because the `skip` policy leaves gaps.
    """

    def __init__(self, keys: Tensor, cos: Tensor, sin: Tensor):
        self.keys = keys
        self.values = torch.zeros_like(keys)
        self.cos, self.sin = cos, sin
        self.capacity = keys.shape[3]
        self.lengths = [0] * keys.shape[0]
        self.positions = torch.zeros(keys.shape[0], self.capacity, dtype=torch.long)
        self.masks: dict[tuple[int, int], Tensor] = {}

    def snapshot(self) -> list[int]:
        """The lengths: entries below them are never written again."""
        return list(self.lengths)

    def rollback(self, snapshot: list[int]) -> None:
        """Forget the entries appended since the snapshot."""
        self.lengths = list(snapshot)

    def append(self, block: int, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Add entries for new tokens and return all entries of the block."""
        low = self.lengths[block]
        high = low + keys.shape[2]
        if high > self.capacity:
            raise ConfigError(f"the state holds {self.capacity} tokens, asked for {high}")
        self.keys[block, :, :, low:high] = keys
        self.values[block, :, :, low:high] = values
        if high - low == 1:
            self.positions[block, low] = start
        else:
            self.positions[block, low:high] = torch.arange(start, start + high - low)
        self.lengths[block] = high
        return self.keys[block, :, :, :high], self.values[block, :, :, :high]

    def entries(self, block: int) -> dict[str, Tensor]:
        """Keys and values of one block (for comparisons)."""
        length = self.lengths[block]
        return {"k": self.keys[block, :, :, :length], "v": self.values[block, :, :, :length]}


class AttentionAdapter(Adapter):
    """Any decoder with `model.{embed_tokens,layers,norm,rotary_emb}` and `lm_head`.

    Covers split and fused q/k/v projections, biases, per-head q/k norms, partial rotary dimensions
    and sliding windows.
    """

    family = "attention"

    def __init__(self, model: Any):
        self.model = model
        self.embedding = need(model, "model.embed_tokens", model)
        self.blocks = need(model, "model.layers", model)
        self.norm = need(model, "model.norm", model)
        self.rotary = need(model, "model.rotary_emb", model)
        self.head = need(model, "lm_head", model)
        first: Any = self.blocks[0]
        for path in (
            "input_layernorm",
            "post_attention_layernorm",
            "mlp",
            "self_attn.o_proj",
            "self_attn.scaling",
        ):
            need(first, path, first)
        self.fused = hasattr(first.self_attn, "qkv_proj")
        if not self.fused:
            for name in ("q_proj", "k_proj", "v_proj"):
                need(first.self_attn, name, first)
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_width = int(getattr(first.self_attn, "head_dim", self.width // self.heads))
        self.window: int | None = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            self.window = None
        self._stacked: dict[tuple[int, int], Tensor] = {}

    # ------------------------------------------------------------ state

    def new_cache(self, batch: int, capacity: int) -> AttentionState:
        """Room for `capacity` tokens in every block; rotation tables are made once."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and capacity > limit:
            raise ConfigError(
                f"prompt and new tokens need {capacity} positions, the model has {limit}; "
                "shorten the prompt or ask for fewer tokens"
            )
        cos, sin = self._rotation(0, capacity)
        shape = (self.n_layers, batch, self.kv_heads, capacity, self.head_width)
        return AttentionState(torch.zeros(shape, dtype=self.dtype, device=self.device), cos, sin)

    def _rotation(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + count, device=self.device)[None]
        probe = torch.zeros(1, dtype=self.dtype, device=self.device)
        cos, sin = self.rotary(probe, positions)
        return cos[0], sin[0]

    # ------------------------------------------------------------ blocks

    def run(
        self,
        hidden: Float[Tensor, "batch time width"],
        low: int,
        high: int,
        state: AttentionState | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch time width"]:
        """See `Adapter.run`."""
        count = hidden.shape[1]
        if state is None:
            cos, sin = self._rotation(start, count)
        else:
            cos, sin = state.cos[start : start + count], state.sin[start : start + count]
        for index in range(low, high):
            hidden = self._block(index, hidden, cos, sin, state, start)
        return hidden

    def _block(
        self,
        index: int,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: AttentionState | None,
        start: int,
    ) -> Tensor:
        block: Any = self.blocks[index]
        attention = block.self_attn
        queries, keys, values = self._project(attention, rms_norm(block.input_layernorm, hidden))
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        mask = None
        if state is not None:
            keys, values = state.append(index, keys, values, start)
            mask = self._mask(state, index, hidden.shape[1], start)
        elif self.window is not None and hidden.shape[1] > self.window:
            mask = causal_mask(hidden.shape[1], self.window, hidden.device)
        mixed = attend(queries, keys, values, mask, attention.scaling, state is None)
        hidden = hidden + attention.o_proj(mixed)
        return hidden + block.mlp(rms_norm(block.post_attention_layernorm, hidden))

    def _mask(self, state: AttentionState, index: int, count: int, start: int) -> Tensor | None:
        """Which entries each new token may see; None when all of them."""
        length = state.lengths[index]
        if self.window is not None:
            entries = state.positions[index, :length]
            now = torch.arange(start, start + count)[:, None]
            return ((entries <= now) & (entries > now - self.window)).to(self.device)
        if count == 1:
            return None
        key = (count, length)
        if key not in state.masks:
            if len(state.masks) > 64:
                state.masks.clear()
            ones = torch.ones(count, length, dtype=torch.bool, device=self.device)
            state.masks[key] = ones.tril(length - count)
        return state.masks[key]

    def _project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused:
            wide, narrow = self.heads * self.head_width, self.kv_heads * self.head_width
            q, k, v = attention.qkv_proj(x).split([wide, narrow, narrow], dim=-1)
        else:
            q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        q, k, v = (self._split(y) for y in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_width)

    # ------------------------------------------------------------ skipped blocks

    def fill(
        self,
        hidden: Float[Tensor, "batch time width"],
        low: int,
        high: int,
        state: AttentionState,
        start: int,
        policy: Policy = "propagate",
        kernel: str = "auto",
    ) -> None:
        """State of blocks low..high-1 for tokens that skip them.

        `propagate`: k_j = R(t) W^K_j norm_j(h_e), v_j = W^V_j norm_j(h_e)      [CALM §3; DYNAMAX]
        `copy_token`: the entries of the token before, keys turned on by one position
        `copy_layer`: the entries of the block before `low`
        `skip`: no entry, later tokens do not see this one in these blocks
        """
        if policy == "skip" or low >= high:
            return
        if policy == "copy_token":
            self._copy_token(low, high, state, start)
        elif policy == "copy_layer":
            source = state.entries(low - 1)
            count = hidden.shape[1]
            for index in range(low, high):
                state.append(index, source["k"][:, :, -count:], source["v"][:, :, -count:], start)
        elif kernel != "reference" and self._can_stack() and len(set(state.lengths[low:high])) == 1:
            self._fill_fused(hidden, low, high, state, start)
        else:
            self._fill_reference(hidden, low, high, state, start)

    def _fill_reference(
        self, hidden: Tensor, low: int, high: int, state: AttentionState, start: int
    ) -> None:
        count = hidden.shape[1]
        cos, sin = state.cos[start : start + count], state.sin[start : start + count]
        for index in range(low, high):
            block: Any = self.blocks[index]
            _, k, v = self._project(block.self_attn, rms_norm(block.input_layernorm, hidden))
            state.append(index, rotate(k, cos, sin), v, start)

    def _fill_fused(
        self, hidden: Tensor, low: int, high: int, state: AttentionState, start: int
    ) -> None:
        """All blocks in one product: h/rms(h) is common, the norms' gains are folded into W."""
        batch, count, _ = hidden.shape
        epsilon = cast(Any, self.blocks[0]).input_layernorm.variance_epsilon
        unit = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
        both = F.linear(unit, self._stack(low, high))
        shape = (batch, count, high - low, 2, self.kv_heads, self.head_width)
        both = both.view(shape).permute(2, 3, 0, 4, 1, 5)  # block, k|v, batch, head, time, width
        cos, sin = state.cos[start : start + count], state.sin[start : start + count]
        first = state.lengths[low]
        last = first + count
        if last > state.capacity:
            raise ConfigError(f"the state holds {state.capacity} tokens, asked for {last}")
        state.keys[low:high, :, :, first:last] = rotate(both[:, 0], cos, sin)
        state.values[low:high, :, :, first:last] = both[:, 1]
        state.positions[low:high, first:last] = torch.arange(start, start + count)
        for index in range(low, high):
            state.lengths[index] = last

    def _can_stack(self) -> bool:
        first: Any = self.blocks[0]
        return (
            not self.fused
            and self.dtype in (torch.float32, torch.float64)
            and plain_linear(first.self_attn.k_proj)
            and first.self_attn.k_proj.bias is None
            and plain_linear(first.self_attn.v_proj)
            and not hasattr(first.self_attn, "k_norm")
            and hasattr(first.input_layernorm, "variance_epsilon")
        )

    def _stack(self, low: int, high: int) -> Tensor:
        if (low, high) not in self._stacked:
            rows = []
            for index in range(low, high):
                block: Any = self.blocks[index]
                gain = block.input_layernorm.weight
                for name in ("k_proj", "v_proj"):
                    rows.append(getattr(block.self_attn, name).weight.detach() * gain.detach())
            self._stacked[low, high] = torch.cat(rows)
        return self._stacked[low, high]

    def _copy_token(self, low: int, high: int, state: AttentionState, start: int) -> None:
        cos, sin = state.cos[1:2], state.sin[1:2]
        scale = state.cos[0, 0]  # 1, or the attention factor of a stretched rotation
        for index in range(low, high):
            if state.lengths[index] == 0:
                raise ConfigError("copy_token needs a token before; decode with a longer prompt")
            last = state.entries(index)
            state.append(
                index, rotate(last["k"][:, :, -1:], cos, sin) / scale, last["v"][:, :, -1:], start
            )

    def policies(self) -> tuple[str, ...]:
        """All of them."""
        return ("propagate", "defer", "copy_token", "copy_layer", "skip")

    def costs(self) -> Costs:
        """Exact counts from the weights; κ is the K,V share of a block."""
        block: Any = self.blocks[0]
        matrices = [m for m in block.modules() if hasattr(m, "in_features")]
        total = sum(int(m.in_features) * int(m.out_features) for m in matrices)
        return Costs(
            layers=self.n_layers,
            block=total,
            fill=2 * self.width * self.kv_heads * self.head_width,
            vocabulary=self.vocab * self.width,
            gate=2 * self.gate_width,
            context=2.0 * self.heads * self.head_width,
            mixer=0.0,
        )


def rotate(
    x: Float[Tensor, "*batch time head_width"],
    cos: Float[Tensor, "time rotary"],
    sin: Float[Tensor, "time rotary"],
) -> Float[Tensor, "*batch time head_width"]:
    """Rotary position: the first `rotary` channels are turned in pairs (i, i + rotary/2)."""
    rotary = cos.shape[-1]
    turned, rest = (x, None) if rotary == x.shape[-1] else (x[..., :rotary], x[..., rotary:])
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def attend(
    queries: Float[Tensor, "batch heads time head_width"],
    keys: Float[Tensor, "batch kv_heads entries head_width"],
    values: Float[Tensor, "batch kv_heads entries head_width"],
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "batch time merged"]:
    """Grouped-query attention; one new token needs no mask and no copied keys."""
    batch, heads, time, width = queries.shape
    groups = heads // keys.shape[1]
    if time == 1 and mask is None:
        folded = queries.reshape(batch, keys.shape[1], groups, width)
        mixed = F.scaled_dot_product_attention(folded, keys, values, scale=scale)
        return mixed.reshape(batch, 1, heads * width)
    mixed = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=groups > 1,
    )
    return mixed.transpose(1, 2).reshape(batch, time, heads * width)


def causal_mask(count: int, window: int, device: torch.device) -> Tensor:
    """True where token t may see token s: t - window < s <= t."""
    ones = torch.ones(count, count, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def count_weights(module: nn.Module) -> int:
    """Number of weights of a module."""
    return sum(p.numel() for p in module.parameters())
