"""What every layer offers: a causal map (batch, time, width) → same shape, and its own cost.

A layer has two forms that agree to rounding: `forward`, parallel over time, for training, and
`step`, one token against a carried state, for generation. `recurrent` unrolls the second and is the
reference for the first.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ConfigError

State = dict[str, Tensor]
"""What a layer carries from one token to the next; every tensor has the batch in front."""


@dataclass(frozen=True)
class Accounting:
    """Cost of one layer at sequence length L."""

    params: int
    """Trainable parameters."""
    params_active: int
    """Parameters that one token uses."""
    state_floats: int
    """Floats carried per sequence when tokens are generated one by one, after L tokens."""
    flops_per_token: int
    """Floating-point operations of the forward pass per token, a multiply-add counted as two."""
    matrix_state_floats: int = 0
    """The part of the state that the iso-state rule counts: without short convolutions, shifted
    tokens and normalisers."""
    kv_bytes: int = 0
    """Bytes of a cache that grows with the sequence, at two bytes per number; else 0."""


class Layer(nn.Module):
    """Base of the built-in layers: says its cost, leaves the mathematics to `forward` and `step`.

    `forward(x)` maps (batch, time, width) to the same shape and never looks ahead in time. A
    pointwise layer needs nothing more; one with a memory overrides `initial_state` and `step`.
    """

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token; empty for a layer without memory."""
        del batch, device, dtype
        return {}

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token: its output and the state after it. The given state is left as it was."""
        return self(x[:, None])[:, 0], state

    def recurrent(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """`forward`, computed token by token: the reference that the parallel form must equal."""
        state = self.initial_state(len(x), device=x.device, dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            y, state = self.step(x[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, dim=1)

    def state_floats(self, length: int) -> int:
        """Floats carried per sequence after this many tokens; 0 for a layer without memory."""
        del length
        return 0

    def matrix_state_floats(self, length: int) -> int:
        """The part of `state_floats` that the iso-state rule counts; all of it unless stated."""
        return self.state_floats(length)

    def kv_bytes(self, length: int) -> int:
        """Bytes of a cache that grows with the sequence, at two bytes per number; else 0."""
        del length
        return 0

    def active_parameters(self) -> int:
        """Parameters that one token uses; all of them unless stated."""
        return sum(p.numel() for p in self.parameters())

    def linear_flops_per_token(self) -> int:
        """Operations of the linear maps per token: twice the weights of every `nn.Linear`."""
        return 2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def mixing_flops_per_token(self, length: int) -> int:
        """Operations beyond the linear maps, per token; 0 for a pointwise layer."""
        del length
        return 0

    def accounting(self, length: int) -> Accounting:
        """Parameters, state and operations of this layer at one sequence length."""
        return Accounting(
            params=sum(p.numel() for p in self.parameters()),
            params_active=self.active_parameters(),
            state_floats=self.state_floats(length),
            flops_per_token=self.linear_flops_per_token() + self.mixing_flops_per_token(length),
            matrix_state_floats=self.matrix_state_floats(length),
            kv_bytes=self.kv_bytes(length),
        )


def head_width(width: int, num_heads: int, layer: str) -> int:
    """width / heads, or a ConfigError that says which values would do."""
    if num_heads < 1 or width % num_heads:
        fits = [n for n in range(1, min(width, 64) + 1) if width % n == 0]
        raise ConfigError(
            f"{layer}: width {width} is not divisible by num_heads={num_heads}; "
            f"choose one of {', '.join(map(str, fits))}"
        )
    return width // num_heads
