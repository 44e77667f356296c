"""Random sketches A S of the column space of a matrix.   [Halko, Martinsson, Tropp 2011]

Glossary: ``A`` n x d, ``S`` d x r with E[S S^T] = I, ``Y = A S`` n x r.

* ``gaussian``  independent N(0, 1/r) entries;
* ``sparse``    s entries +-1/sqrt(s) per row, one in each of s groups of columns
  [Kane & Nelson 2014, block construction];
* ``srht``      sqrt(d/r) diag(signs) Theta^T restricted to r random columns, Theta the orthonormal
  Hadamard transform of width d: O(n d log d), S is never formed.

With a Gaussian sketch of r = k + p columns, p >= 2, the range catches

    E |A - P_Y A|_F^2 <= (1 + k / (p - 1)) sum over j > k of sigma_j^2               [Theorem 10.5]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.linalg.hadamard import hadamard_transform, random_signs
from workbench.errors import ConfigError, unknown_name

Sketch = Callable[[Tensor, int, torch.Generator], Tensor]


def gaussian_sketch(
    matrix: Float[Tensor, "n d"], rank: int, generator: torch.Generator
) -> Float[Tensor, "n r"]:
    """A S with independent N(0, 1/r) entries."""
    sketch = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64)
    return matrix @ (sketch / math.sqrt(rank)).to(matrix.device, matrix.dtype)


def sparse_sketch(
    matrix: Float[Tensor, "n d"], rank: int, generator: torch.Generator, *, nonzeros: int = 8
) -> Float[Tensor, "n r"]:
    """A S with ``nonzeros`` entries +-1/sqrt(s) per row of S (all r when r is smaller).

    Costs n d s additions instead of n d r products; on a CPU the dense product is often the faster
    of the two nevertheless (benchmarks/lplr_q/matrix_compression.csv).
    """
    d = matrix.shape[1]
    s = min(nonzeros, rank)
    if s < 1:
        raise ConfigError(f"nonzeros={nonzeros} per row of a sparse sketch; use at least 1")
    edges = [rank * g // s for g in range(s + 1)]
    sketched = matrix.new_zeros(matrix.shape[0], rank)
    for low, high in pairwise(edges):
        place = torch.randint(low, high, (d,), generator=generator).to(matrix.device)
        signs = random_signs(d, generator).to(matrix.device, matrix.dtype)
        sketched.index_add_(1, place, matrix * signs)
    return sketched / math.sqrt(s)


def srht_sketch(
    matrix: Float[Tensor, "n d"], rank: int, generator: torch.Generator
) -> Float[Tensor, "n r"]:
    """A S, S the subsampled randomised Hadamard transform."""
    d = matrix.shape[1]
    signs = random_signs(d, generator).to(matrix.device, matrix.dtype)
    kept = torch.randperm(d, generator=generator)[:rank].to(matrix.device)
    return hadamard_transform(matrix * signs)[:, kept] * math.sqrt(d / rank)


# name -> function of (matrix, rank, generator)
SKETCHES: dict[str, Sketch] = {
    "gaussian": gaussian_sketch,
    "sparse": sparse_sketch,
    "srht": srht_sketch,
}


def apply_sketch(
    matrix: Float[Tensor, "n d"], rank: int, kind: str, generator: torch.Generator
) -> Float[Tensor, "n r"]:
    """A S for a sketch by name in ``SKETCHES``.

    Raises:
        ConfigError: unknown name.
    """
    if kind not in SKETCHES:
        raise unknown_name("sketch", kind, SKETCHES)
    return SKETCHES[kind](matrix, rank, generator)


def random_rotation(rank: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "r r"]:
    """An orthogonal r x r matrix, uniform up to signs: spreads unequal columns over all."""
    gaussian = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.to(like.device, like.dtype)


def sketch_range(
    matrix: Float[Tensor, "n d"],
    rank: int,
    *,
    kind: str = "gaussian",
    power_iterations: int = 0,
    orthogonal: bool = False,
    generator: torch.Generator,
) -> Float[Tensor, "n r"]:
    """Columns that span (A A^T)^q A S.

    q = 0 gives A S itself. With q > 0 the sketch becomes an orthonormal basis of the row space of
    (A^T A)^q, orthonormalised after every product. ``orthogonal`` orthonormalises the columns of
    the result. Every orthonormal basis is rotated at random, so that no column (nor later a row of
    R) is much larger than another and one grid suits them all.
    """
    if power_iterations < 0:
        raise ConfigError(f"power_iterations={power_iterations}; use 0 or more")
    sketched = apply_sketch(matrix, rank, kind, generator)
    for step in range(power_iterations):
        rows = torch.linalg.qr(matrix.T @ torch.linalg.qr(sketched).Q).Q
        if step == power_iterations - 1:
            rows = rows @ random_rotation(rank, generator, matrix)
        sketched = matrix @ rows
    if orthogonal:
        return torch.linalg.qr(sketched).Q @ random_rotation(rank, generator, matrix)
    return sketched
