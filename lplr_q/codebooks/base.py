"""What every codebook offers, and the registry of codebooks."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import ConfigError, unknown_name

# name -> "module:factory"; a factory takes the bits per weight and returns a Codebook
CODEBOOKS: dict[str, str] = {
    "e8p": "lplr_q.codebooks.e8p:e8p_codebook",
    "lloyd-max": "lplr_q.codebooks.scalar:LloydMaxCodebook",
}


@runtime_checkable
class Codebook(Protocol):
    """A fixed set of points for unit-variance Gaussian input.

    ``dim`` coordinates become ``len(streams)`` integers of ``streams[i]`` bits each. Multiply the
    unit-variance input by ``opt_scale`` before :meth:`encode`; divide after :meth:`decode`.
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
    if ":" not in target:
        raise unknown_name("codebook", name, CODEBOOKS)
    module, _, factory = target.partition(":")
    try:
        build = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"codebook {target!r} cannot be imported: {error}") from None
    return build(bits)


def require_bits(name: str, bits: int, allowed: tuple[int, ...]) -> None:
    """Raise ConfigError when ``bits`` is not one of ``allowed``."""
    if bits not in allowed:
        choices = ", ".join(str(b) for b in allowed)
        raise ConfigError(f"codebook {name} has no {bits}-bit version; choose from {choices}")
