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

from lplr_q.activation_aware.layer_state import (
    code_layout,
    pack_codes,
    trained_value,
    unpack_codes,
)
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from lplr_q.codebooks.base import make_codebook
from workbench import storage
from workbench.errors import ConfigError, DataError


def with_trained_rank(layer: LPLRQuantizedLinear, ft_rank: int) -> LPLRQuantizedLinear:
    """The same layer with its first ``ft_rank`` components as parameters; the matrix is unchanged
    up to the rounding of factors to 16 bits.

    Raises:
        ConfigError: fewer components than that, or other components train already.
    """
    form = layer.form
    if form.ft_rank == ft_rank:
        return layer
    if form.ft_rank or ft_rank > form.rank:
        raise ConfigError(
            f"ft_rank={ft_rank} of a layer of rank {form.rank} with {form.ft_rank} trained "
            f"components; use at most {form.rank}"
        )
    settings = {**layer.settings(), "ft_rank": ft_rank}
    kind = None if layer.bias is None else layer.bias.dtype
    new = LPLRQuantizedLinear.from_settings(settings, dtype=kind)
    state = {k: t.detach().cpu() for k, t in layer.state_dict().items() if k[:2] not in _FACTORS}
    state["lora_L"] = trained_value(_decoded(layer, "l")[:ft_rank].T)
    state["lora_R"] = trained_value(_decoded(layer, "r")[:ft_rank])
    if ft_rank < form.rank:
        state |= _rest(layer, "l", ft_rank) | _rest(layer, "r", ft_rank)
    new.load_state_dict(state)
    return new.to(_device(layer))


_FACTORS = ("l_", "r_")


def _device(layer: LPLRQuantizedLinear) -> torch.device:
    return next(layer.buffers()).device


def _decoded(layer: LPLRQuantizedLinear, name: str) -> Tensor:
    return layer.factor(name).detach().float().cpu()


def _rest(layer: LPLRQuantizedLinear, name: str, skip: int) -> dict[str, Tensor]:
    """Code tensors of one factor without its first ``skip`` components."""
    form = layer.form
    stored = {k: t.cpu() for k, t in layer.state_dict().items() if k.startswith(f"{name}_")}
    if form.factor_bits == 16:
        return {f"{name}_codes": stored[f"{name}_codes"][skip:].contiguous()}
    book = make_codebook(form.factor_codebook, form.factor_bits)
    length = layer.out_features if name == "l" else layer.in_features
    tail = stored.get(f"{name}_tail")
    names = [k for k in code_layout(name, form.rank, length, book) if not k.endswith("_tail")]
    codes = [stored[k] for k in names]
    whole, rest = unpack_codes(codes, tail, book, length, 0, form.rank)
    whole = None if whole is None else whole[skip:]
    state = pack_codes(name, whole, None if rest is None else rest[skip:], book)
    scales = stored[f"{name}_scales"]
    state[f"{name}_scales"] = scales[skip:].contiguous() if book.dim == 1 else scales
    return state


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
    for name, layer in layers:
        new = layer
        if ft_rank and not layer.form.ft_rank:
            new = with_trained_rank(layer, min(ft_rank, layer.rank))
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
        new.trainable(signs=signs, factors=ft_rank > 0)
        for own, parameter in new.named_parameters():
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
            layer = with_trained_rank(layer, own["lora_L"].shape[1])
        layer.trainable(signs="signs_in" in own, factors="lora_L" in own)
        parameters = dict(layer.named_parameters())
        for key, tensor in own.items():
            target = parameters.get(key)
            if target is None or target.shape != tensor.shape:
                raise DataError(f"{file}: {name}.{key} of shape {tuple(tensor.shape)} does not fit")
            target.data.copy_(tensor)
        layer.merge_trained()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
