"""What trains in a compressed model: signs, the first components of L and R, and how it is kept.

    W^ = D_out Theta_m^T ( Q + L_ft R_ft + L R ) Theta_n D_in,    D = diag(signs)

Codes never train. A layer that was stored without trained components is given some: its first
``ft_rank`` components are decoded once and become the parameters lora_L, lora_R; they take 16 bits
per entry from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lplr_q.activation_aware.components import release_components
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from workbench import storage
from workbench.errors import ConfigError, DataError


def release_exactly(layer: LPLRQuantizedLinear, ft_rank: int) -> None:
    """Make the first ``ft_rank`` components parameters; the matrix is unchanged up to the rounding
    of factors to 16 bits.

    Raises:
        ConfigError: fewer components than that, or other components train already.
    """
    form = layer.form
    if form.ft_rank not in (0, ft_rank) or ft_rank > form.rank:
        raise ConfigError(
            f"ft_rank={ft_rank} of a layer of rank {form.rank} with {form.ft_rank} trained "
            f"components; use at most {form.rank}"
        )
    release_components(layer, ft_rank)


def make_trainable(model: nn.Module, *, signs: bool, ft_rank: int) -> dict[str, list[nn.Parameter]]:
    """Freeze everything, then let signs and ``ft_rank`` components of every compressed layer train.

    Layers of a smaller rank train all they have. Returns the parameters as ``{"signs": […],
    "factors": […]}``.

    Raises:
        ConfigError: no compressed layer, or none has what should train.
    """
    layers = list(quantised_layers(model))
    if not layers:
        raise ConfigError(f"{type(model).__name__} holds no compressed layer; nothing to tune")
    largest = max(layer.rank for _, layer in layers)
    if ft_rank > largest:
        raise ConfigError(
            f"ft_rank={ft_rank}: the largest rank in this model is {largest}; use at most that, or "
            "compress with more bits"
        )
    if signs and not any(layer.form.rotated for _, layer in layers):
        raise ConfigError("signs cannot train: no layer was compressed with rotation (--rht)")
    model.requires_grad_(False)
    found: dict[str, list[nn.Parameter]] = {"signs": [], "factors": []}
    for _, layer in layers:
        if ft_rank and not layer.form.ft_rank:
            release_components(layer, ft_rank)
        layer.trainable(signs=signs, factors=ft_rank > 0)
        for own, parameter in layer.named_parameters():
            if parameter.requires_grad:
                found["factors" if own.startswith("lora_") else "signs"].append(parameter)
    return found


class Trained:
    """The trainable parameters of a model as a part of a run's state: nothing else is saved."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """Name → value."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put values into the model.

        Raises:
            KeyError: another set of names.
        """
        if set(state) != set(self.parameters):
            raise KeyError(f"{len(state)} trained tensors, the model has {len(self.parameters)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])


def put_trained(model: nn.Module, file: Path | str) -> None:
    """Put the tensors of a ``trained.safetensors`` onto the compressed model they were trained from
    (or one equal to it).

    Raises:
        DataError: they belong to another model.
    """
    tensors: dict[str, Any] = dict(storage.read_safetensors(Path(file)))
    layers = dict(quantised_layers(model))
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        by_layer.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    for name, own in by_layer.items():
        if name not in layers:
            raise DataError(f"{file}: {name} is no compressed layer of this model")
        layer = layers[name]
        if "lora_L" in own:
            release_exactly(layer, own["lora_L"].shape[1])
        layer.trainable(signs="signs_in" in own, factors="lora_L" in own)
        parameters = dict(layer.named_parameters())
        for key, tensor in own.items():
            target = parameters.get(key)
            if target is None or target.shape != tensor.shape:
                raise DataError(f"{file}: {name}.{key} of shape {tuple(tensor.shape)} does not fit")
            target.data.copy_(tensor)
        layer.merge_trained()
