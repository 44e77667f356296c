"""Mamba: a diagonal state per channel whose step size, input and output maps follow the input.

    [u, z] = W_in x;   u = SiLU(conv₄(u));   (δ, B_t, C_t) = W_x u;   Δ_t = softplus(W_Δ δ + b_Δ)
    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t;   y_t = C_t·h_t + D u_t;   out = W_o (y ⊙ SiLU(z))
                                                                        [arXiv 2312.00752, Alg. 2]
Glossary: D inner channels (also the skip), N state per channel.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import ShortConvolution, at_least_float32, no_autocast
from mad.layers.kernels import compiled, filter_kernel, known_kernel
from mad.layers.layer import Layer, State
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel
from workbench.mamba import selective_scan


def step_size_bias(
    count: int, smallest: float, largest: float, floor: float = 1e-4
) -> Float[Tensor, " count"]:
    """Biases b with softplus(b) log-uniform in [smallest, largest], at least `floor`."""
    if not 0 < smallest <= largest:
        raise ConfigError(
            f"mamba: step sizes from dt_min={smallest} to dt_max={largest}; expected "
            "0 < dt_min ≤ dt_max, e.g. 0.001 and 0.1"
        )
    low, high = math.log(smallest), math.log(largest)
    delta = torch.exp(torch.rand(count) * (high - low) + low).clamp_min(floor)
    return delta + torch.log(-torch.expm1(-delta))


def without_decay(value: Tensor) -> nn.Parameter:
    """A parameter that weight decay leaves alone (protocol `lab`)."""
    parameter = nn.Parameter(value)
    parameter.no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


class Mamba(Layer):
    """Selective state space; par 107 264 and state D·N + 3D = 1 024 + 768 at width 128.

    The 3D are inputs that the short convolution still needs; the iso-state rule leaves them out.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int = 4,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise ConfigError(f"mamba: {name}={value}; it must be at least 1")
        self.inner, self.d_state = expand * width, d_state
        self.kernel = known_kernel("mamba", kernel)
        self.kernels = {"selective_scan": kernel, "causal_conv1d": filter_kernel(kernel)}
        self.dt_rank = dt_rank or math.ceil(width / 16)
        inner, rank = self.inner, self.dt_rank
        self.input = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = ShortConvolution(inner, d_conv)
        self.maps = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt = nn.Linear(rank, inner)
        self.out = nn.Linear(inner, width, bias=False)
        nn.init.uniform_(self.dt.weight, -(rank**-0.5) * dt_scale, rank**-0.5 * dt_scale)
        self.dt.bias = without_decay(step_size_bias(inner, dt_min, dt_max, dt_init_floor))
        self.dt.bias.no_reinit = True  # pyright: ignore[reportAttributeAccessIssue]
        self.A_log = without_decay(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = without_decay(torch.ones(inner))

    def _rates(self, u: Float[Tensor, "*axes inner"]) -> tuple[Tensor, ...]:
        """u, Δ, A, B, C in single precision or finer."""
        delta, B, C = self.maps(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        u, delta, A_log, B, C = at_least_float32(u, self.dt(delta), self.A_log, B, C)
        return u, F.softplus(delta), -torch.exp(A_log), B, C

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The scan over blocks of time with a backward of its own, or the compiled one."""
        u, z = self.input(x).chunk(2, dim=-1)
        u, delta, A, B, C = self._rates(self.convolution(u, self.kernel))
        fused = compiled("selective_scan", self.kernel, u, x, self.d_state)
        with no_autocast(x):
            y = selective_scan(u, delta, A, B, C)[0] if not fused else fused(u, delta, A, B, C)
            y = torch.addcmul(y, u, self.D)
        return self.out((y * F.silu(z)).to(x.dtype))

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """No state and no inputs yet."""
        taps = len(self.convolution.taps)
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return {
            "state": torch.zeros(batch, self.inner, self.d_state, device=device, dtype=dtype),
            "inputs": torch.zeros(batch, taps - 1, self.inner, device=device, dtype=dtype),
        }

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """The equation for one token."""
        u, z = self.input(x).chunk(2, dim=-1)
        u, inputs = self.convolution.step(u, state["inputs"])
        u, delta, A, B, C = self._rates(u)
        h = torch.exp(delta[..., None] * A) * state["state"]
        h = h + (delta * u)[..., None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + self.D * u
        return self.out((y * F.silu(z)).to(x.dtype)), {"state": h, "inputs": inputs}

    def state_floats(self, length: int) -> int:
        """N numbers per channel, and the inputs that the short convolution still needs."""
        del length
        return self.inner * (self.d_state + len(self.convolution.taps) - 1)

    def matrix_state_floats(self, length: int) -> int:
        """N numbers per channel."""
        del length
        return self.inner * self.d_state

    def mixing_flops_per_token(self, length: int) -> int:
        """Short filter, update (exp, products, sum: six per number), read-out, skip and gate."""
        del length
        return self.inner * (2 * len(self.convolution.taps) + 8 * self.d_state + 4)
