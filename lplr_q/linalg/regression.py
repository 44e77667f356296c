"""The low-rank step in closed form: rank-constrained regression.   [CALDERA §4.2; LPLR §3]

    argmin over rank r of tr( (A - L R) H (A - L R)^T )

With any C such that H = C C^T and Y = A C = U S Z^T, the minimum is reached by
L R = U_r S_r Z_r^T C^-1 and the loss left is the sum of S_i^2 over i > r, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.linalg.randsvd import RandomisedSVD
from lplr_q.linalg.rows import Rows, squared_norm, times


@dataclass(frozen=True)
class Whitening:
    """``forward`` C with H = C C^T, and how to undo it."""

    forward: Float[Tensor, "n n"]
    triangular: bool
    inverse: Tensor | None = None

    def undo(self, z: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
        """Z C^-1."""
        if self.triangular:
            return torch.linalg.solve_triangular(self.forward, z, upper=False, left=False)
        assert self.inverse is not None
        return z @ self.inverse

    def to(self, dtype: torch.dtype) -> Whitening:
        """The same in another type."""
        inverse = None if self.inverse is None else self.inverse.to(dtype)
        return Whitening(self.forward.to(dtype), self.triangular, inverse)


def cholesky_whitening(factor: Float[Tensor, "n n"]) -> Whitening:
    """C = Cholesky factor: the cheap way."""
    return Whitening(factor, triangular=True)


def eigen_whitening(hessian: Float[Tensor, "n n"], *, floor: float = 1e-8) -> Whitening:
    """C = V Lambda^(1/2), eigenvalues clipped at ``floor`` times the largest: safe for singular
    H."""
    values, vectors = torch.linalg.eigh(hessian)
    values = values.clamp_min(floor * values[-1])
    root = values.sqrt()
    return Whitening(vectors * root, triangular=False, inverse=(vectors / root).T)


def rank_constrained_regression(
    target: Float[Tensor, "m n"], whitening: Whitening, rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], Float[Tensor, " k"]]:
    """Balanced factors L = U_r S_r^(1/2), R = S_r^(1/2) Z_r^T C^-1, and all singular values of
    A C."""
    whitening = whitening.to(target.dtype)
    u, s, zt = torch.linalg.svd(target @ whitening.forward, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, whitening.undo(root[:, None] * zt[:rank]), s


def closed_form(
    target: Rows,
    whitening: Whitening,
    rank: int,
    *,
    svd: RandomisedSVD | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], float]:
    """L and R as :func:`rank_constrained_regression`, by ``svd`` when given, and
    tr(A H A^T) = |A C|^2."""
    whitening = whitening.to(target.dtype)
    product = times(target, whitening.forward, lower=whitening.triangular)
    energy = squared_norm(product)
    if svd is None:
        u, s, zt = torch.linalg.svd(product, full_matrices=False)
    else:
        u, s, zt = svd(product, rank)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, whitening.undo(root[:, None] * zt[:rank]), energy
