"""Fixed orthogonal matrices, for rotations that are not Hadamard matrices.   [QuIP §4.2]

    O_n = O_p (x) O_q,   n = p q, p <= q as near to each other as the divisors of n allow

Random orthogonal O_p, O_q spread a vector over all n coordinates as two small products, at a cost
of 2 n (p + q) operations. The matrix of an order is always the same one, so nothing of it needs to
be stored; what is random in a rotation are its signs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.constants import on_cpu
from workbench.errors import ConfigError

LARGEST_ORDER = 2048
"""Of a factor; widths that need a larger one are refused."""


@lru_cache(maxsize=256)
def kron_orders(n: int) -> tuple[int, int]:
    """(p, q) with n = p q, p <= q and p as large as possible.

    >>> kron_orders(4096), kron_orders(320), kron_orders(13)
    ((64, 64), (16, 20), (1, 13))

    Raises:
        ConfigError: q is beyond ``LARGEST_ORDER``.
    """
    if n < 1:
        raise ConfigError(f"width {n} cannot be transformed; it must be at least 1")
    p = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    if n // p > LARGEST_ORDER:
        raise ConfigError(
            f"rotation kron: width {n} = {p} x {n // p} needs a dense orthogonal matrix of order "
            f"{n // p}, and {LARGEST_ORDER} is the largest; use had or fft"
        )
    return p, n // p


@on_cpu
def _gaussian(order: int) -> Float[Tensor, "K K"]:
    """Standard normal numbers by Box and Muller from raw integers: the same on every machine up to
    the last bit of log and cos."""
    generator = torch.Generator().manual_seed(order)
    raw = torch.randint(0, 2**31, (2, order, order), generator=generator, dtype=torch.int64)
    first, second = (raw.double() + 0.5) / 2**31
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


@lru_cache(maxsize=64)
@on_cpu
def orthogonal_matrix(order: int) -> Float[Tensor, "K K"]:
    """The orthogonal matrix of this order: Q of a Gaussian matrix, R with a positive diagonal.

    That makes it unique and uniformly distributed.   [Mezzadri 2007]
    """
    q, r = torch.linalg.qr(_gaussian(order))
    return q * r.diagonal().sign()
