"""RWKV 5 and 6: token shift, a matrix state with per-channel decay, and a bonus for the present.

    x' = x one position later;  x_c = x + (x' − x) m_c for c in r, k, v, g (and w in version 6)
    S_t = diag(w_t) S_{t−1} + k_t v_tᵀ;   o_t = (S_{t−1} + diag(u) k_t v_tᵀ)ᵀ r_t   per head
    5:  w = exp(−exp(decay)), fixed;   y = W_o (GroupNorm(o/8) ⊙ SiLU(W_g x_g))
    6:  w_t = exp(−exp(decay + tanh(x_w A_w) B_w)), and m_c + tanh((x + (x' − x) m_x) A_c) B_c in
        place of m_c;   y = W_o (GroupNorm(o) ⊙ SiLU(W_g x_g))            [arXiv 2404.05892, §3–4]
    channel mixer:  σ(W_r x_r) ⊙ W_v relu(W_k x_k)²

Version 5 writes its mix the other way round, x m + x' (1 − m), and so does this file.
How a layer starts depends on its place in the stack, `layer_id` of `n_layers`.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.decay import (
    ChannelForm,
    HeadNorm,
    at_least_float32,
    channel_decay_chunked,
    channel_decay_step,
    split_heads,
    token_shift,
)
from mad.layers.kernels import compiled, known_kernel
from mad.layers.layer import Layer, State
from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel

# exp(−exp(10)) is zero in double precision too; beyond it exp would overflow.
LARGEST_RATE = 10.0


def depth_ratios(layer_id: int, n_layers: int) -> tuple[float, float]:
    """l/(n − 1) and 1 − l/n of layer l among n."""
    if not 0 <= layer_id < n_layers:
        raise ConfigError(
            f"rwkv: layer_id={layer_id} of n_layers={n_layers}; layers count from 0 to n_layers − 1"
        )
    return layer_id / max(n_layers - 1, 1), 1 - layer_id / n_layers


class _Shifting(Layer):
    """A layer whose every token also sees the one before it."""

    width: int

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Zeros in place of the token before the first."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return {"token": torch.zeros(batch, self.width, device=device, dtype=dtype)}


class _TimeMixer(_Shifting, ABC):
    """What versions 5 and 6 share: projections, bonus, decay, norm, gate and their forms."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        eps: float,
        form: ChannelForm,
        ratios: tuple[float, float],
        kernel: Kernel,
    ) -> None:
        super().__init__()
        if head_dim < 1 or width % head_dim:
            raise ConfigError(
                f"rwkv: width {width} is not a multiple of head_dim={head_dim}; choose a divisor"
            )
        self.width, self.head_dim, self.num_heads = width, head_dim, width // head_dim
        self.form: ChannelForm = form
        self.kernel = known_kernel("rwkv", kernel)
        self.kernels = {"rwkv6": kernel}  # version 5 is version 6 with a decay that stays
        deep, _ = ratios
        place = torch.arange(width) / max(width - 1, 1)
        zigzag = 0.1 * ((torch.arange(width) + 1) % 3 - 1)
        heads = (self.num_heads, head_dim)
        self.decay = nn.Parameter((-6 + 5 * place ** (0.7 + 1.3 * deep)).view(heads))
        self.bonus = nn.Parameter((deep * (1 - place) + zigzag).view(heads))
        self.r, self.k, self.v, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.norm = HeadNorm(width, self.num_heads, eps)
        self.divisor = 1.0

    @abstractmethod
    def _parts(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, ...]:
        """Gate (B, L, d); r, k, v and log decay (B or 1, H, L or 1, e)."""

    def _heads(self, r: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        parts = (self.r(r), self.k(k), self.v(v))
        return at_least_float32(*(split_heads(p, self.num_heads) for p in parts))

    def _log_decay(self, exponent: Tensor) -> Tensor:
        (exponent,) = at_least_float32(exponent)
        return -torch.exp(exponent.clamp_max(LARGEST_RATE))

    def _finish(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.out((self.norm(o / self.divisor) * F.silu(gate)).to(gate.dtype))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Chunks of time as matrix products."""
        gate, r, k, v, g = self._parts(x, token_shift(x))
        fused = compiled("rwkv6", self.kernel, r, x)
        if fused is None:
            g = g.expand(-1, -1, x.shape[1], -1)
            o, _ = channel_decay_chunked(r, k, v, g, self.bonus, form=self.form)
        else:
            o = fused(r, k, v, g, self.bonus)
        return self._finish(o.transpose(1, 2), gate)

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty matrix per head, and zeros in place of the token before the first."""
        state = super().initial_state(batch, device=device, dtype=dtype)
        token = state["token"]
        shape = (batch, self.num_heads, self.head_dim, self.head_dim)
        return state | {"matrix": torch.zeros(shape, device=device, dtype=token.dtype)}

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """The equation for one token."""
        gate, *parts = self._parts(x[:, None], state["token"][:, None].to(x.dtype))
        r, k, v, g = (part[:, :, 0] for part in parts)
        o, matrix = channel_decay_step(r, k, v, g, state["matrix"], self.bonus)
        token = x.to(state["token"].dtype)
        return self._finish(o, gate[:, 0]), {"token": token, "matrix": matrix}

    def state_floats(self, length: int) -> int:
        """e² per head and the last token."""
        return self.matrix_state_floats(length) + self.width

    def matrix_state_floats(self, length: int) -> int:
        """e² per head."""
        del length
        return self.width * self.head_dim

    def mixing_flops_per_token(self, length: int) -> int:
        """Decay, bonus, update and read-out of the recurrent form."""
        return 7 * self.matrix_state_floats(length)


class RWKV5TimeMixer(_TimeMixer):
    """Version 5, fixed decays; par 82 944 and state H·e² + d = 2 048 + 128 at width 128."""

    def __init__(
        self,
        width: int,
        *,
        head_dim: int = 16,
        divisor: float = 8.0,
        form: ChannelForm = "factored",
        kernel: Kernel = "auto",
        layer_id: int = 0,
        n_layers: int = 1,
    ) -> None:
        ratios = deep, early = depth_ratios(layer_id, n_layers)
        super().__init__(width, head_dim, 1e-5, form, ratios, kernel)
        self.divisor = divisor
        ramp = torch.arange(width) / width
        mixes = ramp**early, ramp**early + 0.3 * deep, ramp ** (early / 2), ramp ** (early / 2)
        self.mix = nn.Parameter(torch.stack(mixes))  # k, v, r, g

    def _parts(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, ...]:
        k, v, r, g = (x * m + shifted * (1 - m) for m in self.mix.unbind(0))
        return self.gate(g), *self._heads(r, k, v), self._log_decay(self.decay)[None, :, None]


class RWKV6TimeMixer(_TimeMixer):
    """Version 6, decays and mixes from the input; par 140 544 and state 2 048 + 128."""

    def __init__(
        self,
        width: int,
        *,
        head_dim: int = 16,
        mix_rank: int = 32,
        decay_rank: int = 64,
        form: ChannelForm = "halved",
        kernel: Kernel = "auto",
        layer_id: int = 0,
        n_layers: int = 1,
    ) -> None:
        if mix_rank < 1 or decay_rank < 1:
            raise ConfigError(
                f"rwkv6-time-mixer: mix_rank={mix_rank} and decay_rank={decay_rank} must be at "
                "least 1"
            )
        ratios = deep, early = depth_ratios(layer_id, n_layers)
        super().__init__(width, head_dim, 64e-5, form, ratios, kernel)
        ramp = torch.arange(width) / width
        slow, fast = 1 - ramp**early, 1 - ramp ** (early / 2)
        self.mix_base = nn.Parameter(slow.clone())
        self.mix = nn.Parameter(torch.stack([slow, slow, slow - 0.3 * deep, fast, fast]))  # wkvrg
        self.mix_in = nn.Parameter(torch.empty(width, 5 * mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_out = nn.Parameter(torch.empty(5, mix_rank, width).uniform_(-1e-4, 1e-4))
        self.decay_in = nn.Parameter(torch.empty(width, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_out = nn.Parameter(torch.empty(decay_rank, width).uniform_(-1e-4, 1e-4))

    def _parts(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, ...]:
        delta = shifted - x
        low = torch.tanh((x + delta * self.mix_base) @ self.mix_in).unflatten(-1, (5, -1))
        shares = torch.einsum("blcr,crd->cbld", low, self.mix_out) + self.mix[:, None, None]
        w, k, v, r, g = (x + delta * shares).to(x.dtype).unbind(0)
        exponent = torch.tanh(w @ self.decay_in) @ self.decay_out + self.decay.flatten()
        log_decay = split_heads(self._log_decay(exponent), self.num_heads)
        return self.gate(g), *self._heads(r, k, v), log_decay

    def linear_flops_per_token(self) -> int:
        """Twice the weights of all maps, the low-rank ones among them."""
        maps = (self.mix_in, self.mix_out, self.decay_in, self.decay_out)
        return super().linear_flops_per_token() + 2 * sum(m.numel() for m in maps)


class _ChannelMixer(_Shifting, ABC):
    """σ(W_r x_r) ⊙ W_v relu(W_k x_k)²; par 147 712 and state d at width 128."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        layer_id: int = 0,
        n_layers: int = 1,
    ) -> None:
        super().__init__()
        _, early = depth_ratios(layer_id, n_layers)
        self.width = width
        hidden = 4 * width if hidden is None else hidden
        if hidden < 1:
            raise ConfigError(f"rwkv channel mixer: hidden={hidden}; it must be at least 1")
        self.mix = nn.Parameter((torch.arange(width) / width).pow(early).repeat(2, 1))  # k, r
        self.k, self.v = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.r = nn.Linear(width, width, bias=False)

    @abstractmethod
    def _mixed(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
        """What the key and the gate see."""

    def _mix(self, x: Tensor, shifted: Tensor) -> Tensor:
        k, r = self._mixed(x, shifted)
        return torch.sigmoid(self.r(r)) * self.v(F.relu(self.k(k)).square())

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Every token with the one before it."""
        return self._mix(x, token_shift(x))

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token with the one that the state holds."""
        token = state["token"]
        return self._mix(x, token.to(x.dtype)), {"token": x.to(token.dtype)}

    def state_floats(self, length: int) -> int:
        """The last token."""
        del length
        return self.width

    def matrix_state_floats(self, length: int) -> int:
        """None: a shifted token does not count."""
        del length
        return 0


class RWKV5ChannelMixer(_ChannelMixer):
    """Version 5: x m + x' (1 − m)."""

    def _mixed(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
        k, r = (x * m + shifted * (1 - m) for m in self.mix.unbind(0))
        return k, r


class RWKV6ChannelMixer(_ChannelMixer):
    """Version 6: x + (x' − x) m, with m starting at one minus that of version 5."""

    def __init__(
        self, width: int, *, hidden: int | None = None, layer_id: int = 0, n_layers: int = 1
    ) -> None:
        super().__init__(width, hidden=hidden, layer_id=layer_id, n_layers=n_layers)
        self.mix = nn.Parameter(1 - self.mix.detach())

    def _mixed(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
        k, r = (x + (shifted - x) * m for m in self.mix.unbind(0))
        return k, r
