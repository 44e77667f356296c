"""Softmax attention: full and in a sliding window, with shared key heads, positions of four kinds.

    o_i = Σ_{j ≤ i} softmax_j(s q_i·k_j − m_h (i − j)) v_j    [Vaswani et al. 2017, eq. 1]
    q, k rotated by position                                  [RoFormer, arXiv 2104.09864, eq. 34]
    pair n of q_i·k_j times ζ_n^((i − j)/512)                 [xPos, arXiv 2212.10554, table 1]
    m_h = 2^(−8h/H), h = 1 … H                                [ALiBi, arXiv 2108.12409, §3]
    x ← x + conv(x) before (A), p ← p + conv(p) after (B) the projection p = (q, k, v)   [Canon]
    several query heads read one key head                     [arXiv 1911.02150, 2305.13245]

Glossary: d width, H heads, G ≤ H key heads, e = d/H head width, w window, L time.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mad.layers.convolution import convolve_short, convolve_short_step, short_taps
from mad.layers.layer import Layer, State, head_width
from workbench import engines
from workbench.errors import ConfigError

Backend = Literal["auto", "sdpa", "flash", "eager"]
XPOS_DISTANCE = 512.0
"""Distance over which xPos multiplies a pair by its ζ."""


def rotate(
    x: Float[Tensor, "batch heads time head"],
    rotary_dim: int,
    base: float = 10000.0,
    *,
    interleaved: bool = False,
    position: Int[Tensor, " time"] | None = None,
) -> Float[Tensor, "batch heads time head"]:
    """`x` with its first `rotary_dim` dimensions turned by angles t · base^(−2i/rotary_dim).

    Pairs are (i, i + rotary_dim/2), the half-split layout, or (2i, 2i + 1) when `interleaved`.
    Positions are 0, 1, … unless given. Angles are computed in float32 at least.
    """
    if rotary_dim == 0:
        return x
    half = rotary_dim // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    if position is None:
        position = torch.arange(x.shape[2], device=x.device)
    index = torch.arange(half, device=x.device, dtype=wide)
    angle = position.to(wide)[..., None] * base ** (-index / half)  # (L, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        first, second = turned.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = turned.chunk(2, dim=-1)
    pairs = [first * cos - second * sin, first * sin + second * cos]
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def xpos_decay(
    distance: Float[Tensor, " time"], rotary_dim: int, head: int, *, interleaved: bool = False
) -> Float[Tensor, "time head"]:
    """ζ_n^(distance/512), ζ_n = (2n/r + 0.4)/1.4 for pair n of r rotated dimensions, else 1."""
    index = torch.arange(rotary_dim // 2, device=distance.device, dtype=distance.dtype)
    zeta = (2 * index / max(rotary_dim, 1) + 0.4) / 1.4
    zeta = zeta.repeat_interleave(2) if interleaved else zeta.repeat(2)
    zeta = F.pad(zeta, (0, head - rotary_dim), value=1.0)
    return zeta ** (distance[:, None] / XPOS_DISTANCE)


def alibi_slopes(heads: int, device: torch.device | None = None) -> Float[Tensor, " heads"]:
    """m_h = 2^(−8h/H), h = 1 … H."""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))


def causal_window(
    length: int, window: int | None, device: torch.device
) -> Bool[Tensor, "time time"]:
    """True where position i (row) may attend to j: i − window ≤ j ≤ i."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed if window is None else allowed.triu(-window)


def score_bias(
    length: int, window: int | None, slopes: Float[Tensor, " heads"] | None, like: Tensor
) -> Float[Tensor, "*heads time time"]:
    """What is added to the scores: −∞ outside the window, −m_h (i − j) within it."""
    allowed = causal_window(length, window, like.device)
    index = torch.arange(length, device=like.device, dtype=like.dtype)
    distance = index[:, None] - index  # (L, L)
    bias = 0 * distance if slopes is None else -slopes[:, None, None].to(like.dtype) * distance
    return bias.masked_fill(~allowed, -torch.inf)


def attend_eager(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch key_heads time head"],
    v: Float[Tensor, "batch key_heads time head"],
    window: int | None = None,
    *,
    scale: float | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads time head"]:
    """Causal softmax attention written out: the reference. The scale is 1/√e unless given."""
    k, v = (_share(part, q.shape[1]) for part in (k, v))
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    scores = scale * (q @ k.transpose(-1, -2))  # (B, H, L, L)
    return (scores + score_bias(q.shape[2], window, slopes, scores)).softmax(dim=-1) @ v


def attend_sdpa(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch key_heads time head"],
    v: Float[Tensor, "batch key_heads time head"],
    window: int | None = None,
    *,
    scale: float | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads time head"]:
    """The same through torch's fused kernel: no (L, L) scores are kept for the backward pass."""
    k, v = (_share(part, q.shape[1]) for part in (k, v))
    length = q.shape[2]
    if slopes is not None:
        bias = score_bias(length, window, slopes, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if window is None or window >= length - 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    allowed = causal_window(length, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def attend_flash(
    q: Float[Tensor, "batch heads time head"],
    k: Float[Tensor, "batch key_heads time head"],
    v: Float[Tensor, "batch key_heads time head"],
    window: int | None = None,
    *,
    scale: float | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads time head"]:
    """The same by the package flash-attn: windows and slopes cost no mask. Half precision, CUDA."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"attention: backend=flash got {q.dtype}; it computes in float16 or bfloat16: "
            "train with --dtype bfloat16 or choose backend=sdpa"
        )
    flash = engines.need("flash-attn", feature="attention backend=flash")
    mixed = flash.flash_attn_func(
        *(part.transpose(1, 2) for part in (q, k, v)),  # (B, L, H, e)
        causal=True,
        softmax_scale=scale,
        window_size=(-1, -1) if window is None else (window, 0),
        alibi_slopes=None if slopes is None else slopes.float(),
    )
    return mixed.transpose(1, 2)


def attend_step(
    q: Float[Tensor, "batch heads head"],
    k: Float[Tensor, "batch key_heads time head"],
    v: Float[Tensor, "batch key_heads time head"],
    *,
    scale: float | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads head"]:
    """One query over all the keys given, the last of which is its own position."""
    k, v = (_share(part, q.shape[1]) for part in (k, v))
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    scores = scale * (k @ q[..., None]).squeeze(-1)  # (B, H, t)
    if slopes is not None:
        distance = torch.arange(k.shape[2] - 1, -1, -1, device=q.device, dtype=scores.dtype)
        scores = scores - slopes[:, None].to(scores.dtype) * distance
    return (scores.softmax(dim=-1)[:, :, None].to(v.dtype) @ v).squeeze(2)


def _share(part: Tensor, heads: int) -> Tensor:
    """Key heads repeated so that query heads H·i/G … read key head i."""
    return part if part.shape[1] == heads else part.repeat_interleave(heads // part.shape[1], dim=1)


def pick_backend(q: Tensor, *, masked: bool) -> Literal["sdpa", "flash", "eager"]:
    """What `backend=auto` takes for these queries.

    flash-attn where it is installed and spares a mask (`masked`: a window or slopes); written out
    under transforms of `torch.func` on the CPU, whose fused kernel vmap cannot batch; else torch's.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.is_cuda and half and masked and q.shape[-1] <= 256 and engines.available("flash-attn"):
        return "flash"
    if not q.is_cuda and torch._C._functorch.is_functorch_wrapped_tensor(q):
        return "eager"
    return "sdpa"


class Attention(Layer):
    """Multi-head softmax attention; par 4d² + 4d with G = H, state 2·G·e·min(L, w + 1).

    The state is the cache of rotated keys and values, (batch, G, seen, e), and the position, an
    integer that does not count. Convolutions carry their last inputs too: `canon` a those of x,
    canon b and `dwconv` (a plain filter of width 3 on the projections) those of q, k and v.
    """

    def __init__(  # noqa: PLR0913  (one keyword per option)
        self,
        width: int,
        *,
        num_heads: int = 1,
        num_heads_kv: int | None = None,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        xpos: bool = False,
        alibi: bool = False,
        softmax_scale: float | None = None,
        window: int | None = None,
        dwconv: bool = False,
        canon: Literal["none", "a", "b", "ab"] = "none",
        canon_taps: int = 4,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        head = head_width(width, num_heads, "attention")
        shared = num_heads if num_heads_kv is None else num_heads_kv
        if shared < 1 or num_heads % shared:
            raise ConfigError(
                f"attention: num_heads={num_heads} is not divisible by num_heads_kv={shared}; "
                "every key head serves the same number of query heads"
            )
        if rotary_dim is None:
            rotary_dim = 0 if alibi else head - head % 2
        if rotary_dim % 2 or not 0 <= rotary_dim <= head:
            raise ConfigError(
                f"attention: rotary_dim={rotary_dim} must be even and at most the head width {head}"
            )
        if xpos and not rotary_dim:
            raise ConfigError("attention: xpos scales rotated pairs, but rotary_dim is 0")
        if window is not None and window < 0:
            raise ConfigError(f"attention: window={window} is negative; none means no window")
        if backend not in ("auto", "sdpa", "flash", "eager"):
            raise ConfigError(
                f"attention: backend={backend!r}; expected auto, sdpa, flash or eager"
            )
        if canon not in ("none", "a", "b", "ab"):
            raise ConfigError(f"attention: canon={canon!r}; expected none, a, b or ab")
        if canon_taps < 2:
            raise ConfigError(
                f"attention: canon_taps={canon_taps} sees no other position; use 2 or more"
            )
        self.width, self.head, self.window = width, head, window
        self.num_heads, self.num_heads_kv = num_heads, shared
        self.rotary_dim, self.rotary_interleaved, self.xpos = rotary_dim, rotary_interleaved, xpos
        self.softmax_scale, self.alibi, self.backend = softmax_scale, alibi, backend
        self.qkv = nn.Linear(width, (num_heads + 2 * shared) * head, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        projected = self.qkv.out_features
        self.before = short_taps(canon_taps, width) if canon in ("a", "ab") else None
        self.taps = short_taps(3, projected) if dwconv else None
        self.after = short_taps(canon_taps, projected) if canon in ("b", "ab") else None

    # ------------------------------------------------------------ parallel

    def project(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time qkv"]:
        """Queries, keys and values side by side, with the convolutions at their points."""
        if self.before is not None:
            x = x + convolve_short(x, self.before)
        p = self.qkv(x)
        if self.taps is not None:
            p = convolve_short(p, self.taps)
        return p if self.after is None else p + convolve_short(p, self.after)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Attention over the past of each position."""
        length = x.shape[1]
        q, k, v = self._heads(self.project(x))  # (B, H | G | G, L, e)
        q, k = (self._turn(part) for part in (q, k))
        if self.xpos:
            wide = torch.promote_types(q.dtype, torch.float32)
            index = torch.arange(length, device=x.device, dtype=wide) - length // 2
            decay = self._decay(index)  # centred, so that neither factor grows large
            q, k = q * decay.to(q.dtype), k / decay.to(k.dtype)
        slopes = alibi_slopes(self.num_heads, x.device) if self.alibi else None
        backend = self.backend
        if backend == "auto":
            backend = pick_backend(q, masked=self.alibi or self.window is not None)
        attend = {"eager": attend_eager, "sdpa": attend_sdpa, "flash": attend_flash}[backend]
        mixed = attend(q, k, v, self.window, scale=self.softmax_scale, slopes=slopes)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, p: Float[Tensor, "batch time qkv"]) -> tuple[Tensor, Tensor, Tensor]:
        heads = p.unflatten(-1, (-1, self.head)).transpose(1, 2)  # (B, H + 2G, L, e)
        groups = (self.num_heads, self.num_heads_kv, self.num_heads_kv)
        q, k, v = heads.split(groups, dim=1)
        return q, k, v

    def _turn(self, part: Tensor, position: Tensor | None = None) -> Tensor:
        return rotate(part, self.rotary_dim, interleaved=self.rotary_interleaved, position=position)

    def _decay(self, distance: Tensor) -> Tensor:
        return xpos_decay(distance, self.rotary_dim, self.head, interleaved=self.rotary_interleaved)

    # ------------------------------------------------------------ one token

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty cache at position 0."""
        like = {"device": device, "dtype": dtype or self.qkv.weight.dtype}
        state = {
            "keys": torch.zeros(batch, self.num_heads_kv, 0, self.head, **like),
            "values": torch.zeros(batch, self.num_heads_kv, 0, self.head, **like),
            "position": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        for name, taps in self._convolutions():
            state[name] = torch.zeros(batch, taps.shape[0] - 1, taps.shape[1], **like)
        return state

    def project_step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch qkv"], State]:
        """`project` for one token, and what its convolutions carry on."""
        carried: State = {}
        if self.before is not None:
            y, carried["before"] = convolve_short_step(x, state["before"], self.before)
            x = x + y
        p = self.qkv(x)
        if self.taps is not None:
            p, carried["taps"] = convolve_short_step(p, state["taps"], self.taps)
        if self.after is not None:
            y, carried["after"] = convolve_short_step(p, state["after"], self.after)
            p = p + y
        return p, carried

    def _convolutions(self) -> list[tuple[str, Tensor]]:
        named = (("before", self.before), ("taps", self.taps), ("after", self.after))
        return [(name, taps) for name, taps in named if taps is not None]

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token: its query over the cache, to which its key and value are added."""
        p, carried = self.project_step(x, state)
        q, k, v = self._heads(p[:, None])  # (B, H | G | G, 1, e)
        # sequences of a batch may stand at different positions, so time takes the batch's place
        q, k = (
            self._turn(part.transpose(0, 2), state["position"]).transpose(0, 2) for part in (q, k)
        )
        first = 0 if self.window is None else -(self.window + 1)
        keys = torch.cat([state["keys"], k], dim=2)[:, :, first:]
        values = torch.cat([state["values"], v], dim=2)[:, :, first:]
        read = keys
        if self.xpos:
            wide = torch.promote_types(keys.dtype, torch.float32)
            age = torch.arange(keys.shape[2] - 1, -1, -1, device=x.device, dtype=wide)
            read = keys * self._decay(age).to(keys.dtype)
        slopes = alibi_slopes(self.num_heads, x.device) if self.alibi else None
        mixed = attend_step(q[:, :, 0], read, values, scale=self.softmax_scale, slopes=slopes)
        state = {"keys": keys, "values": values, "position": state["position"] + 1} | carried
        return self.out(mixed.flatten(1)), state

    # ------------------------------------------------------------ cost

    def _reach(self, length: int) -> int:
        return length if self.window is None else min(length, self.window + 1)

    def state_floats(self, length: int) -> int:
        """Keys and values of the positions in reach, and the inputs that convolutions carry."""
        carried = sum((taps.shape[0] - 1) * taps.shape[1] for _, taps in self._convolutions())
        return self.matrix_state_floats(length) + carried

    def matrix_state_floats(self, length: int) -> int:
        """Keys and values of the positions in reach."""
        return 2 * self.num_heads_kv * self.head * self._reach(length)

    def kv_bytes(self, length: int) -> int:
        """The cache at two bytes per number."""
        return 2 * self.matrix_state_floats(length)

    def mixing_flops_per_token(self, length: int) -> int:
        """Scores and weighted sum over the keys in reach, averaged over positions."""
        reach = self._reach(length)
        keys = reach - reach * (reach - 1) / (2 * length)  # mean of min(i + 1, reach)
        convolved = sum(2 * taps.numel() for _, taps in self._convolutions())
        return round(4 * self.width * keys) + convolved
