"""The error of every way to store a matrix, foretold from its spectrum and at most three tries.

Rounding A = W - L R with codebook distortion ``mse`` and feedback leaves

    e^2 = a mse |A|_F^2 / (m n) m tr(D) / tr(W H W^T)
    |A|_F^2 = sum_{i>r} p_i + kappa sum_{i<=r} p_i

with D the block diagonal of LDL and p_i the power of the i-th component of the rank-constrained
regression; ``a`` (sweeps, overload by feedback) and ``kappa`` (rounded factors) are fitted. Where
a rank helps more than its power says, since what is left is rounded better, the fit is a factor
exp(-gamma f) with f the share of the power that L R takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q.activation_aware.decompose import PreparedHessian
from lplr_q.bits import FactorBits, factor_pair, layer_bits, one_or_two, rank_for_budget
from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.hadamard import rotate_weight
from workbench.errors import ConfigError

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
WIDTHS = (1, 2, 3, 4)
FIELDS = ("codebook", "q_bits", "rank", "factor_bits")


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix, the bits it takes, and its predicted squared relative error."""

    codebook: str
    q_bits: int
    rank: int
    factor_bits: FactorBits
    """Bits per entry of L and R; two numbers where they differ."""
    bits: int = 0
    error2: float = float("nan")

    def __post_init__(self) -> None:
        """A list read from a file is as good as a tuple."""
        object.__setattr__(self, "factor_bits", one_or_two(self.factor_bits))

    def entry(self) -> dict[str, Any]:
        """As written to an allocation file."""
        found = {name: getattr(self, name) for name in FIELDS}
        if isinstance(self.factor_bits, tuple):
            found["factor_bits"] = list(self.factor_bits)
        return found


# ---------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Spectrum:
    """What the prediction needs to know of one sublayer."""

    shape: tuple[int, int]
    tail: Float[Tensor, " k"]
    """Share of tr(W H W^T) that rank r leaves, for r = 0, 1, ..."""
    power: Float[Tensor, " k"]
    """|W - L_r R_r|_F^2 for r = 0, 1, ..."""
    noise: dict[int, float]
    """tr(D) / (n tr(W H W^T)) by block width: e^2 per unit of distortion and power."""
    energy: float
    """tr(W H W^T), H divided by its mean diagonal."""


def spectrum(
    weight: Float[Tensor, "m n"], prepared: PreparedHessian, *, blocks: Iterable[int] = (1, 8, 16)
) -> Spectrum:
    """Singular values of W C, the power of each component, and tr(D) of the LDL factorisations.

    W C and the rotated pair have the same singular values, so W itself may be rotated or not; the
    power of component i is S_i^2 |Z_i^T C^-1|^2, and tr(D) = sum |C_kk|^2 over diagonal blocks.
    """
    m, n = weight.shape
    own = weight.detach().double()
    if prepared.signs_in is not None:  # the basis of C; the output side changes no singular value
        plain = torch.ones(m, dtype=torch.int8)
        own = rotate_weight(own, plain, prepared.signs_in, prepared.rotation)
    factor = prepared.factor.double()
    _, values, z = torch.linalg.svd(own @ factor, full_matrices=False)
    rows = torch.linalg.solve_triangular(factor, z, upper=False, left=False)
    energy = max(float(values.square().sum()), 1e-300)
    power = values.square() * rows.square().sum(1)
    noise = {}
    for block in sorted(set(blocks)):
        trace = sum(
            float(factor[low : low + block, low : low + block].square().sum())
            for low in range(0, n, block)
        )
        noise[block] = trace / (n * energy)
    return Spectrum((m, n), _left(values.square()) / energy, _left(power), noise, energy)


def _left(parts: Float[Tensor, " k"]) -> Float[Tensor, " k1"]:
    """What is left after the first r parts, for r = 0 .. k."""
    return torch.cat([parts.flip(0).cumsum(0).flip(0), parts.new_zeros(1)])


@lru_cache(maxsize=64)
def distortion(codebook: str, bits: int, *, vectors: int = 4096) -> float:
    """Mean squared error of the codebook for unit Gaussian weights (sampled, seed 0)."""
    book = make_codebook(codebook, bits)
    rows = 16 * max(1, vectors // 16)
    x = torch.randn(rows, book.dim, generator=torch.Generator().manual_seed(0))
    points = book.decode(book.encode(x * book.opt_scale)) / book.opt_scale
    return float((x - points).square().mean())


@dataclass(frozen=True)
class Fit:
    """The corrections of a sublayer: one per width of Q, two for what a rank brings."""

    scale: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    """a by (codebook, bits), where it was measured."""
    kappa: float = 0.05
    """Noise of the rounded factors per unit of the power they take."""
    gamma: float = 0.0
    """Error that L R saves beyond its power."""

    def of(self, codebook: str, bits: int) -> float:
        """a at this width: measured, else interpolated in bits, else of the other codebooks."""
        own = {b: a for (c, b), a in self.scale.items() if c == codebook}
        own = own or {b: a for (_, b), a in self.scale.items()}
        if not own:
            return 1.0
        low = max((b for b in own if b <= bits), default=min(own))
        high = min((b for b in own if b >= bits), default=max(own))
        if low == high:
            return own[low]
        share = (bits - low) / (high - low)
        return own[low] ** (1 - share) * own[high] ** share


def least_kappa(factor_bits: FactorBits) -> float:
    """A quarter of the scalar quantiser's distortion, the mean over L and R: rounded factors are
    never free."""
    parts = (
        0.0 if bits == 16 else distortion("lloyd-max", min(8, bits)) / 4
        for bits in factor_pair(factor_bits)
    )
    return sum(parts) / 2


def predict(spectrum: Spectrum, choice: Choice, fit: Fit | None = None) -> float:
    """e^2 of a choice (module docstring); never above what zeroing the matrix would leave."""
    fit = fit or Fit()
    rank = min(choice.rank, len(spectrum.power) - 1)
    kappa = 0.0 if choice.factor_bits == 16 else max(fit.kappa, least_kappa(choice.factor_bits))
    left = float(spectrum.power[rank])
    left += kappa * (float(spectrum.power[0]) - left)
    if not choice.q_bits:
        gone = 1 - float(spectrum.tail[rank])
        return min(1.0, float(spectrum.tail[rank]) + kappa * gone)
    book = make_codebook(choice.codebook, choice.q_bits)
    noise = spectrum.noise[book.dim]
    taken = 1 - float(spectrum.power[rank]) / max(float(spectrum.power[0]), 1e-300)
    a = fit.of(choice.codebook, choice.q_bits) * math.exp(-fit.gamma * taken)
    return min(1.0, a * distortion(choice.codebook, choice.q_bits) * left * noise)


def probes(choices: Sequence[Choice], limit: int = 3) -> list[Choice]:
    """At most ``limit`` choices to measure: narrowest Q alone, the same with the middle rank,
    widest Q alone."""
    if limit < 1 or not choices:
        return []
    plain = sorted((c for c in choices if c.q_bits and not c.rank), key=lambda c: c.q_bits)
    if not plain:
        return [min(choices, key=lambda c: c.bits)][:limit]
    low, high = plain[0], plain[-1]
    same = (c for c in choices if (c.codebook, c.q_bits) == (low.codebook, low.q_bits) and c.rank)
    ranked = sorted(same, key=lambda c: c.rank)
    wanted = [low, *ranked[len(ranked) // 2 : len(ranked) // 2 + 1], high]
    return list(dict.fromkeys(wanted))[:limit]


def fit_probes(spectrum: Spectrum, measured: Mapping[Choice, float]) -> Fit:
    """The corrections that reproduce the measured e^2 of the probes.

    Choices without rank give ``a``; one with a rank then gives ``kappa`` where it leaves more
    error than exact factors would, and ``gamma`` where it leaves less.
    """
    scale: dict[tuple[str, int], float] = {}
    for choice, error2 in measured.items():
        if choice.q_bits and not choice.rank:
            plain = predict(spectrum, choice, Fit(kappa=0.0))
            scale[choice.codebook, choice.q_bits] = max(error2, 1e-30) / max(plain, 1e-30)
    fit = Fit(scale)
    for choice, error2 in measured.items():
        if not (choice.q_bits and choice.rank):
            continue
        exact = predict(spectrum, choice, Fit(scale, 0.0))
        rounded = predict(spectrum, choice, Fit(scale, 1.0))
        taken = 1 - float(spectrum.power[choice.rank]) / max(float(spectrum.power[0]), 1e-300)
        if error2 < exact and taken > 0:
            fit = Fit(scale, 0.0, math.log(exact / max(error2, 1e-30)) / taken)
        elif rounded > exact:
            least = least_kappa(choice.factor_bits)
            share = min(1.0, (error2 - exact) / (rounded - exact))
            fit = Fit(scale, least + share * (1 - least))
    return fit


# ---------------------------------------------------------------- the choices


def available_widths(codebook: str, widths: Iterable[int] = WIDTHS) -> list[int]:
    """Bits of Q this codebook has.

    Raises:
        ConfigError: unknown codebook, or none of ``widths``.
    """
    found, problem = [], None
    for bits in widths:
        try:
            make_codebook(codebook, bits)
        except ConfigError as error:
            problem = error
        else:
            found.append(bits)
    if not found:
        raise problem or ConfigError(f"no widths asked of codebook {codebook}")
    return found


def choices_for(
    m: int,
    n: int,
    *,
    codebooks: Sequence[str] = ("e8p",),
    factor_bits: FactorBits = 4,
    ranks: Iterable[int] = RANKS,
    target: float | None = None,
    rotated: bool = True,
    limit: float = 8.0,
) -> list[Choice]:
    """All candidates of an m x n matrix up to ``limit`` bits per weight.

    With ``target``, also the rank that fills it at each width: the uniform setting's choice.
    """
    found: list[Choice] = []
    for codebook in codebooks:
        for q_bits in available_widths(codebook):
            wanted = {r for r in ranks if r <= min(m, n) // 2}
            if target is not None:
                wanted.add(_filling(m, n, target, codebook, q_bits, factor_bits, rotated))
            for rank in sorted(wanted - {-1}):
                bits = layer_bits(
                    m,
                    n,
                    codebook=codebook,
                    q_bits=q_bits,
                    rank=rank,
                    factor_bits=factor_bits,
                    rotated=rotated,
                ).total
                if bits <= limit * m * n:
                    found.append(Choice(codebook, q_bits, rank, factor_bits, bits))
    return found


def _filling(
    m: int,
    n: int,
    target: float,
    codebook: str,
    q_bits: int,
    factor_bits: FactorBits,
    rotated: bool,
) -> int:
    """Largest rank within the target, -1 when Q alone exceeds it."""
    return rank_for_budget(
        m,
        n,
        target,
        codebook=codebook,
        q_bits=q_bits,
        factor_bits=factor_bits,
        rotated=rotated,
    )


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Survey:
    """What is measured once per sublayer and serves every target."""

    spectrum: Spectrum
    measured: dict[Choice, float]
    """e^2 of the probes."""
    rotated: bool

    def to_tree(self) -> dict[str, Any]:
        """For storage."""
        known = self.spectrum
        return {
            "shape": list(known.shape),
            "tail": known.tail,
            "power": known.power,
            "noise": {str(block): value for block, value in known.noise.items()},
            "energy": known.energy,
            "measured": [
                {**dataclasses.asdict(c), **c.entry(), "error2": e}
                for c, e in self.measured.items()
            ],
            "rotated": self.rotated,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Survey:
        """Inverse of :meth:`to_tree`."""
        m, n = tree["shape"]
        known = Spectrum(
            (m, n),
            tree["tail"],
            tree["power"],
            {int(block): value for block, value in tree["noise"].items()},
            tree["energy"],
        )
        measured = {
            Choice(**{**entry, "error2": math.nan}): entry["error2"] for entry in tree["measured"]
        }
        return cls(known, measured, tree["rotated"])


def survey(
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    measure: Callable[[Choice], float] | None = None,
    *,
    codebooks: Sequence[str] = ("e8p",),
    factor_bits: FactorBits = 4,
    limit: int = 3,
) -> Survey:
    """Spectrum of a sublayer and e of at most ``limit`` real decompositions per codebook.

    ``measure(choice)`` returns e, the root.
    """
    rotated = prepared.signs_in is not None
    measured: dict[Choice, float] = {}
    dims = set()
    for codebook in codebooks:
        options = choices_for(
            *weight.shape, codebooks=(codebook,), factor_bits=factor_bits, rotated=rotated
        )
        dims |= {make_codebook(c.codebook, c.q_bits).dim for c in options}
        if measure is not None:
            measured |= {c: measure(c) ** 2 for c in probes(options, limit)}
    return Survey(spectrum(weight, prepared, blocks=dims), measured, rotated)
