"""y = x Q^T with Q held as codes: one operator with gradient to x, decoded tile by tile.

The operator is opaque to ``torch.compile`` (tables and codebooks stay out of the graph) and its
backward pass decodes Q again instead of keeping the dense matrix of every layer alive, so a model
trains in the memory of its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lplr_q.activation_aware.layer_state import ROW_TILE, unpack_factor
from lplr_q.kernels.dispatch import gemv, rows
from lplr_q.linalg.hadamard import hadamard_transform
from lplr_q.linalg.scales import RowScales

TILE_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights decoded at a time, per kind of device, when the layer does not say."""


class _Operator:
    """A function that is an operator to the compiler and to autograd, and itself otherwise: a call
    of an operator costs as much as a small layer."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.operator = torch.library.custom_op(f"lplr_q::{name}", function, mutates_args=())
        self.register_fake = self.operator.register_fake
        self.register_autograd = self.operator.register_autograd

    def __call__(self, *arguments: Any) -> Tensor:
        traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
        return (
            self.operator(*arguments)
            if traced or _abstract(arguments)
            else self.function(*arguments)
        )


def _abstract(arguments: tuple) -> bool:
    """Whether the first tensor has no data of its own (meta device, tracing subclasses)."""
    first = next((a for a in arguments if isinstance(a, Tensor)), None)
    return first is None or first.is_meta or type(first) not in (Tensor, nn.Parameter)


def tile_of(tile_rows: int, n: int, device: torch.device) -> int:
    """Rows per tile: ``tile_rows`` rounded up to whole tiles, or what fits the budget."""
    wanted = tile_rows or TILE_WEIGHTS.get(device.type, 1 << 22) // max(n, 1)
    return max(1, -(-wanted // ROW_TILE)) * ROW_TILE


def _tiles(
    codes: list[Tensor], tail: Tensor | None, book: str, bits: int, m: int, n: int, tile: int
) -> Iterator[tuple[int, int, Tensor]]:
    for low in range(0, m, tile):
        high = min(low + tile, m)
        yield low, high, rows(codes, tail, book, bits, (m, n), low, high)


def factors(scale: Tensor, low: int, high: int, n: int, group: int) -> Tensor:
    """What the points of these rows are multiplied with: the scale of the matrix, or a column or
    matrix of their own."""
    if not group:
        return scale.view(torch.float32)
    return RowScales(scale[low:high], n, n if group == -1 else group).spread()


def _product(
    x: Tensor,
    codes: list[Tensor],
    tail: Tensor | None,
    scale: Tensor,
    book: str,
    bits: int,
    m: int,
    tile_rows: int,
    kernel: bool,
    group: int,
) -> Tensor:
    """(N, n) activations times the coded (m, n) matrix, in the type of x."""
    n, device = x.shape[1], x.device
    if kernel:
        found = gemv(x, codes, tail, scale, book, bits, m, group)
        if found is not None:
            return found
    tile = tile_of(tile_rows, n, device)
    out = x.new_empty(x.shape[0], m)
    for low, high, part in _tiles(codes, tail, book, bits, m, n, tile):
        factor = factors(scale, low, high, n, group)
        out[:, low:high] = x @ part.mul_(factor).to(x.dtype).T
    return out


product = _Operator("product", _product)


@product.register_fake
def _product_shape(x: Tensor, *others: Any) -> Tensor:
    m = others[5]
    return x.new_empty(x.shape[0], m)


@torch.library.custom_op("lplr_q::product_back", mutates_args=())
def product_back(
    grad: Tensor,
    codes: list[Tensor],
    tail: Tensor | None,
    scale: Tensor,
    book: str,
    bits: int,
    n: int,
    tile_rows: int,
    group: int,
) -> Tensor:
    """(N, m) gradients times the coded (m, n) matrix: the gradient of :func:`product` to x."""
    m = grad.shape[1]
    out = grad.new_zeros(grad.shape[0], n)
    tile = tile_of(tile_rows, n, grad.device)
    for low, high, part in _tiles(codes, tail, book, bits, m, n, tile):
        factor = factors(scale, low, high, n, group)
        out += grad[:, low:high] @ part.mul_(factor).to(grad.dtype)
    return out


@product_back.register_fake
def _product_back_shape(grad: Tensor, *others: Any) -> Tensor:
    n = others[5]
    return grad.new_empty(grad.shape[0], n)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, codes, tail, scale, book, bits, _, tile_rows, _, group = inputs
    ctx.save_for_backward(scale, *codes, *([] if tail is None else [tail]))
    ctx.form = (len(codes), tail is not None, book, bits, x.shape[1], tile_rows, group)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    count, has_tail, *form = ctx.form
    scale, *rest = ctx.saved_tensors
    codes, tail = list(rest[:count]), rest[count] if has_tail else None
    back = product_back(grad, codes, tail, scale, *form)
    return back, [None] * count, None, None, None, None, None, None, None, None


product.register_autograd(_backward, setup_context=_keep)


def _factor(
    codes: list[Tensor],
    tail: Tensor | None,
    scales: Tensor | None,
    book: str,
    bits: int,
    rank: int,
    length: int,
) -> Tensor:
    """One coded (rank, length) factor, float32."""
    found = unpack_factor(codes, tail, scales, codebook=book, bits=bits, rank=rank, length=length)
    return found.contiguous()


coded_factor = _Operator("factor", _factor)


@coded_factor.register_fake
def _factor_shape(codes: list[Tensor], *others: Any) -> Tensor:
    rank, length = others[4:]
    return codes[0].new_empty(rank, length, dtype=torch.float32)


def _theta(x: Tensor, inverse: bool, rotation: str) -> Tensor:
    """Theta x over the last axis (Theta^T x with ``inverse``); orthogonal, so the gradient is the
    inverse transform and nothing has to be kept for it."""
    y = hadamard_transform(x, inverse=inverse, rotation=rotation)
    return y.clone() if y.data_ptr() == x.data_ptr() else y


theta = _Operator("theta", _theta)


@theta.register_fake
def _theta_shape(x: Tensor, inverse: bool, rotation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_direction(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.inverse, ctx.rotation = inputs[1:]


def _theta_back(ctx: Any, grad: Tensor) -> tuple:
    return theta(grad, not ctx.inverse, ctx.rotation), None, None


theta.register_autograd(_theta_back, setup_context=_keep_direction)


@torch.library.custom_op("lplr_q::matrix", mutates_args=())
def matrix(
    codes: list[Tensor],
    tail: Tensor | None,
    scale: Tensor,
    book: str,
    bits: int,
    m: int,
    n: int,
    group: int,
) -> Tensor:
    """The coded (m, n) matrix, float32."""
    return rows(codes, tail, book, bits, (m, n), 0, m).mul_(factors(scale, 0, m, n, group))


@matrix.register_fake
def _matrix_shape(codes: list[Tensor], tail: Tensor | None, scale: Tensor, *others: Any) -> Tensor:
    m, n = others[2:4]
    return scale.new_empty(m, n, dtype=torch.float32)
