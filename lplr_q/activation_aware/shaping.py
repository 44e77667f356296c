"""The Hessian Q is rounded under: plain, or blind in the directions L R can repair.

``plain``     H.
``downdate``  H' = H - C V V^T C^T with V the right singular vectors of L R C: directions L R
              already covers are left out.   [CALDERA, Q_hessian_downdate]
``projq``     H_perp = C (I - P P^T) C^T with P the leading right singular vectors of (W - Q) C:
              directions the next L R step will cover are left out.   [ProjQ]

Both get sigma_2 (1 + mean diag) I added, sigma_2 = 1e-2; H' is positive semidefinite by its form,
so the published extra shift by its negative eigenvalues is zero. The error is always measured with
H itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.linalg.ldl import symmetrise_
from lplr_q.linalg.regression import Whitening
from lplr_q.linalg.rows import row_chunks

Q_HESSIANS = ("plain", "downdate", "projq")
SIGMA_2 = 1e-2


def blind_hessian(
    hessian: Float[Tensor, "n n"],
    whitening: Whitening,
    directions: Float[Tensor, "n r"],
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n n"]:
    """C (I - V V^T) C^T + sigma_2 (1 + mean diag) I for orthonormal V and H = C C^T.

    Rows are computed in float64 and stored as ``dtype``.
    """
    wide = directions.double()
    covered = torch.cat([rows.double() @ wide for rows in whitening.forward.split(256)])
    matrix = torch.empty(hessian.shape, dtype=dtype, device=hessian.device)
    for rows in row_chunks(len(matrix)):
        matrix[rows] = hessian[rows].double() - covered[rows] @ covered.T
    symmetrise_(matrix)
    shift = SIGMA_2 * (1 + float(matrix.diagonal().mean()))
    matrix.diagonal().add_(shift)
    return matrix


def covered_directions(right: Float[Tensor, "r n"], whitening: Whitening) -> Float[Tensor, "n r"]:
    """V: orthonormal basis of the rows of R C, the row space of L R C."""
    return torch.linalg.qr((right.to(whitening.forward.dtype) @ whitening.forward).T).Q
