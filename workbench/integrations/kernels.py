"""Fused CUDA kernels behind one choice: `auto`, `reference` or `fused`.

    scan, why = fused_kernel("selective_scan", kernel="auto")
    run.note(why)
    y = scan(...) if scan is not None else reference_scan(...)

The readable torch form always exists in the package that uses it; a kernel only replaces it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from workbench.engines import ENGINES, available, need, status
from workbench.errors import MissingExtra, unknown_name

Kernel = Literal["auto", "reference", "fused"]

FLA = "flash-linear-attention"

KERNELS: dict[str, tuple[str, str]] = {
    "selective_scan": ("mamba-ssm", "mamba_ssm.ops.selective_scan_interface:selective_scan_fn"),
    "ssd": ("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined"),
    "causal_conv1d": ("causal-conv1d", "causal_conv1d:causal_conv1d_fn"),
    "gla": (FLA, "fla.ops.gla:chunk_gla"),
    "rwkv6": (FLA, "fla.ops.rwkv6:chunk_rwkv6"),
    "rwkv7": (FLA, "fla.ops.rwkv7:chunk_rwkv7"),
    "retention": (FLA, "fla.ops.retention:chunk_retention"),
    "linear_attention": (FLA, "fla.ops.linear_attn:chunk_linear_attn"),
    "based": (FLA, "fla.ops.based:parallel_based"),
    "delta_rule": (FLA, "fla.ops.delta_rule:chunk_delta_rule"),
    "gated_delta_rule": (FLA, "fla.ops.gated_delta_rule:chunk_gated_delta_rule"),
    "flash_attention": ("flash-attn", "flash_attn:flash_attn_func"),
    "hadamard": ("fast-hadamard-transform", "fast_hadamard_transform:hadamard_transform"),
}
"""name → (engine, "module:function")."""


def fused_kernel(
    name: str, kernel: Kernel = "auto", *, device: str = "cuda"
) -> tuple[Callable[..., Any] | None, str]:
    """The fused function or None for the reference form, and one line for the log saying why.

    Raises:
        MissingExtra: `kernel="fused"` was asked for and the engine is not usable here.
    """
    if name not in KERNELS:
        raise unknown_name("kernel", name, KERNELS)
    engine, where = KERNELS[name]
    if kernel == "reference":
        return None, f"kernel {name}: reference (asked for)"
    usable = device.startswith("cuda") and available(engine)
    if not usable:
        reason = str(status(engine).reason or f"device is {device}, the kernel needs CUDA")
        if kernel == "fused":
            if status(engine).found:
                raise MissingExtra(f"kernel {name} of {engine}: {reason}; use kernel=auto")
            need(engine, feature=f"the fused {name} kernel")
        return None, f"kernel {name}: {ENGINES[engine].fallback} ({engine} {reason})"
    import importlib

    module, _, function = where.partition(":")
    fused = getattr(importlib.import_module(module), function)
    return fused, f"kernel {name}: {engine} {status(engine).version}"
