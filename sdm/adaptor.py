"""The exemplar adaptor: one affine map to exemplar space and one to the logits.

    x = (h − μ)/σ        scalar μ, σ over all entries of the training matrix
    h' = G x + g         exemplar vector, width M (formally a convolution of kernel width D)
    z' = W' h' + b'      logits

Distances between exemplar vectors are ‖G (x − x')‖. With G = Q R (QR decomposition) they equal
‖R (x − x')‖, so matching takes place in min(D, M) dimensions, exactly. The two maps have no
non-linearity between them, so logits only need W'G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Adaptor:
    """The fitted maps of one iteration."""

    centre: Float[Tensor, ""]
    """μ, float64."""
    scale: Float[Tensor, ""]
    """σ, float64."""
    weight: Float[Tensor, "exemplar width"]
    """G."""
    bias: Float[Tensor, " exemplar"]
    """g."""
    head_weight: Float[Tensor, "classes exemplar"]
    """W'."""
    head_bias: Float[Tensor, " classes"]
    """b'."""

    def logits(self, hidden: Float[Tensor, "points width"]) -> Float[Tensor, "points classes"]:
        """z', in double precision."""
        weight, offset = fuse(
            self.weight.double(),
            self.bias.double(),
            self.head_weight.double(),
            self.head_bias.double(),
        )
        return self._standard(hidden) @ weight.mT + offset

    def exemplars(self, hidden: Float[Tensor, "points width"]) -> Float[Tensor, "points exemplar"]:
        """h', in double precision."""
        return self._standard(hidden) @ self.weight.double().mT + self.bias.double()

    def points(self, hidden: Float[Tensor, "points width"]) -> Float[Tensor, "points rank"]:
        """Coordinates with the distances of the exemplar vectors, min(D, M) of them."""
        weight = self.weight.double()
        if weight.shape[1] < weight.shape[0]:
            weight = torch.linalg.qr(weight, mode="r").R
        return self._standard(hidden) @ weight.mT

    def _standard(self, hidden: Tensor) -> Tensor:
        return (hidden.double() - self.centre) / self.scale

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def fuse(
    weight: Float[Tensor, "*runs exemplar width"],
    bias: Float[Tensor, "*runs exemplar"],
    head_weight: Float[Tensor, "*runs classes exemplar"],
    head_bias: Float[Tensor, "*runs classes"],
) -> tuple[Float[Tensor, "*runs classes width"], Float[Tensor, "*runs classes"]]:
    """The one affine map from standardised input to logits: (W'G, W'g + b')."""
    offset = (head_weight @ bias.unsqueeze(-1)).squeeze(-1) + head_bias
    return head_weight @ weight, offset


def initial_parameters(
    width: int, exemplar_dim: int, n_classes: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh parameters, uniform in ±1/√fan_in as torch's layers have them."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        bound = 1 / math.sqrt(fan_in)
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    return {
        "weight": uniform(exemplar_dim, width, fan_in=width),
        "bias": uniform(exemplar_dim, fan_in=width),
        "head_weight": uniform(n_classes, exemplar_dim, fan_in=exemplar_dim),
        "head_bias": uniform(n_classes, fan_in=exemplar_dim),
    }
