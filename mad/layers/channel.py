"""Channel mixers: they act on each position alone."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.layer import Layer


class MLP(Layer):
    """W₂ gelu(W₁ x) with the tanh form of gelu; par 2·d·hidden, 131 072 at d = 128."""

    def __init__(self, width: int, *, hidden: int | None = None, bias: bool = False) -> None:
        super().__init__()
        hidden = hidden or 4 * width
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
        hidden = hidden or multiple_of * -(-(8 * width // 3) // multiple_of)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The gated perceptron at every position."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
