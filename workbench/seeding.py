"""Named random streams from one seed; no global generator is ever seeded.

A stream is keyed by SHA-256(seed, name, index), so sample 17 of "data/train" is the same whatever
the number of workers, the order of calls or the size of a split, and two names never share a
stream. numpy streams are Philox (counter-based) [Salmon et al. 2011, "Parallel Random Numbers: As
Easy as 1, 2, 3"].
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class Streams:
    """All random streams of one seed.

    >>> streams = Streams(0)
    >>> streams("data", index=3).integers(100) == Streams(0)("data", index=3).integers(100)
    True
    """

    def __init__(self, seed: int):
        self.seed = int(seed)

    def _digest(self, name: str, index: int) -> bytes:
        return hashlib.sha256(f"fivefold:{self.seed}:{name}:{index}".encode()).digest()

    def __call__(self, name: str, index: int = 0) -> np.random.Generator:
        """A numpy generator at the start of the stream."""
        key = np.frombuffer(self._digest(name, index)[:16], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def integer(self, name: str, index: int = 0) -> int:
        """A seed in [0, 2**63) for libraries that want one."""
        return int.from_bytes(self._digest(name, index)[:8], "little") >> 1

    def torch(self, name: str, index: int = 0, device: str = "cpu") -> torch.Generator:
        """A torch generator at the start of the stream."""
        import torch

        return torch.Generator(device=device).manual_seed(self.integer(name, index))


def set_global(seed: int) -> None:
    """Put the global generators of python, numpy and torch at the start of a stream.

    Our own code draws from named streams only; this is for what libraries draw behind our back
    (dropout, sampling in `generate`), so that the same command gives the same result.
    """
    import random

    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, Any]:
    """The states of the global generators of python, numpy and torch, as a storable tree."""
    import random

    import torch

    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), np.asarray(keys), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = list(torch.cuda.get_rng_state_all())
    return states


def restore(states: dict[str, Any]) -> None:
    """Set the global generators to a captured state; a missing part raises KeyError."""
    import random

    import torch

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
