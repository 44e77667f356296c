"""Channel mixers: they act on each position alone."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.layer import Layer
from workbench.errors import ConfigError


def _check(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{layer}: {name}={size} must be at least 1")


class MLP(Layer):
    """W₂ gelu(W₁ x) with the tanh form of gelu; par 2·d·hidden, 131 072 at d = 128."""

    def __init__(self, width: int, *, hidden: int | None = None, bias: bool = False) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        _check("mlp", hidden=hidden)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The perceptron at every position."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(Layer):
    """W₃(SiLU(W₁ x) ⊙ W₂ x)   [arXiv 2002.05202, eq. 6]; par 3·d·hidden, 135 168 at d = 128."""

    def __init__(
        self, width: int, *, hidden: int | None = None, multiple_of: int = 16, bias: bool = False
    ) -> None:
        super().__init__()
        # 2/3 of 4·width keeps the parameter count of the perceptron; rounded up to `multiple_of`
        _check("swiglu", multiple_of=multiple_of)
        if hidden is None:
            hidden = multiple_of * -(-(8 * width // 3) // multiple_of)
        _check("swiglu", hidden=hidden)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The gated perceptron at every position."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
