"""The delta rule: a memory that first reads what a key holds, then writes the difference.

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,   o_t = S_tᵀ q_t

DeltaNet is α = 1 [arXiv 2406.06484, eq. 2], Gated DeltaNet forgets by α_t ≤ 1 [arXiv 2412.06464,
eq. 10]; S here is transposed, keys × values. With |k| = 1 and β in (0, 1) no step grows the memory;
with keys of other lengths it may.

Within a chunk the write u_t = β_t (v_t − α_t S_{t−1}ᵀ k_t) depends on the earlier writes through
their keys alone, hence on all at once by one triangular system (the WY or UT transform):

    G_t = Σ_{s ≤ t} log α_s,   D_ts = e^(G_t − G_s) for s ≤ t
    (I + stril(β K Kᵀ ⊙ D)) [U W] = β [V, e^G K]
    Ũ = U − W S₀,   O = e^G Q S₀ + tril(Q Kᵀ ⊙ D) Ũ,   S_c = e^(G_c) S₀ + (e^(G_c − G) K)ᵀ Ũ

Glossary: d width, H heads, e = d/H head width, c chunk, N chunks, L time.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.convolution import (
    convolve_compiled,
    convolve_short,
    convolve_short_step,
    short_taps,
)
from mad.layers.decay import at_least_float32
from mad.layers.kernels import compiled, filter_kernel, known_kernel
from mad.layers.layer import Layer, State, head_width
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel

NORM_EPSILON = 1e-6
"""Added to the square of a key's length before it is divided by it."""


def unit(x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes head"]:
    """x / |x|; zero stays zero."""
    return x * (x.square().sum(dim=-1, keepdim=True) + NORM_EPSILON).rsqrt()


def delta_rule_step(
    state: Float[Tensor, "*axes head value"],
    q: Float[Tensor, "*axes head"],
    k: Float[Tensor, "*axes head"],
    v: Float[Tensor, "*axes value"],
    beta: Float[Tensor, "*axes"],
    log_decay: Float[Tensor, "*axes"],
) -> tuple[Float[Tensor, "*axes value"], Float[Tensor, "*axes head value"]]:
    """One step of the equation: what is read after it, and the state after it."""
    state = state * log_decay.exp()[..., None, None]
    held = (state * k[..., None]).sum(dim=-2)  # Sᵀ k
    state = state + k[..., None] * (beta[..., None] * (v - held))[..., None, :]
    return (state * q[..., None]).sum(dim=-2), state


def by_steps(
    step: Callable[..., tuple[Tensor, Tensor]],
    state: Float[Tensor, "batch heads head value"] | None,
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time value"],
    parts: Sequence[Float[Tensor, "batch heads time *rest"]],
) -> tuple[Float[Tensor, "batch heads time value"], Float[Tensor, "batch heads head value"]]:
    """Outputs and the last memory of `step(memory, *parts at one time)`, from an empty memory where
    no state is given."""
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(k.shape[2]):
        y, state = step(state, *(x[:, :, t] for x in parts))
        outputs.append(y)
    return torch.stack(outputs, dim=2), state


def delta_rule_recurrent(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time value"],
    beta: Float[Tensor, "batch heads time"],
    log_decay: Float[Tensor, "batch heads time"],
    state: Float[Tensor, "batch heads head value"] | None = None,
) -> tuple[Float[Tensor, "batch heads time value"], Float[Tensor, "batch heads head value"]]:
    """The rule step by step, in any precision: outputs and the last state. The reference."""
    return by_steps(delta_rule_step, state, k, v, (q, k, v, beta, log_decay))


def in_chunks(
    x: Float[Tensor, "batch heads time *rest"], chunk: int
) -> Float[Tensor, "chunks batch heads chunk *rest"]:
    """Time cut into chunks, each one stretch of memory; the last is filled up with zeros."""
    missing = -x.shape[2] % chunk
    if missing:
        x = F.pad(x, (*(0, 0) * (x.ndim - 3), 0, missing))
    return x.unflatten(2, (-1, chunk)).movedim(2, 0).contiguous()


def prepare_chunks(
    chunk: int, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *parts: Tensor
) -> tuple[Float[Tensor, "batch heads head value"], list[Tensor]]:
    """The memory before the first chunk, and all tensors cut into chunks, in float32 at least.

    What both delta rules start with; the memory is empty where no state is given.
    """
    cut = [in_chunks(x, chunk) for x in at_least_float32(q, k, v, *parts)]
    if state is None:
        memory = cut[1].new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    else:
        (memory,) = at_least_float32(state)
    return memory, cut


def solve_chunks(
    system: Float[Tensor, "*axes chunk chunk"],
    values: Float[Tensor, "*axes chunk value"],
    keys: Float[Tensor, "*axes chunk head"],
) -> tuple[Float[Tensor, "*axes chunk value"], Float[Tensor, "*axes chunk head"]]:
    """U and W of (I + stril(system)) [U W] = [values, keys], all chunks at once."""
    right = torch.cat([values, keys], dim=-1)
    # the solver reads the strict lower triangle only: the diagonal of ones is implied
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split((values.shape[-1], keys.shape[-1]), dim=-1)
    return u, w


def delta_rule_chunked(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time value"],
    beta: Float[Tensor, "batch heads time"],
    log_decay: Float[Tensor, "batch heads time"] | None = None,
    state: Float[Tensor, "batch heads head value"] | None = None,
    chunk: int = 32,
) -> tuple[Float[Tensor, "batch heads time value"], Float[Tensor, "batch heads head value"]]:
    """The same by one triangular system per chunk and a loop over chunks, in float32 at least.

    `log_decay=None` is α = 1 and saves the products with D.
    """
    length, chunk = q.shape[2], min(chunk, q.shape[2])
    with torch.autocast(q.device.type, enabled=False):
        memory, (q, k, v, beta) = prepare_chunks(chunk, state, q, k, v, beta)
        written, read, kept, reach = k * beta[..., None], q, k, None  # each (N, B, H, c, e)
        system, scores = written @ k.mT, (q @ k.mT).tril()  # (N, B, H, c, c)
        if log_decay is not None:
            (log_decay,) = at_least_float32(log_decay)
            total = in_chunks(log_decay, chunk).cumsum(dim=-1)[..., None]  # G: (N, B, H, c, 1)
            decay = (
                (total - total.mT).tril().exp()
            )  # masked before exp: positive above the diagonal
            system, scores = system * decay, scores * decay
            kept = k * (total[..., -1:, :] - total).exp()
            written, read = written * total.exp(), q * total.exp()
            reach = total[..., -1:, :].exp().unbind(0)
        u, w = solve_chunks(system, v * beta[..., None], written)
        outputs = []
        parts = (x.unbind(0) for x in (read, scores, kept.mT.contiguous(), u, w.contiguous()))
        for n, (read_n, scores_n, kept_n, u_n, w_n) in enumerate(zip(*parts, strict=True)):
            new = u_n - w_n @ memory  # Ũ: (B, H, c, e)
            outputs.append(read_n @ memory + scores_n @ new)
            memory = (memory if reach is None else memory * reach[n]) + kept_n @ new
        return torch.cat(outputs, dim=2)[:, :, :length], memory


class DeltaNet(Layer):
    """DeltaNet; par 4d² + dH + 12d + e = 68 112 at d = 128 and 8 heads.

    q, k, v = SiLU(conv₄(W x)), q and k of length one, β = σ(W_β x); out = W_o RMSNorm_head(o).
    State: H matrices of e² = 2 048 floats, and 9d = 1 152 for the short convolution.
    """

    compiled = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        short_conv: int = 4,
        negative_eigenvalues: bool = False,
        chunk: int = 32,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        head = head_width(width, num_heads, "deltanet")
        if short_conv < 1 or chunk < 1:
            raise ConfigError(
                f"deltanet: short_conv={short_conv} and chunk={chunk} must be at least 1 "
                "(short_conv=1 is no convolution over time)"
            )
        self.width, self.num_heads, self.head, self.chunk = width, num_heads, head, chunk
        self.kernel = known_kernel("deltanet", kernel)
        self.kernels = {self.compiled: kernel, "causal_conv1d": filter_kernel(kernel)}
        self.most = 2.0 if negative_eigenvalues else 1.0
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.taps = short_taps(short_conv, 3 * width)
        self.beta = nn.Linear(width, num_heads, bias=False)
        self.norm = nn.RMSNorm(head, eps=1e-5)
        self.out = nn.Linear(width, width, bias=False)

    def gates(
        self, x: Float[Tensor, "*axes width"]
    ) -> tuple[Float[Tensor, "*axes heads"], Float[Tensor, "*axes heads"] | None]:
        """β and log α of every head; log α is none where nothing is forgotten."""
        return self.most * self.beta(x).sigmoid(), None

    def finish(
        self, mixed: Float[Tensor, "*axes heads head"], x: Float[Tensor, "*axes width"]
    ) -> Float[Tensor, "*axes width"]:
        """From what was read to the layer's output."""
        return self.out(self.norm(mixed.to(x.dtype)).flatten(-2))

    def split(
        self, qkv: Float[Tensor, "*axes three_widths"]
    ) -> tuple[Float[Tensor, "*axes heads head"], ...]:
        """Heads of q, k (of length one) and v."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head)).unbind(-3)
        return unit(q), unit(k), v

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Chunk by chunk."""
        qkv = self.qkv(x)
        filtered = convolve_compiled(qkv, self.taps, silu=True, kernel=self.kernel)
        qkv = F.silu(convolve_short(qkv, self.taps)) if filtered is None else filtered
        q, k, v = (part.transpose(1, 2) for part in self.split(qkv))  # each (B, H, L, e)
        gates = [g.transpose(1, 2) for g in self.gates(x) if g is not None]  # each (B, H, L)
        fused = compiled(self.compiled, self.kernel, q, x, self.head)
        if fused is None:
            mixed, _ = delta_rule_chunked(q, k, v, *gates, chunk=self.chunk)
        else:
            mixed = fused(q, k, v, *gates)
        return self.finish(mixed.transpose(1, 2), x)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty memory (float32 at least) and the tokens before the first, all zero."""
        dtype = dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        shape = batch, self.num_heads, self.head, self.head
        window = batch, len(self.taps) - 1, 3 * self.width
        return {
            "memory": torch.zeros(shape, device=device, dtype=wide),
            "window": torch.zeros(window, device=device, dtype=dtype),
        }

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """Read, write the difference, read out."""
        qkv, window = convolve_short_step(self.qkv(x), state["window"], self.taps)
        q, k, v = at_least_float32(*self.split(F.silu(qkv)))
        beta, log_decay = self.gates(x)
        if log_decay is None:
            log_decay = torch.zeros_like(beta)
        beta, log_decay = at_least_float32(beta, log_decay)
        mixed, memory = delta_rule_step(state["memory"], q, k, v, beta, log_decay)
        return self.finish(mixed, x), {"memory": memory, "window": window}

    def state_floats(self, length: int) -> int:
        """The memory of every head and the window of the short convolution."""
        return self.matrix_state_floats(length) + 3 * self.width * (len(self.taps) - 1)

    def matrix_state_floats(self, length: int) -> int:
        """The memories: H e²."""
        del length
        return self.width * self.head

    def mixing_flops_per_token(self, length: int) -> int:
        """Short convolution; read, write and read-out of the recurrent form."""
        return 2 * 3 * self.width * len(self.taps) + 6 * self.matrix_state_floats(length)


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet; par 5d² + 2dH + 12d + e + 2H = 85 536 at d = 128 and 8 heads.

    DeltaNet with α_t = exp(−A softplus(W_α x + b)) per head, as in Mamba-2 (A from U(1, 16), b from
    a log-uniform step between 10⁻³ and 10⁻¹), and an output gate: out = W_o (RMSNorm_head(o) ⊙
    SiLU(W_g x)). State as DeltaNet.
    """

    compiled = "gated_delta_rule"

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        short_conv: int = 4,
        negative_eigenvalues: bool = False,
        chunk: int = 32,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__(
            width,
            num_heads=num_heads,
            short_conv=short_conv,
            negative_eigenvalues=negative_eigenvalues,
            chunk=chunk,
            kernel=kernel,
        )
        self.forget = nn.Linear(width, num_heads, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())  # softplus(dt_bias) = step

    def gates(
        self, x: Float[Tensor, "*axes width"]
    ) -> tuple[Float[Tensor, "*axes heads"], Float[Tensor, "*axes heads"] | None]:
        """β and log α of every head."""
        beta, _ = super().gates(x)
        (pace,) = at_least_float32(self.forget(x))
        return beta, -self.A_log.exp() * F.softplus(pace + self.dt_bias)

    def finish(
        self, mixed: Float[Tensor, "*axes heads head"], x: Float[Tensor, "*axes width"]
    ) -> Float[Tensor, "*axes width"]:
        """Normalise, gate, project."""
        return self.out(self.norm(mixed.to(x.dtype)).flatten(-2) * F.silu(self.gate(x)))

    def mixing_flops_per_token(self, length: int) -> int:
        """As DeltaNet, the decay of the memory and the gate."""
        return (
            super().mixing_flops_per_token(length) + self.matrix_state_floats(length) + self.width
        )
