"""mLSTM: a matrix memory with an exponential input gate and a normaliser.

    S_t = f_t S_{t−1} + i_t k_t v_tᵀ;   n_t = f_t n_{t−1} + i_t k_t
    h_t = S_tᵀ q_t / max(|n_t·q_t|, 1)
    f_t = σ(w_f x + b_f),  i_t = exp(w_i x + b_i) per head;   y = W_o (GroupNorm(h) ⊙ σ(W_g x))
                                                                   [arXiv 2405.04517, eq. 19–27]

exp overflows, so S and n are kept divided by exp(m_t), m_t = max(log f_t + m_{t−1}, log i_t, 0):
then max(|n·q|, 1) becomes max(|n·q|, e^−m), and h does not depend on m at all, which is why m takes
no part in the gradient. The 0 keeps e^−m ≤ 1; nothing smaller than 1 needs a smaller unit.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import HeadNorm, at_least_float32, no_autocast, split_heads
from mad.layers.layer import Layer, State, head_width
from workbench.errors import ConfigError

# |n·q| below this share of the largest weight is rounding and does not divide.
SMALLEST_NORMALISER = 1e-6

Memory = tuple[Tensor, Tensor, Tensor]
"""S (B, H, f, e), n (B, H, f) and m (B, H)."""


def empty_memory(k: Tensor, v: Tensor) -> Memory:
    """S, n, m before the first step."""
    shape = k.shape[:2]
    S = k.new_zeros(*shape, k.shape[-1], v.shape[-1])
    return S, k.new_zeros(*shape, k.shape[-1]), k.new_zeros(shape)


def _divide(numerator: Tensor, normaliser: Tensor, m: Tensor) -> Tensor:
    floor = torch.exp(-m).clamp_min(SMALLEST_NORMALISER)
    return numerator / torch.maximum(normaliser.abs(), floor)[..., None]


def mlstm_recurrent(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    log_i: Float[Tensor, "batch heads time"],
    log_f: Float[Tensor, "batch heads time"],
    memory: Memory | None = None,
) -> tuple[Float[Tensor, "batch heads time head"], Memory]:
    """Outputs and the last memory, one step after another."""
    S, n, m = empty_memory(k, v) if memory is None else memory
    outputs = []
    for t in range(q.shape[2]):
        last, m = m, torch.maximum(log_f[:, :, t] + m, log_i[:, :, t]).clamp_min(0).detach()
        keep = torch.exp(log_f[:, :, t] + last - m)[..., None]
        key = torch.exp(log_i[:, :, t] - m)[..., None] * k[:, :, t]
        S = keep[..., None] * S + key[..., None] * v[:, :, t, None, :]
        n = keep * n + key
        read = (q[:, :, t, None, :] @ S).squeeze(2)
        outputs.append(_divide(read, (q[:, :, t] * n).sum(-1), m))
    return torch.stack(outputs, dim=2), (S, n, m)


def mlstm_chunked(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    log_i: Float[Tensor, "batch heads time"],
    log_f: Float[Tensor, "batch heads time"],
    memory: Memory | None = None,
    chunk: int = 32,
) -> tuple[Float[Tensor, "batch heads time head"], Memory]:
    """The same, a chunk of steps at a time: the weight of j at i is exp(F_i − F_j + log i_j − m_i).

    F is the running sum of log f in the chunk; the normaliser is one more column of v, all ones.
    """
    S, n, m = empty_memory(k, v) if memory is None else memory
    S = torch.cat([S, n[..., None]], dim=-1)  # (B, H, f, e + 1)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    outputs = []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        Q, K, V, gate = q[:, :, part], k[:, :, part], v[:, :, part], log_i[:, :, part]
        total = log_f[:, :, part].cumsum(-1)  # F
        later = torch.ones(Q.shape[2], Q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        gaps = total[..., :, None] - total[..., None, :] + gate[..., None, :]
        gaps = gaps.masked_fill(later, -torch.inf)
        carried = total + m[..., None]
        unit = torch.maximum(gaps.amax(-1), carried).clamp_min(0).detach()  # m_i
        scores = (Q @ K.transpose(-1, -2)) * torch.exp(gaps - unit[..., None])
        read = scores @ V + torch.exp(carried - unit)[..., None] * (Q @ S)
        outputs.append(_divide(read[..., :-1], read[..., -1], unit))
        m = unit[..., -1]
        S = torch.exp(carried[..., -1] - m)[..., None, None] * S
        S = S + (K * torch.exp(gaps[..., -1, :] - m[..., None])[..., None]).transpose(-1, -2) @ V
    return torch.cat(outputs, dim=2), (S[..., :-1], S[..., -1], m)


class MLSTM(Layer):
    """mLSTM; par 84 240 and state H·(e² + e + 1) = 2 048 + 136 with eight heads at width 128."""

    def __init__(
        self, width: int, *, num_heads: int = 8, chunk: int = 32, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.head = head_width(width, num_heads, "mlstm")
        if chunk < 1:
            raise ConfigError(f"mlstm: chunk={chunk}; it must be at least 1")
        self.num_heads, self.chunk = num_heads, chunk
        self.q, self.k, self.v, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.gates = nn.Linear(width, 2 * num_heads)  # log i and the forget gate's argument
        with torch.no_grad():  # at first little is forgotten, and at different rates
            self.gates.bias[:num_heads].zero_()
            self.gates.bias[num_heads:].copy_(torch.linspace(3, 6, num_heads))
        self.gates.bias.no_reinit = True  # pyright: ignore[reportAttributeAccessIssue]
        self.norm = HeadNorm(width, num_heads, norm_eps)

    def _parts(self, x: Float[Tensor, "batch time width"]) -> tuple[Tensor, ...]:
        """q, k, v as (B, H, L, e), log i and log f as (B, H, L)."""
        heads = (split_heads(p(x), self.num_heads) for p in (self.q, self.k, self.v))
        q, k, v, gates = at_least_float32(*heads, self.gates(x))
        log_i, f = gates.transpose(1, 2).chunk(2, dim=1)
        return q, k * self.head**-0.5, v, log_i, F.logsigmoid(f)

    def _finish(self, h: Tensor, x: Tensor) -> Tensor:
        return self.out((self.norm(h) * torch.sigmoid(self.gate(x))).to(x.dtype))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Chunks of time as matrix products."""
        parts = self._parts(x)
        with no_autocast(x):
            h, _ = mlstm_chunked(*parts, chunk=self.chunk)
        return self._finish(h.transpose(1, 2), x)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty memory."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        like = torch.zeros(batch, self.num_heads, 0, self.head, device=device, dtype=dtype)
        S, n, m = empty_memory(like, like)
        return {"matrix": S, "normaliser": n, "unit": m}

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """The equation for one token."""
        memory = (state["matrix"], state["normaliser"], state["unit"])
        parts = self._parts(x[:, None])
        with no_autocast(x):
            h, (S, n, m) = mlstm_recurrent(*parts, memory)
        return self._finish(h[:, :, 0], x), {"matrix": S, "normaliser": n, "unit": m}

    def state_floats(self, length: int) -> int:
        """Matrix, normaliser and unit of every head."""
        return self.matrix_state_floats(length) + self.num_heads * (self.head + 1)

    def matrix_state_floats(self, length: int) -> int:
        """e² per head."""
        del length
        return self.num_heads * self.head**2

    def mixing_flops_per_token(self, length: int) -> int:
        """Decay, update and read-out of matrix and normaliser in the recurrent form."""
        del length
        return 5 * self.num_heads * self.head * (self.head + 1)
