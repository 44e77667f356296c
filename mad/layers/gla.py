"""Gated linear attention: a matrix state whose every key channel forgets at its own rate.

g_t = log sigmoid(W₂ W₁ x_t + b) / 16                             per key channel, never above 0
S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ;   o_t = S_tᵀ q_t / √e;   y = W_o (RMSNorm(o) ⊙ SiLU(W_g x))
                                                                    [arXiv 2312.06635, eq. 3, §4.4]
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import (
    ChannelForm,
    at_least_float32,
    channel_decay_chunked,
    channel_decay_step,
    split_heads,
)
from mad.layers.kernels import compiled, known_kernel
from mad.layers.layer import Layer, State, head_width
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel


class GatedLinearAttention(Layer):
    """GLA; par 86 160 and state H·e² = 2 048 with eight heads at width 128."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 1,
        gate_rank: int = 16,
        gate_divisor: float = 16.0,
        clamp_min: float | None = None,
        norm_eps: float = 1e-5,
        form: Literal["factored", "halved"] = "factored",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.head = head_width(width, num_heads, "gated-linear-attention")
        if gate_rank < 1 or gate_divisor <= 0 or (clamp_min is not None and clamp_min > 0):
            raise ConfigError(
                f"gated-linear-attention: gate_rank={gate_rank} must be at least 1, "
                f"gate_divisor={gate_divisor} positive and clamp_min={clamp_min} none or at most 0"
            )
        self.num_heads, self.gate_divisor, self.clamp_min = num_heads, gate_divisor, clamp_min
        self.form: ChannelForm = form
        self.kernel = known_kernel("gated-linear-attention", kernel)
        self.kernels = {"gla": kernel}
        self.q, self.k, self.v, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.decay_in = nn.Linear(width, gate_rank, bias=False)
        self.decay_out = nn.Linear(gate_rank, width)
        self.norm = nn.RMSNorm(self.head, eps=norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
        nn.init.zeros_(self.decay_out.bias)

    def _parts(self, x: Float[Tensor, "batch time width"]) -> tuple[Tensor, ...]:
        """q, k, v and g, each (B, H, L, e), in single precision or finer."""
        decay = self.decay_out(self.decay_in(x))
        parts = (self.q(x), self.k(x), self.v(x), decay)
        q, k, v, decay = at_least_float32(*(split_heads(p, self.num_heads) for p in parts))
        g = F.logsigmoid(decay) / self.gate_divisor
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        return q * self.head**-0.5, k, v, g

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """(…, H, e) normalised per head, gated and projected."""
        o = F.rms_norm(o, (self.head,), self.norm.weight.to(o.dtype), self.norm.eps)
        return self.out((o.flatten(-2) * F.silu(self.gate(x))).to(x.dtype))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Chunks of time as matrix products."""
        parts = self._parts(x)
        fused = compiled("gla", self.kernel, parts[0], x)
        o = fused(*parts) if fused else channel_decay_chunked(*parts, form=self.form)[0]
        return self._finish(o.transpose(1, 2), x)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty matrix per head."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (batch, self.num_heads, self.head, self.head)
        return {"matrix": torch.zeros(shape, device=device, dtype=dtype)}

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """The equation for one token."""
        q, k, v, g = (part[:, :, 0] for part in self._parts(x[:, None]))
        o, matrix = channel_decay_step(q, k, v, g, state["matrix"])
        return self._finish(o, x), {"matrix": matrix}

    def state_floats(self, length: int) -> int:
        """e² per head."""
        del length
        return self.num_heads * self.head**2

    def mixing_flops_per_token(self, length: int) -> int:
        """Decay, update and read-out of the recurrent form."""
        return 5 * self.state_floats(length)
