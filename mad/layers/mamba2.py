"""Mamba-2: one decay per head, so that a chunk of steps becomes matrix products.

[z, x, B, C, δ] = W_in x;   [x, B, C] = SiLU(conv₄([x, B, C]));   Δ_t = softplus(δ_t + b_Δ)
S_t = exp(−Δ_t e^a) S_{t−1} + Δ_t x_t B_tᵀ;   y_t = S_t C_t + D x_t  per head of P channels
out = W_o RMSNorm(y ⊙ SiLU(z))                                     [arXiv 2405.21060, §6, §7]
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import ShortConvolution, at_least_float32, no_autocast
from mad.layers.kernels import compiled, filter_kernel, known_kernel
from mad.layers.layer import Layer, State
from mad.layers.mamba import step_size_bias, without_decay
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel
from workbench.mamba import chunked_scan


class Mamba2(Layer):
    """State-space duality; par 103 016 and state H·P·N = 2 048 (+ 816 of the filter)."""

    def __init__(
        self,
        width: int,
        *,
        d_state: int = 8,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 32,
        groups: int = 1,
        chunk: int = 32,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        norm_eps: float = 1e-5,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        inner = expand * width
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "head_dim": head_dim}
        for name, value in (sizes | {"groups": groups, "chunk": chunk}).items():
            if value < 1:
                raise ConfigError(f"mamba2: {name}={value}; it must be at least 1")
        if inner % head_dim or (inner // head_dim) % groups:
            raise ConfigError(
                f"mamba2: {inner} inner channels (expand={expand} times width {width}) must be a "
                f"multiple of head_dim={head_dim}, and the heads a multiple of groups={groups}"
            )
        self.inner, self.d_state, self.head_dim, self.groups = inner, d_state, head_dim, groups
        self.num_heads, self.chunk = inner // head_dim, chunk
        self.kernel = known_kernel("mamba2", kernel)
        self.kernels = {"ssd": kernel, "causal_conv1d": filter_kernel(kernel)}
        self.filtered = inner + 2 * groups * d_state
        self.input = nn.Linear(width, inner + self.filtered + self.num_heads, bias=False)
        self.convolution = ShortConvolution(self.filtered, d_conv)
        self.dt_bias = without_decay(step_size_bias(self.num_heads, dt_min, dt_max))
        self.A_log = without_decay(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.D = without_decay(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(inner, eps=norm_eps)
        self.out = nn.Linear(inner, width, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """The gate, what the filter takes, and the raw step sizes."""
        return self.input(x).split([self.inner, self.filtered, self.num_heads], dim=-1)

    def _rates(self, xBC: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """u, Δ, A, B, C in single precision or finer; heads and groups are axes."""
        size = self.groups * self.d_state
        u, B, C = xBC.split([self.inner, size, size], dim=-1)
        u = u.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (part.unflatten(-1, (self.groups, self.d_state)) for part in (B, C))
        u, delta, A_log, B, C = at_least_float32(u, delta + self.dt_bias, self.A_log, B, C)
        return u, F.softplus(delta), -torch.exp(A_log), B, C

    def _finish(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm and the output map; y and u are (…, H, P)."""
        y = torch.addcmul(y, u, self.D[:, None]).flatten(-2) * F.silu(z)
        y = F.rms_norm(y, (self.inner,), self.norm.weight.to(y.dtype), self.norm.eps)
        return self.out(y.to(z.dtype))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The chunked scan, or the compiled one."""
        z, xBC, delta = self._project(x)
        u, delta, A, B, C = self._rates(self.convolution(xBC, self.kernel), delta)
        fused = compiled("ssd", self.kernel, u, x)
        with no_autocast(x):
            if fused is None:
                y, _ = chunked_scan(u, delta, A, B, C, chunk=self.chunk)
            else:
                y = fused(u, delta, A, B, C, self.chunk)
        return self._finish(y, u, z)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """No state and no inputs yet."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (batch, self.num_heads, self.head_dim, self.d_state)
        taps = len(self.convolution.taps)
        return {
            "matrix": torch.zeros(shape, device=device, dtype=dtype),
            "inputs": torch.zeros(batch, taps - 1, self.filtered, device=device, dtype=dtype),
        }

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """The equation for one token."""
        z, xBC, delta = self._project(x)
        xBC, inputs = self.convolution.step(xBC, state["inputs"])
        u, delta, A, B, C = self._rates(xBC, delta)
        B, C = (part.repeat_interleave(self.num_heads // self.groups, dim=1) for part in (B, C))
        S = torch.exp(delta * A)[..., None, None] * state["matrix"]
        S = S + (delta[..., None] * u)[..., None] * B[:, :, None]
        y = (S * C[:, :, None]).sum(-1)
        return self._finish(y, u, z), {"matrix": S, "inputs": inputs}

    def state_floats(self, length: int) -> int:
        """P·N per head, and the inputs that the short filter still needs."""
        taps = len(self.convolution.taps)
        return self.matrix_state_floats(length) + self.filtered * (taps - 1)

    def matrix_state_floats(self, length: int) -> int:
        """P·N per head."""
        del length
        return self.inner * self.d_state

    def mixing_flops_per_token(self, length: int) -> int:
        """Short filter, update and read-out of the recurrent form, skip and gate."""
        taps = len(self.convolution.taps)
        return 2 * taps * self.filtered + self.inner * (5 * self.d_state + 4)
