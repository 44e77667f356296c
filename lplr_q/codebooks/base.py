"""What every codebook offers, and the registry of codebooks."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import ConfigError, unknown_name

_TRELLIS = "lplr_q.codebooks.tcq:trellis_codebook"

# name -> "module:factory"; a factory takes the bits per weight and returns a Codebook.
# "module:factory:" (a colon at the end) gives it the name first: one factory for a family of names
CODEBOOKS: dict[str, str] = {
    "e8p": "lplr_q.codebooks.e8p:e8p_codebook",
    "lloyd-max": "lplr_q.codebooks.scalar:LloydMaxCodebook",
    "uniform": "lplr_q.codebooks.uniform:UniformCodebook",
    "tcq": f"{_TRELLIS}:",
    **{
        f"tcq-{window}{kind}": f"{_TRELLIS}:"
        for window in (8, 10, 12)
        for kind in ("", "-1mad", "-random", "-3inst", "-16x16")
    },
}


@runtime_checkable
class Codebook(Protocol):
    """A fixed set of points for unit-variance Gaussian input.

    ``dim`` coordinates become ``len(streams)`` integers of ``streams[i]`` bits each. Multiply the
    unit-variance input by ``opt_scale`` before :meth:`encode`; divide after :meth:`decode`.

    A codebook may have an attribute ``rows``: so many rows of a matrix are coded together
    (:func:`row_groups`), and the first axis of what is encoded counts rows. Without it every row
    stands alone.
    """

    name: str
    bits: float
    dim: int
    streams: tuple[int, ...]
    opt_scale: float

    def encode(self, x: Float[Tensor, "*batch d"]) -> Int64[Tensor, "*batch s"]:
        """Codes of the point chosen for each vector along the last axis."""
        ...

    def decode(self, codes: Int64[Tensor, "*batch s"]) -> Float[Tensor, "*batch d"]:
        """The points of the codes, float32."""
        ...


@lru_cache(maxsize=64)
def make_codebook(name: str, bits: int) -> Codebook:
    """The codebook by registry name or ``module:factory``.

    Raises:
        ConfigError: unknown name, or bits this codebook does not have.
    """
    target = CODEBOOKS.get(name, name)
    if name not in CODEBOOKS and name.startswith("tcq-"):
        target = f"{_TRELLIS}:"  # the family has more members than are listed
    if ":" not in target:
        raise unknown_name("codebook", name, CODEBOOKS)
    module, _, factory = target.partition(":")
    factory, colon, _ = factory.partition(":")
    try:
        build = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"codebook {target!r} cannot be imported: {error}") from None
    return build(name, bits) if colon else build(bits)


def rows_of(codebook: object) -> int:
    """How many rows the codebook codes together."""
    return int(getattr(codebook, "rows", 1))


def row_groups(m: int, rows: int) -> list[tuple[int, int]]:
    """(how many, height) of the groups of rows coded together, first to last; what is left over
    makes a group of its own.

    >>> row_groups(40, 16), row_groups(3, 16)
    ([(2, 16), (1, 8)], [(1, 3)])
    """
    whole, rest = divmod(m, rows)
    return [(count, height) for count, height in ((whole, rows), (1, rest)) if count and height]


def decode_matrix(codebook: Codebook, codes: Int64[Tensor, "m blocks s"]) -> Tensor:
    """(m, blocks * dim) points of the codes of whole blocks; the codebook's own form if it has
    one."""
    own = getattr(codebook, "decode_matrix", None)
    return codebook.decode(codes).flatten(1) if own is None else own(codes)


def require_bits(name: str, bits: int, allowed: tuple[int, ...]) -> None:
    """Raise ConfigError when ``bits`` is not one of ``allowed``."""
    if bits not in allowed:
        choices = ", ".join(str(b) for b in allowed)
        raise ConfigError(f"codebook {name} has no {bits}-bit version; choose from {choices}")
