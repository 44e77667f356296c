"""LDLQ for scalar codebooks on few rows: the factors of the low-rank part.

Blocks of one column need n steps on vectors as long as the rank, where the dispatch of a tensor
library costs more than the arithmetic. On the CPU the steps inside a buffer therefore run on NumPy
views of the same memory; the products between buffers stay with torch. The codes are those of
:func:`lplr_q.linalg.ldlq.ldlq`.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


def scalar_ldlq(
    weight: Float[Tensor, "r n"],
    lower: Float[Tensor, "n n"],
    levels: Float[Tensor, " k"],
    *,
    buffer: int = 128,
) -> Int64[Tensor, "r n"]:
    """Index of the level chosen for every entry by equation (2) with blocks of one column."""
    r, n = weight.shape
    lower = lower.to(weight.dtype)
    levels = levels.to(weight.dtype)
    table = levels.numpy()
    bounds = ((levels[1:] + levels[:-1]) / 2).numpy()
    codes = torch.empty(n, r, dtype=torch.int64)
    error = torch.zeros(n, r, dtype=weight.dtype)
    goal = weight.T.contiguous()
    rows, chosen, left, plain = goal.numpy(), codes.numpy(), error.numpy(), goal.clone().numpy()
    for end in range(n, 0, -buffer):
        start = max(0, end - buffer)
        columns = lower[start:end, start:end].T.contiguous().numpy()  # row k: column k of M
        for k in range(end - 1, start - 1, -1):
            target = rows[k]
            if k + 1 < end:
                target = target + columns[k - start, k + 1 - start :] @ left[k + 1 : end]
            index = np.searchsorted(bounds, target)
            chosen[k] = index
            left[k] = plain[k] - table[index]
        if start:
            goal[:start] += lower[start:end, :start].T @ error[start:end]
    return codes.T.contiguous()
