"""Recurrences over a matrix state that decays, and the small parts their layers share.

Axes:  batch B, heads H, time L, features f of keys and queries, head e of values.

    channel decay   S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ,  o_t = S_tᵀ q_t    g_t ≤ 0 per feature
    with a bonus    o_t = (S_{t−1} + diag(u) k_t v_tᵀ)ᵀ q_t,  then the same update

in two forms: `…_recurrent`, the equation in a loop, and `…_chunked`, where the steps of a chunk
become matrix products and a loop carries S over the chunks. [arXiv 2312.06635, §4]

A pair i > j weighs q_i k_j exp(g_{j+1} + … + g_i). That sum splits into one from j to some border
and one from the border to i, so that a chunk is matrix products:

    halved    a chunk is halved again and again, and keys of a first half meet queries of the second
              at the border between them: no exponent is ever positive, no difference of sums is
              taken, and nothing overflows or cancels whatever g is, −∞ included
    factored  one border for all, at the middle of a short chunk: less work, but exponents of both
              signs; so that none overflows, a step forgets at most e^−20 in single precision and
              e^−42 in double, which is below their rounding
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.convolution import convolve_compiled
from workbench.integrations.kernels import Kernel

ChannelForm = Literal["factored", "halved"]

# Steps of a chunk, powers of two. Half a factored one forgets e^−80, near the end of the range.
CHUNK_STEPS = {"factored": 8, "halved": 16}
LARGEST_LOSS = {torch.float32: -20.0, torch.float64: -42.0}


# ---------------------------------------------------------------- shared parts


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in single precision, or in their own where that is finer."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which matrix products keep the precision of their operands."""
    return torch.autocast(x.device.type, enabled=False)


def token_shift(x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
    """x moved one position later, zeros at the first."""
    return F.pad(x[:, :-1], (0, 0, 1, 0))


class ShortConvolution(nn.Module):
    """y_t = SiLU(b + Σ_j w_j ⊙ x_{t−n+1+j}): a causal filter of n taps per channel."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = taps**-0.5
        self.taps = nn.Parameter(torch.empty(taps, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self, x: Float[Tensor, "batch time channels"], kernel: Kernel = "reference"
    ) -> Float[Tensor, "batch time channels"]:
        """SiLU of the filtered sequence."""
        y = convolve_compiled(x, self.taps, self.bias, silu=True, kernel=kernel)
        if y is not None:
            return y
        n, length = len(self.taps), x.shape[1]
        x = F.pad(x, (0, 0, n - 1, 0))
        y = self.bias
        for j, tap in enumerate(self.taps.unbind(0)):
            y = y + tap * x[:, j : j + length]
        return F.silu(y)

    def step(
        self, x: Float[Tensor, "batch channels"], past: Float[Tensor, "batch taps channels"]
    ) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch taps channels"]]:
        """SiLU at one position from the last taps − 1 inputs, and the inputs the next one needs."""
        window = torch.cat([past, x[:, None].to(past.dtype)], dim=1)
        y = self.bias + (self.taps * window).sum(1)
        return F.silu(y.to(x.dtype)), window[:, 1:]


class HeadNorm(nn.Module):
    """Each head normalised for itself, then scaled (and shifted) per channel."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*axes heads head"]) -> Float[Tensor, "*axes width"]:
        """Group normalisation with one group per head; the heads come out side by side."""
        (x,) = at_least_float32(x)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight + self.bias


def split_heads(
    x: Float[Tensor, "batch time width"], num_heads: int
) -> Float[Tensor, "batch heads time head"]:
    """Channels to heads."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _chunks(x: Tensor, steps: int) -> Tensor:
    """(B, H, L, …) → (B, H, chunks, steps, …), with zeros after the end."""
    pad = -x.shape[2] % steps
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, pad)).unflatten(2, (-1, steps))


def _carry(
    state: Tensor, kept: Float[Tensor, "B H chunks f"], added: Float[Tensor, "B H chunks f e"]
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, (B, H, chunks, f, e), and the one after the last."""
    before = []
    for a, x in zip(kept.unsqueeze(-1).unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(x, a, state)
    return torch.stack(before, dim=2), state


def _first(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    if state is not None:
        return state
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


# ---------------------------------------------------------------- one decay per channel


def channel_decay_recurrent(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    g: Float[Tensor, "batch heads time features"],
    bonus: Float[Tensor, "heads features"] | None = None,
    state: Float[Tensor, "batch heads features head"] | None = None,
) -> tuple[Float[Tensor, "batch heads time head"], Float[Tensor, "batch heads features head"]]:
    """Outputs and the last state, one step after another."""
    state, outputs = _first(state, k, v), []
    for t in range(q.shape[2]):
        o, state = channel_decay_step(q[:, :, t], k[:, :, t], v[:, :, t], g[:, :, t], state, bonus)
        outputs.append(o)
    return torch.stack(outputs, dim=2), state


def channel_decay_step(
    q: Float[Tensor, "batch heads features"],
    k: Float[Tensor, "batch heads features"],
    v: Float[Tensor, "batch heads head"],
    g: Float[Tensor, "#batch heads #features"],
    state: Float[Tensor, "batch heads features head"],
    bonus: Float[Tensor, "heads features"] | None = None,
) -> tuple[Float[Tensor, "batch heads head"], Float[Tensor, "batch heads features head"]]:
    """One step of the equation."""
    new = k[..., :, None] * v[..., None, :]
    after = torch.exp(g)[..., None] * state + new
    seen = after if bonus is None else state + bonus[..., None] * new
    return (q[..., None, :] @ seen).squeeze(-2), after


def channel_decay_chunked(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    g: Float[Tensor, "#batch heads time features"],
    bonus: Float[Tensor, "heads features"] | None = None,
    state: Float[Tensor, "batch heads features head"] | None = None,
    form: ChannelForm = "halved",
) -> tuple[Float[Tensor, "batch heads time head"], Float[Tensor, "batch heads features head"]]:
    """Outputs and the last state, a chunk at a time, in single precision or finer."""
    q, k, v, g = at_least_float32(q, k, v, g)
    with no_autocast(q):
        length = q.shape[2]
        steps = min(CHUNK_STEPS[form], 1 << (length - 1).bit_length())
        inside_chunks = _factored if form == "factored" else _halved
        q, k, v, g = (_chunks(x, steps) for x in (q, k, v, g))  # padding: adds 0 and keeps all
        inside, entered, left, whole = inside_chunks(q, k, v, g, bonus)
        added = (k * left.exp()).transpose(-1, -2) @ v
        before, state = _carry(_first(state, k, v), whole.exp(), added)
        across = (q * entered.exp()) @ before
        return (inside + across).flatten(2, 3)[:, :, :length], state


def _factored(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_halved` returns, with one border at the middle of the chunk."""
    steps = q.shape[3]
    g = g.clamp_min(LARGEST_LOSS[g.dtype])
    total = g.cumsum(dim=3)  # (B, H, C, c, f)
    entered = total if bonus is None else total - g
    middle = total[:, :, :, steps // 2 : steps // 2 + 1]
    scores = (q * (entered - middle).exp()) @ (k * (middle - total).exp()).transpose(-1, -2)
    until = 0 if bonus is None else -1  # a query sees keys up to itself, or before itself
    mask = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril(until)
    out = scores.masked_fill(~mask, 0) @ v
    if bonus is not None:
        out = out + (q * k * bonus[:, None, None]).sum(-1, keepdim=True) * v
    whole = total[:, :, :, -1:]
    return out, entered, whole - total, whole.squeeze(3)


def _halved(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What queries read from keys of their own chunk, (B, H, C, c, e), and the sums of g.

    From the start of the chunk to a query, from a key to the end, and over the whole chunk.
    """
    steps = q.shape[3]
    own = q * k if bonus is None else q * k * bonus[:, None, None]
    # blocks of 1, 2, 4, … steps: (B, H, C, blocks, steps of a block, ·)
    out = (own.sum(-1, keepdim=True) * v).unsqueeze(4)
    entered = (g if bonus is None else torch.zeros_like(g)).unsqueeze(4)
    left, whole = torch.zeros_like(entered), g.unsqueeze(4)
    size = 1
    while size < steps:
        pairs = (x.unflatten(3, (-1, 2)).unbind(4) for x in (out, entered, left, whole))
        (out_a, out_b), (entered_a, entered_b), (left_a, left_b), (whole_a, whole_b) = pairs
        q_b = q.unflatten(3, (-1, 2, size))[:, :, :, :, 1] * entered_b.exp()
        k_a = k.unflatten(3, (-1, 2, size))[:, :, :, :, 0] * left_a.exp()
        v_a = v.unflatten(3, (-1, 2, size))[:, :, :, :, 0]
        if size == 1:  # the product of one query and one key is a sum
            read = (q_b * k_a).sum(-1, keepdim=True) * v_a
        else:
            read = (q_b @ k_a.transpose(-1, -2)) @ v_a
        out = torch.cat([out_a, out_b + read], dim=4)
        entered = torch.cat([entered_a, entered_b + whole_a], dim=4)
        left = torch.cat([left_a + whole_b, left_b], dim=4)
        whole = whole_a + whole_b
        size *= 2
    return out.squeeze(3), entered.squeeze(3), left.squeeze(3), whole.flatten(3)
