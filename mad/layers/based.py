"""Based: a coarse view of everything, and an exact one of what is near.  [arXiv 2402.18668]

    y = taylor(x) + window(x)

`taylor` is linear attention whose kernel 1 + s + s²/2 is the second-order expansion of exp(s), on
queries and keys that are projected to few dimensions, so that its state stays small; `window` is
softmax attention to the last positions. The published models alternate the two as layers of their
own; here they stand side by side in one layer.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mad.layers.attention import Attention, Backend
from mad.layers.layer import Layer, State
from mad.layers.linear_attention import LinearAttention
from workbench.integrations.kernels import Kernel


class Based(Layer):
    """Taylor linear attention beside a sliding window, each with its own projections.

    par 6d² + 4d + 2·d·H·a with a = `feature_width`; state H·f·(e + 1) + 2·d·min(L, w + 1) with
    f = 1 + a + a(a + 1)/2, 153 at a = 16.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        feature_width: int = 16,
        window: int = 64,
        backend: Backend = "auto",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.taylor = LinearAttention(
            width,
            num_heads=num_heads,
            feature_map="taylor",
            normalize="sum",
            key_width=feature_width,
            kernel=kernel,
        )
        self.window = Attention(width, num_heads=num_heads, window=window, backend=backend)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The sum of both."""
        return self.taylor(x) + self.window(x)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The states of both."""
        like = {"device": device, "dtype": dtype}
        both = {"taylor": self.taylor, "window": self.window}
        return {
            f"{name}.{key}": part
            for name, layer in both.items()
            for key, part in layer.initial_state(batch, **like).items()
        }

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token through both."""
        outputs, after = [], {}
        for name, layer in (("taylor", self.taylor), ("window", self.window)):
            own = {key: state[f"{name}.{key}"] for key in layer.initial_state(1)}
            y, own = layer.step(x, own)
            outputs.append(y)
            after |= {f"{name}.{key}": own[key] for key in own}
        return outputs[0] + outputs[1], after

    def state_floats(self, length: int) -> int:
        """What both carry."""
        return self.taylor.state_floats(length) + self.window.state_floats(length)

    def matrix_state_floats(self, length: int) -> int:
        """The Taylor state and the cache of the window."""
        return self.taylor.matrix_state_floats(length) + self.window.matrix_state_floats(length)

    def kv_bytes(self, length: int) -> int:
        """The cache of the window."""
        return self.window.kv_bytes(length)

    def mixing_flops_per_token(self, length: int) -> int:
        """Those of both."""
        both = (self.taylor, self.window)
        return sum(part.mixing_flops_per_token(length) for part in both)
