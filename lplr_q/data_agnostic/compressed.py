"""What every data-agnostic method returns: codes, and how to turn them into a matrix again.

    A^ = alpha (sum over terms of L R, or Q) + beta

Glossary: ``n`` rows, ``d`` columns, ``r`` rank of a term, ``B`` bits of L, ``B'`` bits of R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from lplr_q.pack import pack_bits, unpack_bits
from workbench.errors import ConfigError, DataError


@dataclass(frozen=True)
class UniformCodes:
    """Integers of ``bits`` bits on one uniform grid: value = low + step * code."""

    codes: Int32[Tensor, "n d"]
    low: float
    step: float
    bits: int

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
        """low + step * code."""
        return self.codes.to(dtype) * self.step + self.low

    def transpose(self) -> UniformCodes:
        """The codes of the transposed matrix."""
        return replace(self, codes=self.codes.T.contiguous())

    def pack(self) -> dict[str, Tensor]:
        """Packed codes and the two float32 numbers of the grid."""
        grid = torch.tensor([self.low, self.step], dtype=torch.float32)
        return {"codes": pack_bits(self.codes, self.bits).cpu(), "grid": grid}

    @staticmethod
    def unpack(packed: Mapping[str, Tensor], shape: tuple[int, int], bits: int) -> UniformCodes:
        """Inverse of :meth:`pack`."""
        codes = unpack_bits(packed["codes"], bits, shape[0] * shape[1]).to(torch.int32)
        low, step = (float(x) for x in packed["grid"])
        return UniformCodes(codes.reshape(shape), low, step, bits)


@dataclass(frozen=True)
class Term:
    """L R, or one matrix of codes when ``left`` is None."""

    left: UniformCodes | None
    right: UniformCodes

    def product(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
        """L R (or Q) from the codes."""
        right = self.right.decode(dtype)
        return right if self.left is None else self.left.decode(dtype) @ right

    def transpose(self) -> Term:
        """The term of the transposed matrix: (L R)^T = R^T L^T."""
        if self.left is None:
            return Term(None, self.right.transpose())
        return Term(self.right.transpose(), self.left.transpose())


@dataclass(frozen=True)
class CompressedMatrix:
    """Codes of a matrix; nothing else is needed to rebuild it."""

    method: str
    shape: tuple[int, int]
    terms: tuple[Term, ...]
    affine: tuple[float, float] | None = None
    """alpha and beta of the affine post-fit."""
    history: list[float] = field(default_factory=list)
    """Relative error after each round, for methods with rounds."""

    @property
    def rank(self) -> int:
        """Components of all low-rank terms together; 0 for plain rounding."""
        return sum(t.left.codes.shape[1] for t in self.terms if t.left is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
        """The matrix, from codes."""
        total = self.terms[0].product(dtype)
        for term in self.terms[1:]:
            total = total + term.product(dtype)
        if self.affine is not None:
            total = total * self.affine[0] + self.affine[1]
        return total

    def transpose(self) -> CompressedMatrix:
        """The transposed matrix, of the same size: L and R change places."""
        n, d = self.shape
        return replace(self, shape=(d, n), terms=tuple(t.transpose() for t in self.terms))

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything that has to be stored, packed; read again by :meth:`from_tensors`."""
        tensors: dict[str, Tensor] = {}
        for i, term in enumerate(self.terms):
            for name, codes in (("left", term.left), ("right", term.right)):
                if codes is not None:
                    tensors |= {f"{i}.{name}.{key}": value for key, value in codes.pack().items()}
        if self.affine is not None:
            tensors["affine"] = torch.tensor(self.affine, dtype=torch.float32)
        return tensors

    def metadata(self) -> dict[str, Any]:
        """The few integers beside the tensors: shape, and bits and rank of every term."""
        terms = [
            {
                "rank": None if t.left is None else t.left.codes.shape[1],
                "left_bits": None if t.left is None else t.left.bits,
                "right_bits": t.right.bits,
            }
            for t in self.terms
        ]
        return {"method": self.method, "shape": list(self.shape), "terms": terms}

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> CompressedMatrix:
        """Inverse of :meth:`to_tensors`.

        Raises:
            DataError: a tensor is missing, or has not the bytes its shape needs.
        """
        n, d = metadata["shape"]

        def read(prefix: str, shape: tuple[int, int], bits: int) -> UniformCodes:
            parts: dict[str, UInt8[Tensor, " bytes"]] = {}
            for key in ("codes", "grid"):
                if f"{prefix}.{key}" not in tensors:
                    raise DataError(
                        f"no tensor {prefix}.{key}; found {', '.join(tensors) or 'none'}"
                    )
                parts[key] = tensors[f"{prefix}.{key}"]
            return UniformCodes.unpack(parts, shape, bits)

        terms = []
        for i, entry in enumerate(metadata["terms"]):
            if entry["rank"] is None:
                terms.append(Term(None, read(f"{i}.right", (n, d), entry["right_bits"])))
            else:
                r = entry["rank"]
                left = read(f"{i}.left", (n, r), entry["left_bits"])
                terms.append(Term(left, read(f"{i}.right", (r, d), entry["right_bits"])))
        affine = None
        if "affine" in tensors:
            alpha, beta = (float(x) for x in tensors["affine"])
            affine = (alpha, beta)
        return CompressedMatrix(metadata["method"], (n, d), tuple(terms), affine)

    @property
    def bits(self) -> int:
        """Stored bits: packed codes (padded to bytes), grids and the affine pair."""
        sizes = 0
        for term in self.terms:
            for codes in (term.left, term.right):
                if codes is not None:
                    sizes += 8 * ((codes.codes.numel() * codes.bits + 7) // 8) + 64
        return sizes + (0 if self.affine is None else 64)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of entries."""
        return self.bits / (self.shape[0] * self.shape[1])


def check_matrix(matrix: Tensor) -> None:
    """Raise DataError unless ``matrix`` is a finite, non-empty floating-point matrix."""
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise DataError(
            f"a {matrix.dtype} tensor of shape {tuple(matrix.shape)} cannot be compressed; "
            "expected a floating-point matrix with at least one entry"
        )
    bad = ~torch.isfinite(matrix)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(f"the matrix has {int(bad.sum())} non-finite entries, the first at {first}")


def check_rank(matrix: Tensor, rank: int) -> None:
    """Raise ConfigError unless 1 <= rank <= min(n, d)."""
    if not 1 <= rank <= min(matrix.shape):
        n, d = matrix.shape
        raise ConfigError(f"rank={rank} does not fit a {n}x{d} matrix; use 1 to {min(n, d)}")


def relative_error(matrix: Float[Tensor, "n d"], approximation: Float[Tensor, "n d"]) -> float:
    """|A - A^|_F / |A|_F, 0 for a perfect copy and 1 for a zero matrix."""
    size = float(torch.linalg.vector_norm(matrix.double()))
    error = float(torch.linalg.vector_norm(matrix.double() - approximation.double()))
    return error / max(size, 1e-300)


def fit_affine(matrix: Float[Tensor, "n d"], compressed: CompressedMatrix) -> CompressedMatrix:
    """The same codes with the alpha and beta that minimise |A - alpha A^ - beta 1|_F.

    alpha = cov(A, A^) / var(A^),   beta = mean(A) - alpha mean(A^)                 [closed form]

    Both are rounded to float32, as they are stored.
    """
    plain = replace(compressed, affine=None).dequantize(torch.float64)
    target = matrix.double()
    centred = plain - plain.mean()
    variance = float(centred.square().sum())
    alpha = float((centred * target).sum()) / variance if variance > 0 else 0.0
    beta = float(target.mean() - alpha * plain.mean())
    alpha, beta = (float(x) for x in torch.tensor([alpha, beta], dtype=torch.float32))
    return replace(compressed, affine=(alpha, beta))
