"""R models of one structure and their optimiser, with a leading axis of replicas.

Glossary: R replicas, P parameters of one replica.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.errors import ConfigError


class StackedModel:
    """R models of one structure: all weights in one (R, P) tensor, one forward pass for all.

    Attention takes torch's plain form (its fused kernels have no rule for a stacked axis on a CPU).
    Buffers are stacked too, but what a layer writes into them in `forward` is not kept.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.blank = copy.deepcopy(models[0]).to("meta")
        kept = [dict(model.named_parameters()) for model in models]
        self.shapes = {name: p.shape for name, p in kept[0].items() if p.requires_grad}
        for model, parameters in zip(models, kept, strict=True):
            found = {name: p.shape for name, p in parameters.items() if p.requires_grad}
            if found != self.shapes:
                raise ConfigError(
                    f"replicas differ in their parameters: {type(model).__name__} has "
                    f"{sorted(set(found.items()) ^ set(self.shapes.items()))[:4]}; a stack holds "
                    "models of one structure"
                )
        self.weights = torch.stack(
            [torch.cat([own[name].detach().flatten() for name in self.shapes]) for own in kept]
        )
        constants = [
            {name: p.detach() for name, p in own.items() if name not in self.shapes}
            | dict(model.named_buffers())
            for own, model in zip(kept, models, strict=True)
        ]
        self.constants = {
            name: torch.stack([one[name] for one in constants]) for name in constants[0]
        }

    def named(self, weights: Float[Tensor, "*replicas params"]) -> dict[str, Tensor]:
        """The parameters by name, as views."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for (name, shape), part in zip(
                self.shapes.items(), weights.split(sizes, dim=-1), strict=True
            )
        }

    def __call__(
        self,
        weights: Float[Tensor, "replicas params"],
        ids: Int[Tensor, "replicas batch time"],
    ) -> Float[Tensor, "replicas batch time vocab"]:
        """Logits of every replica on its own rows."""

        def one(parameters: dict[str, Tensor], constants: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.blank, parameters | constants, (x,))

        with sdpa_kernel(SDPBackend.MATH):
            return vmap(one, randomness="different")(self.named(weights), self.constants, ids)

    def state(self, row: int) -> dict[str, Tensor]:
        """What `state_dict` of that replica's own module would give, as copies."""
        own = self.named(self.weights[row]) | {k: v[row] for k, v in self.constants.items()}
        return {name: own[name].detach().clone() for name in self.blank.state_dict()}

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Take all other replicas out."""
        self.weights = self.weights[rows]
        self.constants = {name: value[rows] for name, value in self.constants.items()}


class StackedOptimizer:
    """AdamW or SGD with a learning rate, a weight decay and a gradient norm per replica.

    AdamW as torch has it: w ← (1 − ηλ) w − η m̂ / (√v̂ + 10⁻⁸)   [arXiv 1711.05101, alg. 2]. Rows of
    a replica that is not `alive` stay as they are.
    """

    def __init__(
        self,
        kind: str,
        weights: Float[Tensor, "replicas params"],
        decay: Float[Tensor, "replicas params"],
        betas: tuple[float, float],
        clip_norm: float,
    ) -> None:
        self.kind, self.decay, self.betas, self.clip_norm = kind, decay, betas, clip_norm
        self.count = 0
        self.mean = torch.zeros_like(weights)
        self.square = torch.zeros_like(weights)

    def norm(self, gradient: Float[Tensor, "replicas params"]) -> Float[Tensor, " replicas"]:
        """2-norm of every replica's gradient."""
        return torch.linalg.vector_norm(gradient, dim=-1)

    def update(
        self,
        weights: Float[Tensor, "replicas params"],
        gradient: Float[Tensor, "replicas params"],
        norm: Float[Tensor, " replicas"],
        lr: Float[Tensor, " replicas"],
        alive: Bool[Tensor, " replicas"],
    ) -> None:
        """Clip and step, in place."""
        self.count += 1
        alive, rate = alive[:, None], lr[:, None]
        if self.clip_norm > 0:
            share = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradient = gradient * share[:, None]
        if self.kind == "sgd":
            new = weights - rate * (gradient + self.decay * weights)
        else:
            first, second = self.betas
            mean = torch.lerp(self.mean, gradient, 1 - first)
            square = self.square * second + (1 - second) * gradient * gradient
            self.mean = torch.where(alive, mean, self.mean)
            self.square = torch.where(alive, square, self.square)
            scale = (square / (1 - second**self.count)).sqrt() + 1e-8
            step = mean / (1 - first**self.count) / scale
            new = weights * (1 - rate * self.decay) - rate * step
        weights.copy_(torch.where(alive, new, weights))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Take all other replicas out."""
        self.decay, self.mean, self.square = (
            part[rows] for part in (self.decay, self.mean, self.square)
        )
