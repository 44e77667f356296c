"""What every layer offers: a causal map (batch, time, width) → same shape, and its own cost."""

from dataclasses import dataclass

from torch import nn

from workbench.errors import ConfigError


@dataclass(frozen=True)
class Accounting:
    """Cost of one layer at sequence length L."""

    params: int
    """Trainable parameters."""
    params_active: int
    """Parameters that one token uses."""
    state_floats: int
    """Floats carried per sequence when tokens are generated one by one."""
    flops_per_token: int
    """Floating-point operations of the forward pass per token, a multiply-add counted as two."""


class Layer(nn.Module):
    """Base of the built-in layers: says its cost, leaves the mathematics to `forward`.

    `forward(x)` maps (batch, time, width) to the same shape and never looks ahead in time.
    """

    def state_floats(self, length: int) -> int:
        """Floats carried per sequence of this length; 0 for a layer without memory."""
        del length
        return 0

    def mixing_flops_per_token(self, length: int) -> int:
        """Operations beyond the linear maps, per token; 0 for a pointwise layer."""
        del length
        return 0

    def accounting(self, length: int) -> Accounting:
        """Parameters, state and operations of this layer at one sequence length."""
        params = sum(p.numel() for p in self.parameters())
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        flops = 2 * linear + self.mixing_flops_per_token(length)
        return Accounting(params, params, self.state_floats(length), flops)


def head_width(width: int, num_heads: int, layer: str) -> int:
    """width / heads, or a ConfigError that says which values would do."""
    if num_heads < 1 or width % num_heads:
        fits = [n for n in range(1, min(width, 64) + 1) if width % n == 0]
        raise ConfigError(
            f"{layer}: width {width} is not divisible by num_heads={num_heads}; "
            f"choose one of {', '.join(map(str, fits))}"
        )
    return width // num_heads
