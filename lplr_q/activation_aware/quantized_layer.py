"""The linear layer that holds only codes: y = s_out * Theta_m^T ( (Q + L R) Theta_n (s_in * x) ) +
b.

All state but the bias is integer (codes, packed signs, and the *bit patterns* of the scales), so no
``.half()`` or ``dtype=`` can change what the codes mean. Names in the file:

    q_codes, q_codes_2   (m, n / 8) int16 or uint8 of the first and second stage; packed bytes for
    scalars q_tail               packed scalar codes of the last n mod 8 columns
    q_scale              float32 as int32      l_scales, r_scales   bfloat16 as int16, one per
    component l_codes, r_codes     packed bytes of L^T and R (int16 bfloat16 patterns at 16 bits)
    signs_in, signs_out  packed, 1 = negative
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q.activation_aware.decompose import Decomposition, rotation_kind
from lplr_q.activation_aware.factors import decode_factor
from lplr_q.bits import LayerBits, layer_bits
from lplr_q.codebooks.base import make_codebook
from lplr_q.linalg.hadamard import rotate_rows, unrotate_rows, unrotate_weight
from lplr_q.linalg.ldlq import CodebookBlocks
from lplr_q.pack import pack_bits, pack_signs, packed_size, unpack_bits, unpack_signs
from workbench.errors import ConfigError, DataError


class LPLRQuantizedLinear(nn.Module):
    """A linear layer stored as Q + L R in few bits.

    ``mode`` is ``dequant`` (codes are decoded in every forward; the layer stays small) or
    ``cached`` (the dense matrix is built once and kept; for evaluation at speed).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        codebook: str = "e8p",
        q_bits: int = 2,
        rank: int = 0,
        factor_bits: int = 4,
        rotated: bool = True,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank > min(in_features, out_features):
            raise ConfigError(f"rank={rank} does not fit a {out_features}x{in_features} matrix")
        self.in_features, self.out_features = in_features, out_features
        self.codebook, self.q_bits = codebook, q_bits
        self.rank, self.factor_bits, self.rotated = rank, factor_bits, rotated
        self.mode: Literal["dequant", "cached"] = "dequant"
        self._dense: Tensor | None = None
        self._blocks = (
            CodebookBlocks(make_codebook(codebook, q_bits), in_features) if q_bits else None
        )
        for name, (shape, kind) in self._layout().items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False)
            if bias
            else None
        )

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every buffer."""
        m, n, rank = self.out_features, self.in_features, self.rank
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.q_bits:
            book = make_codebook(self.codebook, self.q_bits)
            whole, tail = divmod(n, book.dim)
            for name, bits in zip(("q_codes", "q_codes_2"), book.streams, strict=False):
                if whole and bits in (8, 16):
                    kind = torch.int16 if bits == 16 else torch.uint8
                    layout[name] = ((m, whole), kind)
                elif whole:
                    layout[name] = ((packed_size(m * whole, bits),), torch.uint8)
            if tail:
                layout["q_tail"] = ((packed_size(m * tail, int(book.bits)),), torch.uint8)
            layout["q_scale"] = ((1,), torch.int32)
        if rank:
            for name, length in (("l", m), ("r", n)):
                if self.factor_bits == 16:
                    layout[f"{name}_codes"] = ((rank, length), torch.int16)
                else:
                    size = packed_size(rank * length, self.factor_bits)
                    layout[f"{name}_codes"] = ((size,), torch.uint8)
                    layout[f"{name}_scales"] = ((rank,), torch.int16)
        if self.rotated:
            layout["signs_out"] = ((packed_size(m, 1),), torch.uint8)
            layout["signs_in"] = ((packed_size(n, 1),), torch.uint8)
        return layout

    @classmethod
    def from_decomposition(
        cls, result: Decomposition, bias: Tensor | None = None
    ) -> LPLRQuantizedLinear:
        """Pack the codes of a decomposition."""
        m, n = result.shape
        layer = cls(
            n,
            m,
            codebook=result.codebook,
            q_bits=result.q_bits if result.q_codes else 0,
            rank=result.rank,
            factor_bits=result.left.bits if result.left is not None else 16,
            rotated=result.signs_in is not None,
            bias=bias is not None,
            dtype=None if bias is None else bias.dtype,
        )
        layer.load_state_dict(pack_decomposition(result, bias))
        return layer

    def settings(self) -> dict[str, Any]:
        """What is needed to build an empty layer of this form (goes into ``config.json``)."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "codebook": self.codebook,
            "q_bits": self.q_bits,
            "rank": self.rank,
            "factor_bits": self.factor_bits,
            "rotated": self.rotated,
            "bias": self.bias is not None,
            "rotation_in": rotation_kind(self.in_features) if self.rotated else "none",
            "rotation_out": rotation_kind(self.out_features) if self.rotated else "none",
        }

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], dtype: torch.dtype | None = None
    ) -> LPLRQuantizedLinear:
        """An empty layer from :meth:`settings`; refuses a rotation this version would build
        otherwise."""
        expected = {k: v for k, v in settings.items() if not k.startswith("rotation_")}
        layer = cls(**expected, dtype=dtype)
        for key, value in settings.items():
            if key.startswith("rotation_") and layer.settings()[key] != value:
                raise DataError(
                    f"{key} is {value!r} in the file, this version builds {layer.settings()[key]!r}"
                )
        return layer

    def stored_bits(self) -> LayerBits:
        """Bits per weight as counted; equals the bytes of the buffers."""
        return layer_bits(
            self.out_features,
            self.in_features,
            codebook=self.codebook,
            q_bits=self.q_bits,
            rank=self.rank,
            factor_bits=self.factor_bits,
            rotated=self.rotated,
        )

    def buffer_bytes(self) -> int:
        """Bytes of codes, scales and signs (the bias is not counted)."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def _rotated_matrix(self) -> Float[Tensor, "m n"]:
        """Q + L R in the rotated basis, float32, decoded from the buffers."""
        m, n = self.out_features, self.in_features
        device = self._device()
        total = torch.zeros(m, n, device=device)
        if self._blocks is not None:
            scale = self.q_scale.view(torch.float32)
            total = self._blocks.decode_packed(self._q_streams(), self._q_tail()) * scale
        if self.rank:
            left, right = self._factor("l", m), self._factor("r", n)
            total = total + left.T @ right
        return total

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _q_streams(self) -> Tensor | None:
        """(m, n // dim, streams) codes, or None when there is no whole block."""
        assert self._blocks is not None
        book = self._blocks.codebook
        m, whole = self.out_features, self.in_features // book.dim
        if not whole:
            return None
        parts = []
        for name, bits in zip(("q_codes", "q_codes_2"), book.streams, strict=False):
            stored = getattr(self, name)
            if stored.ndim == 2:
                parts.append(stored.long() & ((1 << bits) - 1))
            else:
                parts.append(unpack_bits(stored, bits, m * whole).reshape(m, whole))
        return torch.stack(parts, dim=-1)

    def _q_tail(self) -> Tensor | None:
        assert self._blocks is not None
        book = self._blocks.codebook
        m, tail = self.out_features, self.in_features % book.dim
        if not tail:
            return None
        return unpack_bits(self.q_tail, int(book.bits), m * tail).reshape(m, tail)

    def _factor(self, name: str, length: int) -> Float[Tensor, "r length"]:
        codes = getattr(self, f"{name}_codes")
        if self.factor_bits == 16:
            return codes.view(torch.bfloat16).float()
        codes = unpack_bits(codes, self.factor_bits, self.rank * length).reshape(self.rank, length)
        return decode_factor(codes, getattr(self, f"{name}_scales"), self.factor_bits)

    def signs(self) -> tuple[Tensor, Tensor]:
        """(signs_out, signs_in) as +-1."""
        return (
            unpack_signs(self.signs_out, self.out_features),
            unpack_signs(self.signs_in, self.in_features),
        )

    def dequantize(self) -> Float[Tensor, "m n"]:
        """The dense matrix in its own basis, float32."""
        matrix = self._rotated_matrix()
        if self.rotated:
            signs_out, signs_in = self.signs()
            matrix = unrotate_weight(matrix, signs_out, signs_in)
        return matrix

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """The dense matrix, for code that only looks at a linear layer's ``weight``; a copy."""
        return self.dequantize()

    def set_mode(self, mode: Literal["dequant", "cached"]) -> LPLRQuantizedLinear:
        """Choose between decoding at every call and a dense copy built at the next call."""
        if mode not in ("dequant", "cached"):
            raise ConfigError(f"mode={mode!r}; choose dequant or cached")
        self.mode, self._dense = mode, None
        return self

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """W^ x + b in the type of x; x is not changed."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.mode == "cached":
            if self._dense is None or self._dense.dtype != x.dtype:
                with torch.no_grad():
                    self._dense = self.dequantize().to(x.dtype)
            return nn.functional.linear(x, self._dense, bias)
        matrix = self._rotated_matrix().to(x.dtype)
        if not self.rotated:
            return nn.functional.linear(x, matrix, bias)
        signs_out, signs_in = self.signs()
        inner = rotate_rows(x.float(), signs_in).to(x.dtype)
        y = nn.functional.linear(inner, matrix)
        y = unrotate_rows(y.float(), signs_out).to(x.dtype)
        return y if bias is None else y + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LPLRQuantizedLinear:
        self._dense = None  # rebuilt on the new device
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shape and bits for ``print(model)``."""
        bits = self.stored_bits().per_weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.codebook} {self.q_bits} bits, rank {self.rank}, {bits:.3f} bits per weight"
        )


def pack_decomposition(result: Decomposition, bias: Tensor | None = None) -> dict[str, Tensor]:
    """The buffers of a layer from the codes of a decomposition."""
    state: dict[str, Tensor] = {}
    if result.q_codes:
        book = make_codebook(result.codebook, result.q_bits)
        tail = result.shape[1] % book.dim
        whole = result.q_codes[:-1] if tail and book.dim > 1 else result.q_codes
        if whole:
            stacked = torch.stack(whole, dim=1)
            for i, (name, bits) in enumerate(
                zip(("q_codes", "q_codes_2"), book.streams, strict=False)
            ):
                part = stacked[..., i]
                if bits == 16:
                    state[name] = part.to(torch.int16)  # wraps: bit pattern of the unsigned code
                elif bits == 8:
                    state[name] = part.to(torch.uint8)
                else:
                    state[name] = pack_bits(part, bits)
        if tail:
            state["q_tail"] = pack_bits(result.q_codes[-1], int(book.bits))
        state["q_scale"] = torch.tensor([result.q_scale], dtype=torch.float32).view(torch.int32)
    for name, factor in (("l", result.left), ("r", result.right)):
        if factor is None:
            continue
        if factor.bits == 16:
            state[f"{name}_codes"] = factor.codes.to(torch.int16)
        else:
            state[f"{name}_codes"] = pack_bits(factor.codes, factor.bits)
            state[f"{name}_scales"] = factor.scales
    if result.signs_out is not None and result.signs_in is not None:
        state["signs_out"] = pack_signs(result.signs_out)
        state["signs_in"] = pack_signs(result.signs_in)
    if bias is not None:
        state["bias"] = bias.detach()
    return state


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, LPLRQuantizedLinear]]:
    """All compressed layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LPLRQuantizedLinear):
            yield name, module


def set_mode(model: nn.Module, mode: Literal["dequant", "cached"]) -> nn.Module:
    """:meth:`LPLRQuantizedLinear.set_mode` for every compressed layer."""
    for _, layer in quantised_layers(model):
        layer.set_mode(mode)
    return model
