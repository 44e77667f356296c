"""What depends on the second moment of the inputs alone, computed once and shared.

Sublayers with the same input (q, k and v; up and gate) and all rounds of the alternation use one
:class:`PreparedHessian`: one regularisation, one rotation, one Cholesky factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int8, Int16
from torch import Tensor

from lplr_q.linalg.hadamard import (
    random_signs,
    require_hadamard,
    rotate_weight_,
    rotation_plan,
    unrotate_rows,
)
from lplr_q.linalg.ldl import cholesky, cholesky_, regularise, symmetrise_, unit_lower
from lplr_q.linalg.regression import Whitening, cholesky_whitening
from workbench.errors import DataError


@dataclass(frozen=True)
class PreparedHessian:
    """Regularised and (with ``signs_in``) rotated H, its factor, and what was derived from them.

    H and C are float64, or float32 when they were made ``compact``.
    """

    matrix: Float[Tensor, "n n"]
    lower: dict[int, Tensor]
    """M of the block LDL factorisation by block width; the last one asked for."""
    factor: Float[Tensor, "n n"]
    """Cholesky factor C, H = C C^T."""
    signs_in: Int8[Tensor, " n"] | None
    channels: Float[Tensor, " n"] | None = None
    """Diagonal of H before the rotation: the energy of each input channel."""
    cache: dict[str, Tensor] = field(default_factory=dict)
    rotation: str = "had"
    """The family of Theta where ``signs_in`` are there; it holds for the outputs as well."""

    def single(self) -> Float[Tensor, "n n"]:
        """H in float32."""
        if "single" not in self.cache:
            self.cache["single"] = self.matrix.float()
        return self.cache["single"]

    def whitening(self) -> Whitening:
        """C in float32, ready for the low-rank step."""
        if "whitening" not in self.cache:
            self.cache["whitening"] = self.factor.float()
        return cholesky_whitening(self.cache["whitening"])

    def lower_for(self, block: int) -> Float[Tensor, "n n"]:
        """M for blocks of this width, float32.

        Made from C in a moment, so that of several widths only the last one stays in memory.
        """
        if block not in self.lower:
            self.lower.clear()
            self.lower[block] = unit_lower(self.factor, block)
        return self.lower[block]


def prepare_hessian(
    hessian: Float[Tensor, "n n"] | None,
    n: int,
    *,
    generator: torch.Generator | None,
    sigma: float = 1e-2,
    regularised: bool = False,
    strict: bool = False,
    compact: bool = False,
    overwrite: bool = False,
    rotation: str = "had",
) -> PreparedHessian:
    """Regularise, rotate (when a generator for the signs is given) and factor H; None means H = I.

    ``rotation`` is had, kron or fft (:mod:`lplr_q.linalg.hadamard`), on both sides of W.
    ``strict`` refuses widths without a Hadamard matrix instead of taking the fallback. ``compact``
    keeps H and C in float32 once they are computed; ``overwrite`` works in the memory of
    ``hessian``, if that is float64.
    """
    rotation_plan(n, rotation)  # complain before any work
    if hessian is None:
        matrix = torch.eye(n, dtype=torch.float64)
    elif hessian.shape != (n, n):
        raise DataError(f"Hessian of shape {tuple(hessian.shape)} for a weight with {n} inputs")
    elif regularised:
        matrix = hessian.double() if overwrite else hessian.to(torch.float64, copy=True)
    else:
        matrix = regularise(hessian, sigma=sigma, overwrite=overwrite)
    signs = None if generator is None else random_signs(n, generator)
    if strict and signs is not None:
        require_hadamard(n, rotation)
    return _prepared(matrix, signs, rotation, compact=compact)


def _prepared(
    matrix: Tensor, signs: Tensor | None, rotation: str, *, compact: bool
) -> PreparedHessian:
    """Rotates and (if compact) factors in the memory of ``matrix``."""
    channels = matrix.diagonal().clone()
    if signs is not None:
        rotate_weight_(matrix, signs, signs, rotation)
        symmetrise_(matrix)
    if not compact:
        whole = cholesky(matrix)
        return PreparedHessian(matrix, {}, whole, signs, channels, rotation=rotation)
    single = matrix.float()
    factor = cholesky_(matrix, lambda: single).float()
    return PreparedHessian(single, {}, factor, signs, channels, rotation=rotation)


def unrotated(prepared: PreparedHessian) -> Float[Tensor, "n n"]:
    """H in the basis of the channels."""
    if prepared.signs_in is None:
        return prepared.matrix
    half = unrotate_rows(prepared.matrix, prepared.signs_in, prepared.rotation)
    return unrotate_rows(half.T, prepared.signs_in, prepared.rotation)


def rescaling(
    weight: Float[Tensor, "m n"], prepared: PreparedHessian, *, overwrite: bool = False
) -> tuple[Int16[Tensor, " n"], Float[Tensor, "m n"], PreparedHessian]:
    """(d, W diag(d), H of x / d) with d_j = (H_jj / |W_:j|^2)^(1/4).   [QuIP#, rescale_WH]

    d balances the energy of input channels and weight columns. It is divided by its geometric
    mean, clipped to [1/64, 64] and rounded to bfloat16 (bit patterns are returned) before use.
    ``overwrite`` puts W diag(d) where W was.
    """
    norms = sum(rows.double().square().sum(0) for rows in weight.split(256))
    own = unrotated(prepared)
    own = own.to(torch.float64, copy=own is prepared.matrix)
    energy = own.diagonal().clone()
    usable = (norms > 0) & (energy > 0)
    d = torch.ones_like(energy)
    d[usable] = (energy[usable] / norms[usable]) ** 0.25
    if bool(usable.any()):
        d[usable] = d[usable] / d[usable].log().mean().exp()
    stored = d.clamp(1 / 64, 64).to(torch.bfloat16)
    scale = stored.double()
    matrix = own.div_(scale[:, None]).div_(scale[None, :])
    del own
    patterns = stored.view(torch.int16)
    compact = prepared.matrix.dtype == torch.float32
    new = _prepared(matrix, prepared.signs_in, prepared.rotation, compact=compact)
    single = scale.to(weight.dtype)
    return patterns, weight.mul_(single) if overwrite else weight * single, new
