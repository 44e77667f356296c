"""LDLQ: rounding with linear feedback, lazily batched, and guarded refinement.
[QuIP# §4; GPTQ §3.3]

With H = M D M^T and E = W - Q, blocks are rounded from the last to the first:

    Q_k = q( W_k + sum_{j>k} E_j M_jk )                                        (2)

The loss tr(E H E^T) then equals the sum of tr(eta_k D_k eta_k^T) with eta_k the local rounding
error. With blocks of one column and reversed order this is GPTQ.

Everything works on rows at once; the rounding is given as an object with ``bounds`` (columns of
each block), ``quantise(target, k) -> (codes, points)`` and ``rows``, the number of rows that are
rounded together (1 except for trellises, whose tiles span several).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from lplr_q.codebooks.base import Codebook, decode_matrix, make_codebook, row_groups, rows_of
from lplr_q.linalg.ldl import block_bounds
from lplr_q.pack import code_dtype


class BlockQuantiser(Protocol):
    """Rounds one block of columns of all rows.

    An attribute ``rows`` says how many rows depend on each other; absent means 1.
    """

    bounds: list[tuple[int, int]]

    def quantise(
        self, target: Float[Tensor, "m b"], block: int
    ) -> tuple[Int64[Tensor, "m s"], Float[Tensor, "m b"]]:
        """Codes and points for block number ``block``."""
        ...


class CodebookBlocks:
    """A codebook over the columns of a unit-rms matrix, with a scalar tail when dim does not
    divide n.

    ``scale`` is what the codebook's points are divided by: points / scale approximate unit-rms
    input.
    """

    def __init__(self, codebook: Codebook, n: int, *, multiplier: float = 1.0) -> None:
        self.codebook, self.n = codebook, n
        self.rows = rows_of(codebook)
        self.scale = codebook.opt_scale * multiplier
        self.bounds = block_bounds(n, codebook.dim)
        self.tail = n % codebook.dim
        self.tail_codebook = make_codebook("lloyd-max", int(codebook.bits)) if self.tail else None
        self.code_dtype = code_dtype(max(*codebook.streams, int(codebook.bits)))

    def quantise(
        self, target: Float[Tensor, "m b"], block: int
    ) -> tuple[Int64[Tensor, "m s"], Float[Tensor, "m b"]]:
        """Codes and points (in unit-rms units) of one block."""
        if self.tail_codebook is not None and block == len(self.bounds) - 1:
            codes = self.tail_codebook.encode(target[..., None])[..., 0]
            points = self.tail_codebook.decode(codes[..., None])[..., 0]
            return codes, points.to(target.dtype)
        codes = self.codebook.encode(target * self.scale)
        return codes, self.codebook.decode(codes).to(target.dtype) / self.scale

    def decode(self, codes: list[Tensor]) -> Float[Tensor, "m n"]:
        """The matrix of all blocks' codes, in unit-rms units, float32."""
        whole = codes[:-1] if self.tail else codes
        return self.decode_packed(
            torch.stack(whole, dim=1) if whole else None, codes[-1] if self.tail else None
        )

    def decode_packed(
        self, whole: Int[Tensor, "m blocks s"] | None, tail: Int[Tensor, "m t"] | None
    ) -> Float[Tensor, "m n"]:
        """The matrix from the codes of the whole blocks and of the scalar tail."""
        parts = []
        if whole is not None:
            parts.append(decode_matrix(self.codebook, whole.long()) / self.scale)
        if tail is not None and self.tail_codebook is not None:
            parts.append(self.tail_codebook.decode(tail.long()[..., None])[..., 0])
        return torch.cat(parts, dim=1)


def ldlq(
    weight: Float[Tensor, "m n"],
    lower: Float[Tensor, "n n"],
    blocks: BlockQuantiser,
    *,
    buffer: int = 128,
    code_dtype: torch.dtype = torch.int64,
) -> tuple[list[Tensor], Float[Tensor, "m n"]]:
    """Codes per block and Q by equation (2), with the feedback applied one buffer of columns at a
    time.

    Inside a buffer only its own columns are corrected; afterwards one product carries the buffer's
    error to the columns not yet visited. The result does not depend on ``buffer``.
    """
    lower = lower.to(weight.dtype)
    points = torch.zeros_like(weight)  # of columns still to come: what is carried to them
    codes: list[Tensor] = [torch.empty(0)] * len(blocks.bounds)
    block = len(blocks.bounds) - 1
    while block >= 0:
        end = blocks.bounds[block][1]
        first = block
        while first > 0 and end - blocks.bounds[first - 1][0] <= buffer:
            first -= 1
        start = blocks.bounds[first][0]
        error = torch.empty_like(weight[:, start:end])
        for k in range(block, first - 1, -1):
            low, high = blocks.bounds[k]
            target = weight[:, low:high] + points[:, low:high]
            if high < end:
                target = target + error[:, high - start :] @ lower[high:end, low:high]
            found, points[:, low:high] = blocks.quantise(target, k)
            codes[k] = found.to(code_dtype)
            error[:, low - start : high - start] = weight[:, low:high] - points[:, low:high]
        if start:
            points[:, :start].addmm_(error, lower[start:end, :start])
        block = first - 1
    return codes, points


def reference_ldlq(
    weight: Float[Tensor, "m n"], lower: Float[Tensor, "n n"], blocks: BlockQuantiser
) -> tuple[list[Tensor], Float[Tensor, "m n"]]:
    """Equation (2) as written, one full-width product per block."""
    lower = lower.to(weight.dtype)
    strict = lower.clone()
    for low, high in blocks.bounds:
        strict[low:high, low:high] = 0
    points = weight.clone()  # unvisited columns have error 0
    codes: list[Tensor] = [torch.empty(0)] * len(blocks.bounds)
    for k in range(len(blocks.bounds) - 1, -1, -1):
        low, high = blocks.bounds[k]
        target = weight[:, low:high] + ((weight - points) @ strict)[:, low:high]
        codes[k], points[:, low:high] = blocks.quantise(target, k)
    return codes, points


def _sum_of_groups(change: Float[Tensor, " m"], rows: int) -> Float[Tensor, " m"]:
    """Every entry replaced by the sum over the rows it is coded with."""
    if rows == 1:
        return change
    sums, low = [], 0
    for count, height in row_groups(len(change), rows):
        part = change[low : low + count * height].reshape(count, height)
        sums.append(part.sum(1, keepdim=True).expand(count, height).reshape(-1))
        low += count * height
    return torch.cat(sums)


def corner_inverses(
    hessian: Float[Tensor, "n n"], bounds: list[tuple[int, int]]
) -> list[Float[Tensor, "b b"]]:
    """H_kk^-1 of every block; those of equal width in one call."""
    corners = [hessian[low:high, low:high] for low, high in bounds]
    same = [corner for corner in corners if corner.shape == corners[0].shape]
    found = list(torch.linalg.inv(torch.stack(same)))
    return found + [torch.linalg.inv(corner) for corner in corners[len(same) :]]


def guarded_sweep(
    weight: Float[Tensor, "m n"],
    hessian: Float[Tensor, "n n"],
    blocks: BlockQuantiser,
    codes: list[Tensor],
    points: Float[Tensor, "m n"],
    *,
    buffer: int = 128,
    inverses: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Float[Tensor, "m n"]]:
    """One pass of coordinate descent over blocks; tr(E H E^T) never rises.

    Each block aims at Q_k + (W - Q) H_:k H_kk^-1 and is rounded again; a row (or all the rows that
    are rounded together) takes its new points only if delta H_kk delta^T - 2 (E H)_k delta^T < 0,
    because nearest in the Euclidean sense need not be nearest under H_kk. ``inverses`` are those of
    all H_kk, for callers who have them.
    """
    rows = rows_of(blocks)
    hessian = hessian.to(weight.dtype)
    inverses = inverses or corner_inverses(hessian, blocks.bounds)
    codes, points = [part.clone() for part in codes], points.clone()
    error = weight - points
    block = len(blocks.bounds) - 1
    while block >= 0:
        end = blocks.bounds[block][1]
        first = block
        while first > 0 and end - blocks.bounds[first - 1][0] <= buffer:
            first -= 1
        start = blocks.bounds[first][0]
        gradient = error @ hessian[:, start:end]  # E H for this buffer's columns
        for k in range(block, first - 1, -1):
            low, high = blocks.bounds[k]
            corner = hessian[low:high, low:high]
            g = gradient[:, low - start : high - start]
            aim = points[:, low:high] + g @ inverses[k]
            new_codes, new_points = blocks.quantise(aim, k)
            delta = new_points - points[:, low:high]
            change = ((delta @ corner - 2 * g) * delta).sum(1)
            accept = _sum_of_groups(change, rows) < 0
            delta = delta * accept[:, None]
            shape = (-1,) + (1,) * (codes[k].ndim - 1)
            codes[k].copy_(torch.where(accept.view(shape), new_codes, codes[k]))
            points[:, low:high] = torch.where(accept[:, None], new_points, points[:, low:high])
            error[:, low:high] = weight[:, low:high] - points[:, low:high]
            gradient -= delta @ hessian[low:high, start:end]
        block = first - 1
    return codes, points


def weighted_loss(error: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"]) -> float:
    """tr(E H E^T), accumulated in float64 at the end, never forming the m x m product.

    Rows are taken 512 at a time, so that beside E and H little is held.
    """
    if hessian.dtype != error.dtype and error.dtype == torch.float64:
        return _wide_loss(error, hessian)
    hessian = hessian.to(error.dtype)
    return sum(
        float((rows @ hessian).mul_(rows).sum(dtype=torch.float64)) for rows in error.split(512)
    )


def _wide_loss(error: Tensor, hessian: Tensor) -> float:
    """:func:`weighted_loss` in float64 with H widened a few columns at a time."""
    total = 0.0
    for rows in error.split(512):
        for columns, own in zip(hessian.split(256, dim=1), rows.split(256, dim=1), strict=True):
            total += float((rows @ columns.double()).mul_(own).sum())
    return total
