"""A second device that is not there: its tensors lie in ordinary memory and refuse to meet others.

    with Elsewhere() as put:
        decompose(put(weight), ...)

Inside, whatever is asked to be on ``DEVICE`` is; an operation on tensors of both devices fails as
it would on a GPU (numbers without dimension and indices excepted).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)  # a name PyTorch knows and needs nothing for
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


class Far(torch.Tensor):
    """A tensor that says it is on ``DEVICE``; ``inner`` is where its numbers are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Operations inside know the device."""

    def __enter__(self) -> Any:
        super().__enter__()
        return Far

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name, asked = func._schema.name, kwargs.get("device")
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    far = [t for t in tensors if isinstance(t, Far)]
    near = [t for t in tensors if not isinstance(t, Far) and t.dim()]
    indices = name in INDEXING and all(t.dtype in (torch.int64, torch.bool) for t in near)
    if far and near and name not in COPIES and not indices:
        raise RuntimeError(f"{name}: tensors on two devices")
    args_here, here = tree_map(lambda t: t.inner if isinstance(t, Far) else t, (args, kwargs))
    if asked is not None:
        here = {**here, "device": torch.device("cpu")}
    result = func(*args_here, **here)
    outputs = [a.name for a in func._schema.arguments if a.is_out]
    if outputs:
        found = tuple(kwargs[name] for name in outputs)
        return found if len(found) > 1 else found[0]
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    goal = bool(far) if asked is None else torch.device(asked).type == DEVICE.type
    return tree_map(lambda t: Far(t) if goal and isinstance(t, torch.Tensor) else t, result)
