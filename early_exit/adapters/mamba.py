"""State-space decoders: Mamba-1 and Mamba-2, with a multi-token step that continues a state.

The state of a block is (last conv inputs, S). Updates make new tensors and never write into old
ones, so a snapshot is a list of references and a rollback is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from early_exit.adapters.base import Adapter, Costs, Policy, need, plain_linear, rms_norm
from workbench.errors import ConfigError

CHUNK = 32


@dataclass
class MambaState:
    """Per block: the last conv inputs (batch, channels, kernel-1) and the recurrent state."""

    lengths: list[int]
    conv: list[Tensor]
    recurrent: list[Tensor]
    masks: dict[int, Tensor] = field(default_factory=dict)

    def snapshot(self) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """References to the present tensors."""
        return list(self.lengths), list(self.conv), list(self.recurrent)

    def rollback(self, snapshot: tuple[list[int], list[Tensor], list[Tensor]]) -> None:
        """Return to a snapshot, bit for bit."""
        self.lengths, self.conv, self.recurrent = (list(part) for part in snapshot)

    def entries(self, block: int) -> dict[str, Tensor]:
        """Conv and recurrent state of one block (for comparisons)."""
        return {"conv": self.conv[block], "recurrent": self.recurrent[block]}


class MambaAdapter(Adapter):
    """Decoders with `backbone.{embeddings,layers,norm_f}` and `lm_head`, Mamba-1 or Mamba-2.

    The gate sees the mixer's output and the residual before it, as the fused kernels of the
    published gates do: x = concat(h_e - h_{e-1}, h_{e-1}).
    """

    family = "mamba"

    def __init__(self, model: Any):
        self.model = model
        self.embedding = need(model, "backbone.embeddings", model)
        self.blocks = need(model, "backbone.layers", model)
        self.norm = need(model, "backbone.norm_f", model)
        self.head = need(model, "lm_head", model)
        first: Any = self.blocks[0]
        for path in ("norm", "mixer.in_proj", "mixer.conv1d", "mixer.A_log", "mixer.D"):
            need(first, path, first)
        self.second = first.mixer.A_log.dim() == 1
        for path in ("norm", "dt_bias") if self.second else ("x_proj", "dt_proj"):
            need(first.mixer, path, first.mixer)
        mixer = first.mixer
        self.kernel = int(mixer.conv_kernel_size)
        self.inner = int(mixer.intermediate_size)
        self.state_size = int(mixer.ssm_state_size)
        self.channels = int(mixer.conv1d.weight.shape[0])

    @property
    def gate_width(self) -> int:
        """Two streams of width d."""
        return 2 * self.width

    def streams(
        self,
        before: Float[Tensor, "batch time width"],
        after: Float[Tensor, "batch time width"],
    ) -> Float[Tensor, "batch time m"]:
        """concat(mixer output, residual before the block)."""
        return torch.cat((after - before, before), dim=-1)

    def new_cache(self, batch: int, capacity: int) -> MambaState:
        """Zero state; the capacity does not matter, a state has no length."""
        del capacity
        mixer: Any = self.blocks[0].mixer
        like = {"dtype": self._accumulate(), "device": self.device}
        if self.second:
            shape = (batch, int(mixer.num_heads), int(mixer.head_dim), self.state_size)
        else:
            shape = (batch, self.inner, self.state_size)
        conv = torch.zeros(
            batch, self.channels, self.kernel - 1, dtype=self.dtype, device=self.device
        )
        count = self.n_layers
        return MambaState([0] * count, [conv] * count, [torch.zeros(shape, **like)] * count)

    def _accumulate(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    # ------------------------------------------------------------ blocks

    def run(
        self,
        hidden: Float[Tensor, "batch time width"],
        low: int,
        high: int,
        state: MambaState | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch time width"]:
        """See `Adapter.run`; positions do not matter here."""
        del start
        state = state if state is not None else self.new_cache(hidden.shape[0], 0)
        mix = self._mamba2 if self.second else self._mamba1
        for index in range(low, high):
            block: Any = self.blocks[index]
            x = rms_norm(block.norm, hidden)
            hidden = hidden + mix(index, x, state)
            state.lengths[index] += hidden.shape[1]
        return hidden

    def fill(
        self,
        hidden: Float[Tensor, "batch time width"],
        low: int,
        high: int,
        state: MambaState,
        start: int,
        policy: Policy = "propagate",
    ) -> None:
        """State of blocks low..high-1 for tokens that skip them.

        `propagate`: conv and recurrent update with norm_j(h_e), no output computed  [DYNAMAX §3]
        `skip`, `copy_token`: the state stays as it was
        """
        del start
        if policy == "copy_layer":
            raise ConfigError(
                "state policy copy_layer copies keys and values, a state-space model has none; "
                f"use one of {', '.join(self.policies())}"
            )
        if policy in ("skip", "copy_token"):
            return
        mix = self._mamba2 if self.second else self._mamba1
        for index in range(low, high):
            block: Any = self.blocks[index]
            mix(index, rms_norm(block.norm, hidden), state, output=False)
            state.lengths[index] += hidden.shape[1]

    def _conv(self, mixer: Any, index: int, x: Tensor, state: MambaState) -> Tensor:
        """silu(causal depthwise conv) over (batch, channels, time), continuing the state."""
        joined = torch.cat((state.conv[index], x), dim=-1)
        state.conv[index] = joined[..., joined.shape[-1] - (self.kernel - 1) :]
        if x.shape[-1] == 1:
            out = (joined * mixer.conv1d.weight[:, 0]).sum(-1, keepdim=True)
            if mixer.conv1d.bias is not None:
                out = out + mixer.conv1d.bias[:, None]
        else:
            out = F.conv1d(joined, mixer.conv1d.weight, mixer.conv1d.bias, groups=self.channels)
        return mixer.act(out)

    def _mamba2(self, index: int, x: Tensor, state: MambaState, output: bool = True) -> Tensor:
        mixer: Any = self.blocks[index].mixer  # type: ignore[union-attr]
        batch, time, _ = x.shape
        heads, width, size = int(mixer.num_heads), int(mixer.head_dim), self.state_size
        groups = int(mixer.n_groups)
        gate = x.new_empty(0)
        if not output and plain_linear(mixer.in_proj):
            bias = mixer.in_proj.bias
            rows = slice(self.inner, None)  # z is not needed for the state
            wide = F.linear(x, mixer.in_proj.weight[rows], None if bias is None else bias[rows])
        else:
            both = mixer.in_proj(x)
            gate, wide = both[..., : self.inner], both[..., self.inner :]
        mixed, dt = wide.split([self.channels, heads], dim=-1)
        mixed = self._conv(mixer, index, mixed.transpose(1, 2), state).transpose(1, 2)
        kind = self._accumulate()
        u, b, c = mixed.to(kind).split([self.inner, groups * size, groups * size], dim=-1)
        step = F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit).to(kind)
        decay = -torch.exp(mixer.A_log.to(kind)) * step  # log of the decay, ≤ 0
        u = u.reshape(batch, time, heads, width)
        b = b.reshape(batch, time, groups, size).repeat_interleave(heads // groups, dim=2)
        c = c.reshape(batch, time, groups, size).repeat_interleave(heads // groups, dim=2)
        y, state.recurrent[index] = chunked_scan(
            u * step[..., None], decay, b, c, state.recurrent[index], output
        )
        if not output:
            return y
        y = (y + u * mixer.D[:, None]).reshape(batch, time, self.inner)
        y = y * F.silu(gate.to(kind))
        grouped = y.view(batch, time, -1, int(mixer.norm.group_size))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
        y = mixer.norm.weight * (grouped * scale).view(batch, time, self.inner).to(x.dtype)
        return mixer.out_proj(y)

    def _mamba1(self, index: int, x: Tensor, state: MambaState, output: bool = True) -> Tensor:
        mixer: Any = self.blocks[index].mixer  # type: ignore[union-attr]
        gate = x.new_empty(0)
        if not output and plain_linear(mixer.in_proj):
            bias = mixer.in_proj.bias
            rows = slice(0, self.inner)
            u = F.linear(x, mixer.in_proj.weight[rows], None if bias is None else bias[rows])
        else:
            u, gate = mixer.in_proj(x).split([self.inner, self.inner], dim=-1)
        u = self._conv(mixer, index, u.transpose(1, 2), state).transpose(1, 2)
        rank = int(mixer.time_step_rank)
        parts = mixer.x_proj(u).split([rank, self.state_size, self.state_size], dim=-1)
        kind = self._accumulate()
        step = F.softplus(mixer.dt_proj(parts[0])).to(kind)
        b, c, u = parts[1].to(kind), parts[2].to(kind), u.to(kind)
        decay = torch.exp(step[..., None] * -torch.exp(mixer.A_log.to(kind)))
        push = (step * u)[..., None] * b[:, :, None, :]
        current = state.recurrent[index]
        history = []
        for a, p in zip(decay.unbind(1), push.unbind(1), strict=True):
            current = torch.addcmul(p, a, current)
            history.append(current)
        state.recurrent[index] = current
        if not output:
            return u
        y = torch.einsum("btdn,btn->btd", torch.stack(history, dim=1), c) + u * mixer.D
        return mixer.out_proj((y * F.silu(gate.to(kind))).to(x.dtype))

    def costs(self) -> Costs:
        """Exact counts; κ is the share of the sliced state update."""
        mixer: Any = self.blocks[0].mixer  # type: ignore[union-attr]
        conv = self.channels * self.kernel
        if self.second:
            heads = int(mixer.num_heads)
            projected = self.inner + self.channels + heads
            block = self.width * projected + self.inner * self.width + conv
            fill = self.width * (self.channels + heads) + conv
            recurrence = 3.0 * heads * int(mixer.head_dim) * self.state_size
        else:
            rank = int(mixer.time_step_rank)
            selective = self.inner * (rank + 2 * self.state_size) + rank * self.inner
            block = 3 * self.width * self.inner + conv + selective
            fill = self.width * self.inner + conv + selective - self.inner * self.state_size
            recurrence = 3.0 * self.inner * self.state_size
        return Costs(
            layers=self.n_layers,
            block=block,
            fill=fill,
            vocabulary=self.vocab * self.width,
            gate=2 * self.gate_width,
            context=0.0,
            mixer=recurrence,
        )


def chunked_scan(
    u: Float[Tensor, "batch time heads head_width"],
    log_decay: Float[Tensor, "batch time heads"],
    b: Float[Tensor, "batch time heads state"],
    c: Float[Tensor, "batch time heads state"],
    initial: Float[Tensor, "batch heads head_width state"],
    output: bool = True,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of S_t = exp(a_t) S_{t-1} + u_t b_tᵀ, y_t = S_t c_t.

    Chunks of 32 tokens: inside a chunk y = (C Bᵀ ∘ exp(A_t - A_s)) u with A the running sum of a,
    plus exp(A_t) C S from before it. Only sums of non-positive numbers are exponentiated.
    """
    if u.shape[1] == 1:
        a = torch.exp(log_decay[:, 0])[..., None, None]
        state = a * initial + u[:, 0, :, :, None] * b[:, 0, :, None, :]
        y = (state @ c[:, 0, :, :, None])[..., 0][:, None] if output else u
        return y, state
    state, outputs = initial, []
    for low in range(0, u.shape[1], CHUNK):
        part = slice(low, low + CHUNK)
        total = log_decay[:, part].cumsum(1).transpose(1, 2)  # batch, heads, time
        uu, bb, cc = (x[:, part].transpose(1, 2) for x in (u, b, c))
        if output:
            count = total.shape[-1]
            causal = torch.ones(count, count, dtype=torch.bool, device=u.device).tril()
            gap = total[..., :, None] - total[..., None, :]
            weights = (cc @ bb.transpose(-1, -2)) * gap.masked_fill(~causal, -torch.inf).exp()
            before = (cc @ state.transpose(-1, -2)) * total.exp()[..., None]
            outputs.append((weights @ uu + before).transpose(1, 2))
        rest = (total[..., -1:] - total).exp()[..., None]
        state = total[..., -1].exp()[..., None, None] * state + uu.transpose(-1, -2) @ (bb * rest)
    return (torch.cat(outputs, dim=1) if output else u), state
