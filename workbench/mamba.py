"""Selective scans in plain PyTorch, fast without CUDA, and a hook that lends them to transformers.

The recurrence of both Mamba generations, per channel d (or head h) and state n:

    h_t = a_t · h_{t-1} + x_t          y_t = ⟨h_t, C_t⟩

    Mamba    a_t = exp(Δ_t A), x_t = Δ_t u_t B_t, A diagonal per channel     [Mamba, eq. 2, Alg. 2]
    Mamba-2  the same with one scalar A per head of P channels, so that a
             chunk of Q steps becomes matrix products                [Mamba-2 (SSD), §6, Listing 1]

Names:  u inputs · delta step sizes Δ > 0 · A ≤ 0 · B input and C output maps
Axes:   batch, time, width, state, heads, channels (per head), groups (of heads that share B and C)

Three forms of one computation, chosen by `kernel`:

    reference   one step after another, indexed as in the papers: what the others are tested against
    unbind      the time axis is unbound once and each step is one `addcmul`: autograd then never
                writes a full-size zero tensor per step, which makes the indexed form quadratic
    fused       a hand-written backward: blocks of time stay in cache, only the states at the block
                borders are stored, and the backward recomputes the rest

No form divides by a product of decays, which underflows for fast channels.

transformers' own CPU path indexes the time axis inside its loop, and its Mamba-1 drops the carried
state when several tokens continue a cached sequence.  `with fast_mamba():` repairs both while the
block runs.
"""

from __future__ import annotations

import importlib
import inspect
import math
import threading
import warnings
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from workbench.errors import ConfigError

Kernel = Literal["auto", "reference", "unbind", "fused"]

# States in a block of time, at most: 0.5 MB in fp32, so that the block stays in a core's cache.
BLOCK_NUMBERS = 131_072
# Steps per chunk of the Mamba-2 form; 16, 32 and 64 took the same time within 10 %.
CHUNK_STEPS = 32


# ── the recurrence itself ────────────────────────────────────────────────────────────────────────


def linear_scan(
    decay: Float[Tensor, "batch time width state"],
    inputs: Float[Tensor, "batch time width state"],
    initial: Float[Tensor, "batch width state"] | None = None,
    kernel: Literal["reference", "unbind"] = "unbind",
) -> Float[Tensor, "batch time width state"]:
    """All states h_1 … h_T of h_t = a_t ⊙ h_{t-1} + x_t, from h_0 = `initial` or zero."""
    if decay.shape != inputs.shape or decay.shape[1] == 0:
        raise ConfigError(
            f"linear_scan: decay {tuple(decay.shape)} and inputs {tuple(inputs.shape)} must have "
            "one shape (batch, time ≥ 1, width, state)."
        )
    state = torch.zeros_like(inputs[:, 0]) if initial is None else initial
    states = []
    if kernel == "reference":
        for t in range(inputs.shape[1]):
            state = decay[:, t] * state + inputs[:, t]
            states.append(state)
    else:
        for a, x in zip(decay.unbind(1), inputs.unbind(1), strict=True):
            state = torch.addcmul(x, a, state)
            states.append(state)
    return torch.stack(states, dim=1)


def selective_scan(
    u: Float[Tensor, "batch time width"],
    delta: Float[Tensor, "batch time width"],
    A: Float[Tensor, "width state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    initial: Float[Tensor, "batch width state"] | None = None,
    kernel: Kernel = "auto",
) -> tuple[Float[Tensor, "batch time width"], Float[Tensor, "batch width state"]]:
    """Outputs y_1 … y_T and the last state of a Mamba-1 layer's recurrence.

    h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t u_t) B_tᵀ,   y_t = h_t C_t   [Mamba, eq. 2, Alg. 2]

    The skip D·u_t and the gate are left to the caller.  `kernel="auto"` is "fused": its forward
    and backward take .73 of the time of "unbind" at batch 4 and width 256, .27 at batch 8 and width
    320, where the states no longer fit the cache (256 steps; benchmarks/mamba/scan_forms.py).
    """
    if u.shape != delta.shape or B.shape != C.shape or u.shape[1] == 0:
        raise ConfigError(
            f"selective_scan: u {tuple(u.shape)} and delta {tuple(delta.shape)} must have one "
            f"shape (batch, time ≥ 1, width), B {tuple(B.shape)} and C {tuple(C.shape)} one "
            "(batch, time, state)."
        )
    if initial is None:
        initial = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    if kernel in ("auto", "fused"):
        y, last, _ = _FusedScan.apply(u, delta, A, B, C, initial)  # pyright: ignore[reportGeneralTypeIssues]
        return y, last
    decay = torch.exp(delta[..., None] * A)
    inputs = (delta * u)[..., None] * B[:, :, None, :]
    states = linear_scan(decay, inputs, initial, "reference" if kernel == "reference" else "unbind")
    return torch.einsum("btdn,btn->btd", states, C), states[:, -1]


def _block_steps(batch: int, width: int, state: int) -> int:
    return max(1, min(64, BLOCK_NUMBERS // (batch * width * state)))


class _FusedScan(torch.autograd.Function):
    """`selective_scan` with a backward of its own: (y, last state, states at the block borders).

    Everything is time-major and has the width last, (time, batch, state, width), so that one step
    is one contiguous slab. A is (width, state), or (batch, width, state) where `torch.func.vmap`
    folds its axis into the batch, so that a stack of models costs one scan and not one per model.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, width = u.shape
        state = A.shape[-1]
        steps = math.ceil(time / math.ceil(time / _block_steps(batch, width, state)))
        u_t, delta_t, B_t, C_t = (v.transpose(0, 1).contiguous() for v in (u, delta, B, C))
        scaled = delta_t * u_t
        A_t = A.transpose(-1, -2).contiguous()
        h = initial.transpose(1, 2).contiguous()
        y = torch.empty_like(u_t)
        borders = h.new_empty(math.ceil(time / steps), *h.shape)
        for index, start in enumerate(range(0, time, steps)):
            block = slice(start, min(start + steps, time))
            borders[index] = h
            _, states = _block_states(delta_t[block], scaled[block], A_t, B_t[block], h)
            torch.matmul(C_t[block, :, None, :], states, out=y[block].unsqueeze(2))
            h = states[-1].clone()
        return y.transpose(0, 1), h.transpose(1, 2).contiguous(), borders

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:5], output[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _FusedScanBackward.apply(*gradients[:2], *ctx.saved_tensors)  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = info.batch_size
        u, delta, B, C, initial = (_fold(tensors[i], in_dims[i], n, 0) for i in (0, 1, 3, 4, 5))
        A, _ = _fold_decay(tensors[2], in_dims[2], n, u.shape[0] // n)
        y, last, borders = _FusedScan.apply(u, delta, A, B, C, initial)  # pyright: ignore[reportGeneralTypeIssues]
        unfolded = (y.unflatten(0, (n, -1)), last.unflatten(0, (n, -1)))
        return (*unfolded, borders.unflatten(1, (n, -1))), (0, 0, 1)


class _FusedScanBackward(torch.autograd.Function):
    """The gradients of `_FusedScan`.  With G_t = ∂loss/∂h_t:

    G_t = gy_t C_tᵀ + a_{t+1} ⊙ G_{t+1}
    gC_t = h_tᵀ gy_t     gB_t = G_tᵀ (Δ_t u_t)     g(Δu)_t = G_t B_t
    g(Δ_t A) = G_t ⊙ h_{t-1} ⊙ a_t, times A summed over n for Δ, times Δ summed over t for A
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        gy: Tensor,
        carried: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        borders: Tensor,
    ) -> tuple[Tensor, ...]:
        time, steps = u.shape[1], math.ceil(u.shape[1] / borders.shape[0])
        gy, u, delta, B, C = (v.transpose(0, 1).contiguous() for v in (gy, u, delta, B, C))
        carried = carried.transpose(1, 2).contiguous()  # a_{t+1} ⊙ G_{t+1}, so far
        A = A.transpose(-1, -2).contiguous()
        scaled = delta * u
        g_scaled, g_delta = torch.empty_like(u), torch.empty_like(u)
        gA, gB, gC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        for index in reversed(range(len(borders))):
            block = slice(index * steps, min((index + 1) * steps, time))
            decay, states = _block_states(delta[block], scaled[block], A, B[block], borders[index])
            G = C[block].unsqueeze(-1) * gy[block].unsqueeze(2)
            slabs, decays = G.unbind(0), decay.unbind(0)
            slabs[-1].add_(carried)
            for t in range(len(slabs) - 1, 0, -1):
                slabs[t - 1].addcmul_(decays[t], slabs[t])
            carried = decays[0] * slabs[0]
            torch.matmul(states, gy[block].unsqueeze(-1), out=gC[block].unsqueeze(-1))
            torch.matmul(G, scaled[block].unsqueeze(-1), out=gB[block].unsqueeze(-1))
            torch.matmul(B[block].unsqueeze(2), G, out=g_scaled[block].unsqueeze(2))
            G.mul_(decay)
            G[0].mul_(borders[index])
            G[1:].mul_(states[:-1])  # now g(Δ_t A)
            torch.sum(G * A, dim=2, out=g_delta[block])
            gA += G.mul_(delta[block].unsqueeze(2)).sum((0, 1) if A.ndim == 2 else 0)
        g_delta.addcmul_(g_scaled, u)
        gu = g_scaled.mul_(delta)
        gu, g_delta, gB, gC = (v.transpose(0, 1) for v in (gu, g_delta, gB, gC))
        return gu, g_delta, gA.transpose(-1, -2), gB, gC, carried.transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError(
            "selective_scan: the fused form has no second derivative; use kernel='unbind'."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = info.batch_size
        gy, carried, u, delta, B, C = (
            _fold(tensors[i], in_dims[i], n, 0) for i in (0, 1, 2, 3, 5, 6)
        )
        A, shared = _fold_decay(tensors[4], in_dims[4], n, u.shape[0] // n)
        borders = _fold(tensors[7], in_dims[7], n, 1)
        found = _FusedScanBackward.apply(gy, carried, u, delta, A, B, C, borders)
        gradients = [g.unflatten(0, (n, -1)) for g in found]  # pyright: ignore[reportOptionalIterable]
        if shared:
            gradients[2] = gradients[2].sum(1)
        return tuple(gradients), (0,) * 6


def _fold(tensor: Tensor, dim: int | None, n: int, batch: int) -> Tensor:
    """The axis `dim` that vmap adds (none: repeat n times) folded into the batch axis."""
    if dim is None:
        tensor = tensor.unsqueeze(batch)
        tensor = tensor.expand(*tensor.shape[:batch], n, *tensor.shape[batch + 1 :])
    else:
        tensor = tensor.movedim(dim, batch)
    return tensor.flatten(batch, batch + 1)


def _fold_decay(A: Tensor, dim: int | None, n: int, batch: int) -> tuple[Tensor, bool]:
    """A for every row of the folded batch, and whether a model's rows shared one A before."""
    shared = A.ndim - (dim is not None) == 2
    if not shared:
        return _fold(A, dim, n, 0), False
    A = A.expand(n, *A.shape) if dim is None else A.movedim(dim, 0)
    return A.unsqueeze(1).expand(-1, batch, -1, -1).flatten(0, 1), True


def _block_states(
    delta: Tensor, scaled: Tensor, A: Tensor, B: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states of one block of time, both (time, batch, state, width)."""
    decay = (delta.unsqueeze(2) * A).exp_()
    states = B.unsqueeze(-1) * scaled.unsqueeze(2)
    for a, x in zip(decay.unbind(0), states.unbind(0), strict=True):
        h = x.addcmul_(a, h)  # in place: the input becomes the state
    return decay, states


# ── Mamba-2: the same recurrence with one decay per head ─────────────────────────────────────────


def chunked_scan(
    u: Float[Tensor, "batch time heads channels"],
    delta: Float[Tensor, "batch time heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
    initial: Float[Tensor, "batch heads channels state"] | None = None,
    kernel: Literal["auto", "reference", "chunked"] = "auto",
    chunk: int = CHUNK_STEPS,
) -> tuple[Float[Tensor, "batch time heads channels"], Float[Tensor, "batch heads channels state"]]:
    """Outputs and last state of a Mamba-2 layer's recurrence.

    S_t = exp(Δ_t A) S_{t-1} + Δ_t u_t B_tᵀ,   y_t = S_t C_t  per head       [Mamba-2, §2 and §5]

    Within a chunk of Q steps, with s the running sum of Δ A, y = (C Bᵀ ⊙ exp(s_i − s_j), i ≥ j) Δu,
    the "attention" form; what came before the chunk enters as exp(s_i) S C_i.   [Mamba-2, §6]
    C Bᵀ is computed once per group, not once per head.
    """
    batch, time, heads, channels = u.shape
    groups, state = B.shape[2:]
    if time == 0 or heads % groups:
        raise ConfigError(
            "chunked_scan: needs time ≥ 1 and heads a multiple of groups, found "
            f"u {tuple(u.shape)} and B {tuple(B.shape)}."
        )
    if initial is None:
        initial = u.new_zeros(batch, heads, channels, state)
    if kernel == "reference":
        return _chunked_reference(u, delta, A, B, C, initial)
    chunk = min(chunk, time)
    if pad := -time % chunk:  # Δ = 0 keeps the state and adds nothing
        u, B, C = (F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (u, B, C))
        delta = F.pad(delta, (0, 0, 0, pad))
    n_chunks, per_group = u.shape[1] // chunk, heads // groups
    # b batch, c chunk, g group, r head in the group, i/j step in the chunk, p channel, n state
    delta = delta.reshape(batch, n_chunks, chunk, groups, per_group).permute(0, 1, 3, 4, 2)
    log_decay = torch.cumsum(delta * A.reshape(groups, per_group, 1), dim=-1)  # s: b c g r i
    u = u.reshape(batch, n_chunks, chunk, groups, per_group, channels).permute(0, 1, 3, 4, 2, 5)
    B = B.reshape(batch, n_chunks, chunk, groups, state).transpose(2, 3)  # b c g i n
    C = C.reshape(batch, n_chunks, chunk, groups, state).transpose(2, 3)
    scaled = u * delta.unsqueeze(-1)  # b c g r i p

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=u.device).triu(1)
    gaps = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(later, -torch.inf)
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3) * gaps.exp()  # b c g r i j
    inside = scores @ scaled  # b c g r i p

    to_end = torch.exp(log_decay[..., -1:] - log_decay)
    packed = (scaled * to_end.unsqueeze(-1)).transpose(-1, -2)  # b c g r p i
    packed = packed.reshape(batch, n_chunks, groups, per_group * channels, chunk)
    added = (packed @ B).reshape(batch, n_chunks, heads, channels, state)
    kept = torch.exp(log_decay[..., -1]).reshape(batch, n_chunks, heads, 1, 1)
    S, before = initial, []
    for a, x in zip(kept.unbind(1), added.unbind(1), strict=True):
        before.append(S)
        S = torch.addcmul(x, a, S)
    entering = torch.stack(before, dim=1).reshape(
        batch, n_chunks, groups, per_group * channels, state
    )
    across = (entering @ C.transpose(-1, -2)).reshape(
        batch, n_chunks, groups, per_group, channels, chunk
    )
    y = inside + across.transpose(-1, -2) * torch.exp(log_decay).unsqueeze(-1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, n_chunks * chunk, heads, channels)
    return y[:, :time], S


def _chunked_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    per_group = u.shape[2] // B.shape[2]
    outputs = []
    for t in range(u.shape[1]):
        B_t = B[:, t].repeat_interleave(per_group, dim=1)  # batch heads state
        C_t = C[:, t].repeat_interleave(per_group, dim=1)
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        S = decay * S + (delta[:, t, :, None] * u[:, t])[..., None] * B_t[:, :, None, :]
        outputs.append((S @ C_t[..., None])[..., 0])
    return torch.stack(outputs, dim=1), S


# ── the hook into transformers ───────────────────────────────────────────────────────────────────

_CARRIED: ContextVar[Tensor | None] = ContextVar("carried_ssm_state", default=None)
_LOCK = threading.Lock()
_MODELS = "transformers.models"

# What the swapped functions rely on: parameters by name, and the class that calls them by name.
UPSTREAM = {
    f"{_MODELS}.mamba.modeling_mamba": (
        "mamba_selective_scan",
        ("hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
        "MambaMixer",
    ),
    f"{_MODELS}.mamba2.modeling_mamba2": (
        "mamba2_chunk_scan",
        ("hidden_states", "dt", "A", "B", "C", "chunk_size", "D", "dt_bias", "initial_states"),
        "Mamba2Mixer",
    ),
}


def _mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_ignored: Any,
) -> Any:
    """In place of transformers' function of this name, whose tensors are (batch, width, time)."""
    dtype = hidden_states.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    carried = _CARRIED.get()
    u, delta, B, C = (v.transpose(1, 2).to(wide) for v in (hidden_states, dt, B, C))
    initial = None if carried is None else carried.to(wide)
    y, last = selective_scan(u, delta, A.to(wide), B, C, initial)
    if D is not None:
        y = torch.addcmul(y, u, D.to(wide))
    y = y.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z)
    y = y.to(dtype)
    return (y, last.to(dtype)) if return_last_state else y


def _mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_ignored: Any,
) -> Any:
    """In place of transformers' function of this name; `chunk_size` only tunes speed."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    low, high = dt_limit
    if low > 0 or high < float("inf"):
        dt = torch.clamp(dt, min=low, max=high)
    u = hidden_states.to(wide)
    initial = None if initial_states is None else initial_states.to(wide)
    y, last = chunked_scan(u, dt.to(wide), A.to(wide), B.to(wide), C.to(wide), initial)
    if D is not None:
        y = torch.addcmul(y, u, D.to(wide).unsqueeze(-1))
    return (y, last) if return_final_states else y


def _continuing(forward: Any) -> Any:
    """A mixer's forward that hands the cached state to the scan if several tokens continue it."""

    def continuing_forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        state = None
        if cache_params is not None and hidden_states.shape[1] > 1:
            state = cache_params.get_recurrent_state(self.layer_idx)
        token = _CARRIED.set(None if state is None else state.clone())
        try:
            return forward(self, hidden_states, cache_params, *args, **kwargs)
        finally:
            _CARRIED.reset(token)

    return continuing_forward


def upstream_mismatch(
    module: Any, name: str, parameters: tuple[str, ...], mixer: str
) -> str | None:
    """Why `module` cannot take our scan in place of its `name`, or None when it can."""
    function, owner = getattr(module, name, None), getattr(module, mixer, None)
    if function is None:
        return f"has no function {name}"
    if owner is None:
        return f"has no class {mixer}"
    found = inspect.signature(function).parameters
    if missing := [p for p in parameters if p not in found]:
        return f"{name} has no parameter {', '.join(missing)}"
    if name not in inspect.unwrap(owner.forward).__code__.co_names:
        return f"{mixer}.forward does not call {name}"
    accepted = list(inspect.signature(owner.forward).parameters)
    if accepted[1:3] != ["hidden_states", "cache_params"]:
        return f"{mixer}.forward takes {', '.join(accepted[1:3])} first"
    return None


class fast_mamba:
    """While active, transformers' Mamba and Mamba-2 classes use the scans of this module.

    >>> with fast_mamba() as hook:              # doctest: +SKIP
    ...     loss = model(input_ids=ids, labels=ids).loss; loss.backward()
    >>> hook = fast_mamba().install()           # doctest: +SKIP   … later: hook.remove()

    Outputs and gradients agree with the stock path to 1e-5.  Beyond speed one thing changes:
    several tokens after a cached prefix continue from the prefix's state, which stock Mamba-1
    ignores without a word.  On a CUDA device with the `mamba_ssm` kernels the stock function is
    called, except for that continuation.

    The hook acts on the whole process and may be nested; the last one removed restores what the
    first one found.  An upstream version whose functions have another shape is left alone with a
    warning, and `skipped` says why.
    """

    _active = 0
    _saved: list[tuple[Any, str, Any]] = []  # noqa: RUF012  (state of the class on purpose: one hook per process)
    _skipped: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self._installed = False

    @property
    def skipped(self) -> dict[str, str]:
        """Upstream module → why it was left as it is."""
        return dict(type(self)._skipped)

    def install(self) -> fast_mamba:
        """Swap the scans in; undone by `remove`."""
        cls = type(self)
        with _LOCK:
            if not self._installed:
                self._installed = True
                cls._active += 1
                if cls._active == 1:
                    cls._swap()
        for where, why in cls._skipped.items():
            warnings.warn(
                f"fast_mamba: {where} {why}; it keeps its stock scan (slow on CPU, and Mamba-1 "
                "must be continued one token at a time).",
                RuntimeWarning,
                stacklevel=3,
            )
        return self

    def remove(self) -> None:
        """Restore what `install` found; calling it twice does nothing."""
        cls = type(self)
        with _LOCK:
            if not self._installed:
                return
            self._installed = False
            cls._active -= 1
            if cls._active == 0:
                for owner, name, original in reversed(cls._saved):
                    setattr(owner, name, original)
                cls._saved.clear()
                cls._skipped.clear()

    @classmethod
    def _swap(cls) -> None:
        for where, (name, parameters, mixer) in UPSTREAM.items():
            try:
                module = importlib.import_module(where)
            except ImportError as error:
                cls._skipped[where] = f"cannot be imported ({error})"
                continue
            if why := upstream_mismatch(module, name, parameters, mixer):
                cls._skipped[where] = why
                continue
            ours = _mamba_selective_scan if name == "mamba_selective_scan" else _mamba2_chunk_scan
            cls._put(module, name, _unless_kernel(ours, getattr(module, name)))
            if name == "mamba_selective_scan":
                owner = getattr(module, mixer)
                cls._put(owner, "forward", _continuing(owner.forward))

    @classmethod
    def _put(cls, owner: Any, name: str, value: Any) -> None:
        cls._saved.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def __enter__(self) -> fast_mamba:
        return self.install()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _unless_kernel(ours: Any, stock: Any) -> Any:
    """`ours`, but the stock function where it is a compiled CUDA kernel that can do the job."""

    def scan(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.is_cuda and _CARRIED.get() is None and _has_kernels():
            return stock(hidden_states, *args, **kwargs)
        return ours(hidden_states, *args, **kwargs)

    return scan


def _has_kernels() -> bool:
    from workbench.engines import available

    return available("mamba_ssm")
