"""RWKV-7's time mixer: a delta rule whose decay, removal and writing are vectors of their own.

    S_t = diag(w_t) S_{t−1} − (a_t ⊙ κ_t) κ_tᵀ S_{t−1} + k_t v_tᵀ,   o_t = S_tᵀ r_t

[arXiv 2503.14456, eq. 17 to 19; S here is transposed, keys × values]. With |κ| = 1 it removes what
lies under κ at the rate a and writes under another key k; κ = k, a = β constant, w = α constant and
values scaled by β make it the gated delta rule up to the order of decay and removal.

Within a chunk let G_t = Σ_{s ≤ t} log w_s per channel, and u_t = S_{t−1}ᵀ κ_t what is removed. Then

    K̂ = κ e^(G_{t−1} − M),  Â = a κ e^(M − G),  K̃ = k e^(M − G),  R̃ = r e^(G − M)
    (I + stril(K̂ Âᵀ)) U = κ e^(G_{t−1}) S₀ + stril(K̂ K̃ᵀ) V
    O = r e^G S₀ + tril(R̃ K̃ᵀ) V − tril(R̃ Âᵀ) U
    S_c = e^(G_c) S₀ + (k e^(G_c − G))ᵀ V − (a κ e^(G_c − G))ᵀ U

where M is G at mid-chunk and keeps the factors in range: log w ≥ −e^(−1/2) = −0.61, so none
exceeds e^(0.31 c).

Glossary: d width, H heads, e = d/H head width, c chunk, N chunks, L time.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import at_least_float32
from mad.layers.delta import by_steps, prepare_chunks, solve_chunks, unit
from mad.layers.kernels import compiled, known_kernel
from mad.layers.layer import Layer, State
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel

LONGEST_CHUNK = 128
"""The products of factors stay below float32's largest number up to this many tokens."""
STRONGEST_DECAY = math.exp(-0.5)
"""−log w is at most this."""


def generalised_delta_step(
    state: Float[Tensor, "*axes head value"],
    r: Float[Tensor, "*axes head"],
    log_decay: Float[Tensor, "*axes head"],
    k: Float[Tensor, "*axes head"],
    v: Float[Tensor, "*axes value"],
    removal: Float[Tensor, "*axes head"],
    rate: Float[Tensor, "*axes head"],
) -> tuple[Float[Tensor, "*axes value"], Float[Tensor, "*axes head value"]]:
    """One step of the equation (κ is `removal`, a is `rate`): what is read, the state after it."""
    held = (state * removal[..., None]).sum(dim=-2)  # S_{t−1}ᵀ κ
    state = (
        log_decay.exp()[..., None] * state
        - (rate * removal)[..., None] * held[..., None, :]
        + k[..., None] * v[..., None, :]
    )
    return (state * r[..., None]).sum(dim=-2), state


def generalised_delta_recurrent(
    r: Float[Tensor, "batch heads time head"],
    log_decay: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time value"],
    removal: Float[Tensor, "batch heads time head"],
    rate: Float[Tensor, "batch heads time head"],
    state: Float[Tensor, "batch heads head value"] | None = None,
) -> tuple[Float[Tensor, "batch heads time value"], Float[Tensor, "batch heads head value"]]:
    """The rule step by step, in any precision: outputs and the last state. The reference."""
    return by_steps(generalised_delta_step, state, k, v, (r, log_decay, k, v, removal, rate))


def generalised_delta_chunked(
    r: Float[Tensor, "batch heads time head"],
    log_decay: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch heads time head"],
    v: Float[Tensor, "batch heads time value"],
    removal: Float[Tensor, "batch heads time head"],
    rate: Float[Tensor, "batch heads time head"],
    state: Float[Tensor, "batch heads head value"] | None = None,
    chunk: int = 32,
) -> tuple[Float[Tensor, "batch heads time value"], Float[Tensor, "batch heads head value"]]:
    """The same by one triangular system per chunk and a loop over chunks, in float32 at least.

    Exact as long as half a chunk's log decay stays above −40 in every channel.
    """
    length, chunk = r.shape[2], min(chunk, r.shape[2])
    with torch.autocast(r.device.type, enabled=False):
        memory, parts = prepare_chunks(chunk, state, r, k, v, log_decay, removal, rate)
        r, k, v, log_decay, removal, rate = parts  # each (N, B, H, c, e)
        total = log_decay.cumsum(dim=-2)  # G
        before = total - log_decay  # G_{t−1}
        middle = total[..., chunk // 2, :][..., None, :]  # M
        last = total[..., -1:, :]
        shrink, grow = (total - middle).exp(), (middle - total).exp()
        asked, placed = removal * (before - middle).exp(), rate * removal
        removed, written = placed * grow, k * grow  # Â, K̃
        system = asked @ removed.mT  # (N, B, H, c, c)
        # what is removed of V and of S₀
        u, w = solve_chunks(system, (asked @ written.mT).tril(-1) @ v, removal * before.exp())
        reading = r * shrink
        scores = (reading @ removed.mT).tril()
        own = (reading @ written.mT).tril() @ v - scores @ u  # what does not pass through S₀
        carried = r * total.exp() - scores @ w
        rest = (last - total).exp()
        forgotten = (placed * rest).mT.contiguous()  # (N, B, H, e, c)
        gained = (k * rest).mT @ v - forgotten @ u

        outputs = []
        parts = (x.unbind(0) for x in (own, carried, last.exp().mT, gained, forgotten @ w))
        for own_n, carried_n, decay_n, gained_n, lost_n in zip(*parts, strict=True):
            outputs.append(own_n + carried_n @ memory)
            memory = decay_n * memory + gained_n - lost_n @ memory
        return torch.cat(outputs, dim=2)[:, :, :length], memory


class LowRank(nn.Module):
    """W₂ act(W₁ x) through a narrow middle; zero at first."""

    def __init__(self, width: int, rank: int, act: nn.Module) -> None:
        super().__init__()
        self.down, self.act = nn.Linear(width, rank, bias=False), act
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1)

    def forward(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        """Down, act, up."""
        return self.up(self.act(self.down(x)))


class RWKV7TimeMixer(Layer):
    """RWKV-7 time mixing; par 4d² + d(13 + 4·32 + 2·64) = 99 968 at d = 128 and heads of 16.

    Every stream c mixes a token with the one before it, x_c = x + (x' − x) μ_c. Then r, k, v are
    linear, w = exp(−e^(−1/2) σ(b_w + tanh-low-rank(x_w))), a = σ(b_a + low-rank(x_a)),
    κ = k ⊙ ξ of length one per head, the written key is k (1 + (a − 1) ⊙ α), and

        out = W_o (g ⊙ [GroupNorm_head(o) + (r·(ρ ⊙ k)) v]),   g = W₂ σ(W₁ x_g)

    State: H e² = 2 048 floats, and the last token. The published model also mixes the first layer's
    values into later ones: a layer that stands alone has no such partner. Starting values are those
    of a first layer.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int = 16,
        decay_rank: int = 32,
        rate_rank: int = 32,
        gate_rank: int = 64,
        chunk: int = 32,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        if head_dim < 1 or width % head_dim:
            fits = [n for n in range(1, width + 1) if width % n == 0]
            raise ConfigError(
                f"rwkv7: width {width} is not divisible by head_dim={head_dim}; "
                f"choose one of {', '.join(map(str, fits))}"
            )
        ranks = {"decay_rank": decay_rank, "rate_rank": rate_rank, "gate_rank": gate_rank}
        for name, rank in ranks.items():
            if rank < 1:
                raise ConfigError(f"rwkv7: {name}={rank}; expected at least 1")
        if not 1 <= chunk <= LONGEST_CHUNK:
            raise ConfigError(f"rwkv7: chunk={chunk}; expected 1 to {LONGEST_CHUNK}")
        self.width, self.head, self.chunk = width, head_dim, chunk
        self.num_heads = width // head_dim
        self.kernel = known_kernel("rwkv7", kernel)
        self.kernels = {"rwkv7": kernel}
        place = torch.arange(width) / width
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])  # of r, w, k, v, a, g
        self.mix = nn.Parameter(1 - place ** powers[:, None])
        self.receptance, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.decay = LowRank(width, decay_rank, nn.Tanh())
        self.rate = LowRank(width, rate_rank, nn.Identity())
        self.gate = LowRank(width, gate_rank, nn.Sigmoid())
        nn.init.normal_(self.gate.down.weight, std=width**-0.5)
        nn.init.orthogonal_(self.gate.up.weight)  # a gate of .05 would hold the layer back at first
        depth = torch.arange(width) / max(1, width - 1)
        self.decay_base = nn.Parameter(-6.5 + 5 * depth**0.85)
        self.rate_base = nn.Parameter(torch.zeros(width))
        self.removal = nn.Parameter(torch.full((width,), 0.85))  # ξ
        self.replacement = nn.Parameter(torch.ones(width))  # α
        self.bonus = nn.Parameter(torch.zeros(width))  # ρ
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))

    def heads(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes heads head"]:
        """The channels of each head."""
        return x.unflatten(-1, (self.num_heads, self.head))

    def streams(
        self, x: Float[Tensor, "*axes width"], before: Float[Tensor, "*axes width"]
    ) -> tuple[list[Float[Tensor, "*axes heads head"]], Float[Tensor, "*axes width"]]:
        """r, log w, k, v, κ, a per head as the rule takes them, and the gate g."""
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * mix for mix in self.mix.unbind(0))
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        pace, rate = at_least_float32(
            self.decay_base + self.decay(x_w), self.rate_base + self.rate(x_a)
        )
        log_decay, rate = -STRONGEST_DECAY * pace.sigmoid(), rate.sigmoid()
        removal = unit(self.heads(k * self.removal))
        k = k * (1 + (rate - 1) * self.replacement)
        parts = [self.heads(part) for part in (r, log_decay, k, v, rate)]
        return [*parts[:4], removal, parts[4]], self.gate(x_g)

    def finish(
        self,
        mixed: Float[Tensor, "*axes heads head"],
        parts: list[Float[Tensor, "*axes heads head"]],
        gate: Float[Tensor, "*axes width"],
    ) -> Float[Tensor, "*axes width"]:
        """Normalise per head, add the present token, gate, project."""
        r, _, k, v, _, _ = parts
        normal = F.layer_norm(mixed, (self.head,), eps=64e-5)
        normal = normal.flatten(-2) * self.norm_weight + self.norm_bias
        present = (r * k * self.heads(self.bonus)).sum(dim=-1, keepdim=True) * v
        return self.out(((normal + present.flatten(-2)) * gate).to(gate.dtype))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Chunk by chunk."""
        parts, gate = self.streams(x, F.pad(x, (0, 0, 1, 0))[:, :-1])
        r, log_decay, k, v, removal, rate = (part.transpose(1, 2) for part in parts)  # (B, H, L, e)
        fused = compiled("rwkv7", self.kernel, r, x, self.head)
        if fused is None:
            mixed, _ = generalised_delta_chunked(
                r, log_decay, k, v, removal, rate, chunk=self.chunk
            )
        else:
            mixed = fused(r, log_decay, k, v, removal, rate)
        return self.finish(mixed.transpose(1, 2), parts, gate)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty memory (float32 at least) and a zero token before the first."""
        dtype = dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        shape = batch, self.num_heads, self.head, self.head
        return {
            "memory": torch.zeros(shape, device=device, dtype=wide),
            "last": torch.zeros((batch, self.width), device=device, dtype=dtype),
        }

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """Decay, remove, write, read."""
        parts, gate = self.streams(x, state["last"])
        mixed, memory = generalised_delta_step(state["memory"], *at_least_float32(*parts))
        return self.finish(mixed, parts, gate), {"memory": memory, "last": x}

    def state_floats(self, length: int) -> int:
        """The memory of every head and the last token."""
        return self.matrix_state_floats(length) + self.width

    def matrix_state_floats(self, length: int) -> int:
        """The memories: H e²."""
        del length
        return self.width * self.head

    def mixing_flops_per_token(self, length: int) -> int:
        """Six mixtures with the token before; decay, removal, write, read-out; the bonus."""
        return 6 * 3 * self.width + 8 * self.matrix_state_floats(length) + 6 * self.width
