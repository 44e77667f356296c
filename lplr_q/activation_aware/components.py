"""Components of L R in and out of a compressed layer: as LoRA pairs, as codes, as parameters.

In the layer's own basis a component pair is lora_B (m, r), lora_A (r, n) with
W^ = Q^ + lora_B lora_A; inside it is L = Theta_m diag(1 / s_out) lora_B and
R = lora_A diag(d / s_in) Theta_n^T.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q.activation_aware.layer_state import pack_codes, trained_value, unpack_codes
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from lplr_q.codebooks.base import make_codebook, rows_of
from lplr_q.linalg.hadamard import rotate_rows
from workbench.errors import ConfigError


def add_components(
    layer: LPLRQuantizedLinear, left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]
) -> LPLRQuantizedLinear:
    """Add left right (own basis) to the matrix as parameters behind those already there.

    They are rounded to bfloat16 unless the layer's parameters are in float32 for training.

    Raises:
        ConfigError: shapes that do not fit, or more components than the matrix has.
    """
    m, n = layer.out_features, layer.in_features
    if left.shape[0] != m or right.shape[1] != n or left.shape[1] != right.shape[0]:
        raise ConfigError(
            f"components of shapes {tuple(left.shape)} and {tuple(right.shape)} for a {m}x{n} layer"
        )
    count = right.shape[0]
    if layer.form.rank + count > min(m, n):
        raise ConfigError(
            f"{layer.form.rank} + {count} components do not fit a {m}x{n} matrix; take some out"
        )
    device = next(layer.buffers()).device
    left = left.detach().to(device=device, dtype=torch.float32)
    right = right.detach().to(device=device, dtype=torch.float32)
    divisor = layer.input_divisor()
    if divisor is not None:
        right = right * divisor
    if layer.form.rotated:
        signs_out, signs_in = (1 / s.detach().float() for s in layer.signs())
        family = layer.form.rotation
        left = rotate_rows(left.T, signs_out, family).T
        right = rotate_rows(right, signs_in, family)
    _append(layer, left, right)
    return layer


def _append(layer: LPLRQuantizedLinear, left: Tensor, right: Tensor) -> None:
    """Parameters (rotated basis) behind those already there."""
    for name, value, axis in (("lora_L", left, 1), ("lora_R", right, 0)):
        old = layer._parameters.get(name)
        kept = old is not None and old.dtype == torch.float32
        new = value if kept else trained_value(value)
        joined = new if old is None else torch.cat([old.detach(), new.to(old.dtype)], axis)
        trains = old is not None and old.requires_grad
        _set(layer, name, nn.Parameter(joined.contiguous(), requires_grad=trains))
    more = right.shape[0]
    layer.reform(rank=layer.form.rank + more, ft_rank=layer.form.ft_rank + more)


def _set(layer: LPLRQuantizedLinear, name: str, value: nn.Parameter | None) -> None:
    layer._parameters.pop(name, None)
    if value is not None:
        layer.register_parameter(name, value)


def drop_components(layer: LPLRQuantizedLinear, count: int) -> LPLRQuantizedLinear:
    """Take the last ``count`` parameters' components out again."""
    left = layer.form.ft_rank - count
    if count < 0 or left < 0:
        raise ConfigError(f"{count} components of {layer.form.ft_rank} cannot be taken out")
    for name, axis in (("lora_L", 1), ("lora_R", 0)):
        old = layer._parameters[name]
        assert old is not None
        value = old.detach().narrow(axis, 0, left).contiguous()
        _set(layer, name, nn.Parameter(value, requires_grad=old.requires_grad) if left else None)
    layer.reform(rank=layer.form.rank - count, ft_rank=left)
    return layer


def take_factors(layer: LPLRQuantizedLinear) -> dict[str, Tensor]:
    """Remove L R from the layer and return it as LoRA pair; Q stays."""
    state = layer.lora_state()
    for name in list(layer._buffers):
        if name.startswith(("l_", "r_")):
            del layer._buffers[name]
    for name in ("lora_L", "lora_R"):
        _set(layer, name, None)
    layer.reform(rank=0, ft_rank=0)
    return state


def release_components(layer: LPLRQuantizedLinear, ft_rank: int) -> LPLRQuantizedLinear:
    """Turn the first coded components into parameters until there are ``ft_rank`` of them.

    A layer with fewer components gives all it has.

    Raises:
        ConfigError: the factors' codebook codes components in groups and one would be cut.
    """
    form = layer.form
    count = min(ft_rank, form.rank) - form.ft_rank
    if count <= 0:
        return layer
    left = layer.factor("l")[:count].T.contiguous()
    right = layer.factor("r")[:count].contiguous()
    for name, length in (("l", layer.out_features), ("r", layer.in_features)):
        for key, value in _without(layer, name, length, count).items():
            if value is None:
                del layer._buffers[key]
            else:
                layer._buffers[key] = value
    layer.reform(rank=form.rank - count)
    _append(layer, left, right)
    return layer


def _without(
    layer: LPLRQuantizedLinear, name: str, length: int, count: int
) -> dict[str, Tensor | None]:
    """Buffers of one factor without its first ``count`` components; None where nothing is left."""
    form = layer.form
    own = [key for key in layer._buffers if key.startswith(f"{name}_")]
    if count == form.coded_rank:
        return dict.fromkeys(own)
    codes, tail = layer.codes(name)
    if form.side_bits(name) == 16:
        return {f"{name}_codes": codes[0][count:].clone()}
    book = make_codebook(form.factor_codebook, form.side_bits(name))
    if count % rows_of(book):
        raise ConfigError(
            f"ft_rank={count}: {book.name} codes {rows_of(book)} components together; "
            "use a multiple of it"
        )
    whole, rest = unpack_codes(codes, tail, book, length, 0, form.coded_rank)
    state: dict[str, Tensor | None] = {}
    state |= pack_codes(
        name,
        None if whole is None else whole[count:],
        None if rest is None else rest[count:],
        book,
    )
    if book.dim == 1:
        state[f"{name}_scales"] = layer._buffers[f"{name}_scales"][count:].clone()
    return state
