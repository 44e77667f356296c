"""Leading singular triplets by subspace iteration, checked, warm-started.
[Halko, Martinsson, Tropp 2011, Alg. 4.4]

    Y ~ (Y Z) Z^T,   Z = orth( (Y^T Y)^q Omega ),   rank r + p columns

What the best rank-r approximation leaves is |Y|^2 - sum_{i<=r} S_i^2. The subspace gives Ritz
values below the S_i, hence a loss that can only fall from one power iteration to the next. The
falls shrink geometrically; their sum to come is estimated from the last two, and iteration ends
when it is well below ``tolerance`` of the loss. If that does not happen in time (spectra that are
nearly flat), all the powers are kept instead of the last one: the block Krylov space of the same
start, whose Ritz values settle far sooner.   [Musco, Musco 2015, Alg. 2]
If that fails too, the exact decomposition is computed, which needs several times the memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.linalg.rows import squared_norm


def default_oversampling(rank: int) -> int:
    """max(16, r / 4) extra columns."""
    return max(16, rank // 4)


@dataclass
class RandomisedSVD:
    """Truncated singular value decomposition that remembers its right subspace for the next call.

    Successive residuals of the alternation have nearly the same leading subspace, so that a warm
    start needs one or two power iterations.
    """

    tolerance: float = 1e-3
    """Largest loss above the optimum's, relative."""
    power_iterations: int = 2
    """At least so many from a cold start."""
    limit: int = 12
    """Power iterations after which the Krylov space is used."""
    depth: int = 8
    """Blocks of the Krylov space after which the exact decomposition is used."""
    subspace: Tensor | None = None
    """Right vectors of the previous call."""
    log: list[str] = field(default_factory=list)
    """What each call did: ``warm 2``, ``cold 3``, ``krylov 5``, ``exact``."""

    def worth(self, m: int, n: int, rank: int) -> bool:
        """Whether the subspace is small enough to pay: r + p at most a fifth of min(m, n)."""
        return rank > 0 and 5 * (rank + default_oversampling(rank)) <= min(m, n)

    def __call__(
        self, matrix: Float[Tensor, "m n"], rank: int
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
        """U_r, S_r, Z_r^T of ``matrix``."""
        m, n = matrix.shape
        width = rank + default_oversampling(rank)
        if not self.worth(m, n, rank):
            return self._exact(matrix, rank)
        warm = self.subspace is not None and self.subspace.shape == (n, width)
        basis = self.subspace.to(matrix) if warm else _start(matrix, width)  # type: ignore[union-attr]
        total = squared_norm(matrix)
        losses: list[float] = []
        least = 1 if warm else self.power_iterations
        for turn in range(1, self.limit + 1):
            image = matrix @ basis
            left = torch.linalg.qr(image).Q
            small = matrix.T @ left  # (n, width)
            basis, values, turned = torch.linalg.svd(small, full_matrices=False)
            losses.append(total - float(values[:rank].double().square().sum()))
            decay = float(values[-1] / values[rank - 1].clamp_min(1e-30)) ** 4
            if turn > least and self._settled(losses, total, decay):
                self.subspace = basis
                self.log.append(f"{'warm' if warm else 'cold'} {turn}")
                return left @ turned.T[:, :rank], values[:rank], basis[:, :rank].T
        return self._krylov(matrix, basis, rank, total) or self._exact(matrix, rank)

    def _krylov(
        self, matrix: Tensor, block: Tensor, rank: int, total: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Triplets from the span of Z, (Y^T Y) Z, (Y^T Y)^2 Z .., or None when it does not
        settle or would be half as wide as the matrix."""
        width, losses = block.shape[1], []
        space, images = block, matrix @ block
        while True:
            gram = sum(part.T @ part for part in map(Tensor.double, images.split(256)))
            values, turned = torch.linalg.eigh(gram)
            losses.append(total - float(values[-rank:].sum()))
            decay = float(values[-width].clamp_min(0) / values[-rank].clamp_min(1e-300)) ** 2
            if len(losses) > 1 and self._settled(losses, total, decay):
                break
            if len(losses) > self.depth or 2 * (space.shape[1] + width) > min(matrix.shape):
                return None
            block = matrix.T @ images[:, -width:]
            for _ in range(2):
                block = torch.linalg.qr(block - space @ (space.T @ block)).Q
            space = torch.cat([space, block], dim=1)
            images = torch.cat([images, matrix @ block], dim=1)
        turned = turned.flip(1)[:, :width].to(matrix.dtype)
        self.subspace = space @ turned
        root = values.flip(0)[:rank].clamp_min(0).sqrt().to(matrix.dtype)
        self.log.append(f"krylov {len(losses)}")
        left = images @ turned[:, :rank] / root.clamp_min(1e-30)
        return left, root, self.subspace[:, :rank].T

    def _settled(self, losses: list[float], total: float, decay: float) -> bool:
        """Whether the falls still to come are below a third of ``tolerance``.

        They shrink at least as slowly as the last two did, and as (S_{r+p} / S_r)^4, the rate of
        subspace iteration for the last component wanted.
        """
        fall = losses[-2] - losses[-1]
        if fall <= 1e-7 * total:  # float32 resolves no less
            return True
        ratio = decay
        if len(losses) > 2 and losses[-3] > losses[-2]:
            ratio = max(ratio, fall / (losses[-3] - losses[-2]))
        ratio = min(0.95, ratio)
        return fall * ratio / (1 - ratio) <= self.tolerance / 3 * losses[-1]

    def _exact(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, zt = torch.linalg.svd(matrix, full_matrices=False)
        width = min(rank + default_oversampling(rank), len(s))
        self.subspace = zt[:width].T.contiguous()
        self.log.append("exact")
        return u[:, :rank], s[:rank], zt[:rank]


def _start(matrix: Tensor, width: int) -> Tensor:
    """Gaussian start block from a generator of its own: the same for every call of this shape."""
    generator = torch.Generator().manual_seed(matrix.shape[1])
    block = torch.randn(matrix.shape[1], width, generator=generator)
    return block.to(device=matrix.device, dtype=matrix.dtype)
