"""CUDA kernels that may stand in for a layer's own recurrence, and how each of them is called.

    kernel=auto       where its package is installed, on a GPU, in a precision that loses nothing
    kernel=reference  never;        kernel=fused  always, or an error that says what is missing

Each function below speaks one package's dialect: the order of arguments and axes, whether q is
scaled inside, whether a decay comes as a logarithm. Ours: (batch, heads, time, head), q scaled
already, decays as logarithms. The kernels spare the loop over chunks and its stored states.

    ours                                          package (contract read in version)
    S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ        flash-linear-attention 0.6 `chunk_gla`
    the same with a bonus for the present         `chunk_rwkv6`
    g_t = log(1 − 2^(−5−h)) for all t             `chunk_retention`
    g_t = 0                                       `chunk_linear_attn`
    Σ_j (1 + s_ij + s_ij²/2) v_j                  `parallel_based`
    delta rules                                   `chunk_delta_rule`, `chunk_gated_delta_rule`
    generalised delta rule                        `chunk_rwkv7`
    selective scan, state-space duality           mamba-ssm 2.2
    short causal filter                           causal-conv1d 1.5

flash-linear-attention multiplies single precision in TF32 (10 bits), or refuses it: `auto` leaves
float32 to the reference there, and takes the kernel where a layer computes in half precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ConfigError
from workbench.integrations.kernels import Kernel, fused_kernel

Compiled = Callable[..., Any]

HALF = (torch.bfloat16, torch.float16)
"""Where a layer computes in these, products in half precision lose nothing more."""
SINGLE = (*HALF, torch.float32)


# ---------------------------------------------------------------- the dialects


def swap(x: Float[Tensor, "batch a b *rest"]) -> Float[Tensor, "batch b a *rest"]:
    """(batch, heads, time, …) to (batch, time, heads, …), and back."""
    return x.transpose(1, 2)


def call_gla(
    fused: Compiled, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Tensor
) -> Tensor:
    """o of one log decay per key channel; g stays as fine as it comes, its sums need it."""
    parts = (swap(x).to(dtype) for x in (q, k, v))
    o, _ = fused(*parts, swap(g.expand_as(k)), scale=1.0)
    return swap(o).to(v.dtype)


def call_rwkv6(
    fused: Compiled,
    dtype: torch.dtype,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Float[Tensor, "heads features"],
) -> Tensor:
    """As `call_gla`, but the present counts by the bonus and the decay starts one step later."""
    parts = (swap(x).to(dtype) for x in (r, k, v))
    o, _ = fused(*parts, swap(g.expand_as(k)), bonus, scale=1.0)
    return swap(o).to(v.dtype)


def call_retention(fused: Compiled, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o of the fixed decays 1 − 2^(−5−h), which the kernel makes itself."""
    o, _ = fused(*(swap(x).to(dtype) for x in (q, k, v)), scale=1.0)
    return swap(o).to(v.dtype)


def call_linear_attention(
    fused: Compiled, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The unnormalised sum, in single precision: it may hold the normaliser as a column of v."""
    wide = torch.promote_types(dtype, torch.float32)
    o, _ = fused(*(swap(x).to(wide) for x in (q, k, v)), scale=1.0, normalize=False)
    return swap(o)


def call_based(fused: Compiled, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The unnormalised sum of 1 + s + s²/2 with s = q·k/√a, from q and k before the Taylor map."""
    wide = torch.promote_types(dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    return swap(fused(*(swap(x).to(wide) for x in (q, k, v)), scale=scale, use_norm=False))


def call_delta_rule(
    fused: Compiled, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor
) -> Tensor:
    """o of the delta rule; k has length one already."""
    wide = torch.promote_types(v.dtype, torch.float32)
    o, _ = fused(*(swap(x).to(dtype) for x in (q, k, v, beta)), scale=1.0)
    return swap(o).to(wide)


def call_gated_delta_rule(
    fused: Compiled,
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
) -> Tensor:
    """o of the gated delta rule; the log decay stands before β and is as fine as it comes."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, beta = (swap(x).to(dtype) for x in (q, k, v, beta))
    o, _ = fused(q, k, v, swap(log_decay), beta, scale=1.0)
    return swap(o).to(wide)


def call_rwkv7(
    fused: Compiled,
    dtype: torch.dtype,
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    removal: Tensor,
    rate: Tensor,
) -> Tensor:
    """o of S ← diag(w) S + b (aᵀ S) + k vᵀ, where a = −κ and b = κ ⊙ rate."""
    wide = torch.promote_types(v.dtype, torch.float32)
    parts = (swap(x).to(dtype) for x in (k, v, -removal, removal * rate))
    o, _ = fused(swap(r).to(dtype), swap(log_decay), *parts, scale=1.0)
    return swap(o).to(wide)


def call_selective_scan(
    fused: Compiled,
    dtype: torch.dtype,
    u: Float[Tensor, "batch time channels"],
    delta: Float[Tensor, "batch time channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
) -> Tensor:
    """y without the skip; the kernel has channels before time, and u comes in single precision."""
    del dtype
    u, delta, B, C = (x.mT.contiguous() for x in (u, delta, B, C))
    return fused(u, delta, A, B, C).mT


def call_ssd(
    fused: Compiled,
    dtype: torch.dtype,
    u: Float[Tensor, "batch time heads channels"],
    delta: Float[Tensor, "batch time heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
    chunk: int,
) -> Tensor:
    """y without the skip; the axes are ours, and a chunk is a power of two, 16 at least."""
    del dtype
    return fused(u, delta, A, B, C, chunk_size=1 << (max(chunk, 16) - 1).bit_length())


def call_convolution(
    fused: Compiled,
    dtype: torch.dtype,
    x: Float[Tensor, "batch time channels"],
    taps: Float[Tensor, "taps channels"],
    bias: Float[Tensor, " channels"] | None,
    silu: bool,
) -> Float[Tensor, "batch time channels"]:
    """The filter, and SiLU with it; the last tap weighs the present here and there."""
    del dtype
    wide = torch.promote_types(x.dtype, taps.dtype)
    x, taps = (part.to(wide).mT.contiguous() for part in (x, taps))
    bias = None if bias is None else bias.to(wide)
    return fused(x, taps, bias, activation="silu" if silu else None).mT


# ---------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Fused:
    """How a kernel is called, and what it can be asked for."""

    call: Callable[..., Tensor]
    """Its dialect."""
    dtypes: tuple[torch.dtype, ...] = SINGLE
    """Precisions of a layer for which it may be asked."""
    auto: tuple[torch.dtype, ...] = HALF
    """Those in which it is taken unasked."""
    widest: int | None = None
    """Widest head (of keys) that it takes."""


FUSED: dict[str, Fused] = {
    "gla": Fused(call_gla),
    "rwkv6": Fused(call_rwkv6),
    "retention": Fused(call_retention),
    "linear_attention": Fused(call_linear_attention),
    "based": Fused(call_based, widest=128),
    "delta_rule": Fused(call_delta_rule, dtypes=HALF, widest=256),
    "gated_delta_rule": Fused(call_gated_delta_rule, dtypes=HALF, widest=256),
    "rwkv7": Fused(call_rwkv7, dtypes=HALF, widest=256),
    "selective_scan": Fused(call_selective_scan, auto=SINGLE, widest=256),
    "ssd": Fused(call_ssd, auto=SINGLE),
    "causal_conv1d": Fused(call_convolution, auto=SINGLE),
}
"""Name in `workbench.integrations.kernels.KERNELS` → its use in a layer."""


def known_kernel(layer: str, kernel: Kernel) -> Kernel:
    """The choice, if it is one."""
    if kernel not in ("auto", "reference", "fused"):
        raise ConfigError(f"{layer}: kernel={kernel!r}; expected auto, reference or fused")
    return kernel


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: its own precision, or that of autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def choose(
    name: str, kernel: Kernel, device: str, dtype: torch.dtype, head: int = 0
) -> tuple[Compiled | None, str]:
    """The compiled function or none for the reference, and one line that says why.

    Raises:
        MissingExtra: `fused`, and its package is not usable here.
        ConfigError: `fused`, and the kernel cannot do what the layer asks.
    """
    fused, why = fused_kernel(name, kernel, device=device)
    if fused is None:
        return None, why
    limits, kind = FUSED[name], str(dtype).removeprefix("torch.")
    fits = limits.dtypes if kernel == "fused" else limits.auto
    names = " or ".join(str(known).removeprefix("torch.") for known in fits)
    if dtype not in fits:
        problem, remedy = f"the layer computes in {kind}", f"set --dtype to {names}"
    elif limits.widest is not None and head > limits.widest:
        problem, remedy = f"a head is {head} wide, the kernel takes {limits.widest}", "more heads"
    else:
        return fused, why
    if kernel == "fused":
        raise ConfigError(f"kernel {name}: {problem}; {remedy}, or take kernel=auto")
    return None, f"kernel {name}: reference ({problem})"


def compiled(
    name: str, kernel: Kernel, projected: Tensor, x: Tensor, head: int = 0
) -> Callable[..., Tensor] | None:
    """The kernel of that name, to be called with our arguments, or none for the reference.

    `projected` is what it would be given, `x` what the layer was given. Transforms of `torch.func`
    (stacked sweeps) keep the reference: the kernels have no rule for a further axis.
    """
    if kernel == "reference" or (kernel == "auto" and not projected.is_cuda):
        return None
    dtype = working_dtype(x)
    fused, _ = choose(name, kernel, projected.device.type, dtype, head)
    if fused is None:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(projected):
        if kernel == "auto":
            return None
        raise ConfigError(
            f"kernel {name}: it cannot run under vmap, as in a stacked sweep; take kernel=auto"
        )
    return partial(_without_autocast, FUSED[name].call, fused, dtype)


def _without_autocast(
    call: Callable[..., Tensor], fused: Compiled, dtype: torch.dtype, *parts: Any
) -> Tensor:
    """The kernel in the precision that its dialect chose."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return call(fused, dtype, *parts)


def filter_kernel(kernel: Kernel) -> Kernel:
    """The short filter beside a recurrence: `fused` asks for the recurrence's kernel alone."""
    return "reference" if kernel == "reference" else "auto"


def kernel_notes(model: nn.Module, device: str, dtype: torch.dtype) -> list[str]:
    """One line for each kernel that a model's layers could use, saying what they use: for a log."""
    found: dict[str, None] = {}
    for module in model.modules():
        for name, kernel in getattr(module, "kernels", {}).items():
            found[choose(name, kernel, device, dtype)[1]] = None
    return list(found)
