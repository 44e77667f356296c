"""What a compressed layer stores: names, shapes and types of its tensors, and how codes become
them.

    q_codes, q_codes_2   (m, n / dim) int16 or uint8, one per stage of a lattice codebook; the
                         packed bytes of all streams for scalars and trellises
    q_tail               packed scalar codes of the last n mod dim columns
    q_scale              float32 as int32; (m, groups) bfloat16 as int16 where rows or groups of
                         columns have scales of their own
    l_codes, r_codes     packed bytes of L^T and R (int16 bfloat16 patterns at 16 bits); with a
                         codebook of blocks like q_codes, with l_tail, r_tail
    l_scales, r_scales   bfloat16 as int16, one per component
    lora_L, lora_R       the first ``ft_rank`` components as parameters, 16 bits
    signs_in, signs_out  packed bits, 1 = negative; float16 patterns as int16 once trained
    rescale              d of x / d, bfloat16 patterns as int16

All but the parameters is integer: no ``.half()`` or ``dtype=`` can change what the codes mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lplr_q.activation_aware.decompose import Decomposition
from lplr_q.activation_aware.factors import QuantisedFactor, decode_factor
from lplr_q.bits import scales_per_row
from lplr_q.codebooks.base import Codebook, make_codebook, rows_of
from lplr_q.linalg.hadamard import rotation_plan
from lplr_q.linalg.ldlq import CodebookBlocks
from lplr_q.linalg.scales import scale_width
from lplr_q.pack import pack_bits, pack_signs, packed_size, unpack_bits
from workbench.errors import ConfigError

SignForm = Literal["packed", "float"]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

ROW_TILE = 64
"""Rows are decoded in multiples of this, so that packed codes start at a byte and no tile of a
trellis is cut."""


@dataclass(frozen=True)
class Form:
    """Everything that decides shapes and types; the keyword arguments of the layer."""

    in_features: int
    out_features: int
    codebook: str = "e8p"
    q_bits: int = 2
    rank: int = 0
    l_bits: int = 4
    r_bits: int = 4
    rotated: bool = True
    factor_codebook: str = "lloyd-max"
    rescaled: bool = False
    ft_rank: int = 0
    signs: SignForm = "packed"
    rotation: str = "had"
    q_group: int = 0

    def __post_init__(self) -> None:
        m, n = self.out_features, self.in_features
        if self.rank > min(m, n) or self.rank < 0:
            raise ConfigError(f"rank={self.rank} does not fit a {m}x{n} matrix")
        if not 0 <= self.ft_rank <= self.rank:
            raise ConfigError(
                f"ft_rank={self.ft_rank} of a layer of rank {self.rank}; use 0 to {self.rank}"
            )
        if self.signs not in ("packed", "float"):
            raise ConfigError(f"signs={self.signs!r}; choose packed or float")
        if self.q_bits and self.q_group:
            scale_width(self.q_group, n, make_codebook(self.codebook, self.q_bits).dim)
        for width in (m, n) if self.rotated else ():
            rotation_plan(width, self.rotation)

    def settings(self) -> dict[str, Any]:
        """The fields; those that came later only where they are not what layers had before."""
        later = {"rotation": "had", "q_group": 0}
        fields = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        return {k: v for k, v in fields.items() if k not in later or v != later[k]}

    @property
    def coded_rank(self) -> int:
        """Components that are codes; the others are parameters."""
        return self.rank - self.ft_rank

    def layout(self) -> Layout:
        """Shape and type of every buffer."""
        m, n = self.out_features, self.in_features
        layout: Layout = {}
        if self.q_bits:
            layout |= code_layout("q", m, n, make_codebook(self.codebook, self.q_bits))
            layout["q_scale"] = ((1,), torch.int32)
            if self.q_group:
                layout["q_scale"] = ((m, scales_per_row(n, self.q_group)), torch.int16)
        if self.coded_rank:
            for name, length in (("l", m), ("r", n)):
                layout |= self._factor_layout(name, length, self.side_bits(name))
        if self.rotated:
            for name, length in (("signs_out", m), ("signs_in", n)):
                packed = ((packed_size(length, 1),), torch.uint8)
                layout[name] = packed if self.signs == "packed" else ((length,), torch.int16)
        if self.rescaled:
            layout["rescale"] = ((n,), torch.int16)
        return layout

    def side_bits(self, name: str) -> int:
        """Bits per entry of L (``l``) or R (``r``)."""
        return self.l_bits if name == "l" else self.r_bits

    def _factor_layout(self, name: str, length: int, bits: int) -> Layout:
        rank = self.coded_rank
        if bits == 16:
            return {f"{name}_codes": ((rank, length), torch.int16)}
        book = make_codebook(self.factor_codebook, bits)
        layout = code_layout(name, rank, length, book)
        layout[f"{name}_scales"] = ((rank if book.dim == 1 else 1,), torch.int16)
        return layout


def _apart(book: Codebook) -> bool:
    """Whether each stream has a tensor of its own: at most two streams of 8 or 16 bits."""
    return len(book.streams) <= 2 and all(bits in (8, 16) for bits in book.streams)


def code_layout(name: str, rows: int, width: int, book: Codebook) -> Layout:
    """Tensors that hold the codes of a (rows, width) matrix."""
    whole, tail = divmod(width, book.dim)
    layout: Layout = {}
    if whole and _apart(book):
        for place, bits in enumerate(book.streams):
            kind = torch.int16 if bits == 16 else torch.uint8
            layout[_stream(name, place)] = ((rows, whole), kind)
    elif whole:
        if len(set(book.streams)) != 1:
            raise ConfigError(
                f"codebook {book.name}: streams of {book.streams} bits cannot be stored; use equal "
                "ones, or at most two of 8 or 16 bits"
            )
        count = rows * whole * len(book.streams)
        layout[f"{name}_codes"] = ((packed_size(count, book.streams[0]),), torch.uint8)
    if tail:
        layout[f"{name}_tail"] = ((packed_size(rows * tail, int(book.bits)),), torch.uint8)
    return layout


def _stream(name: str, place: int) -> str:
    return f"{name}_codes" if place == 0 else f"{name}_codes_{place + 1}"


def pack_codes(
    name: str,
    whole: Int64[Tensor, "rows blocks streams"] | None,
    tail: Tensor | None,
    book: Codebook,
) -> dict[str, Tensor]:
    """Tensors of :func:`code_layout` from the codes."""
    state: dict[str, Tensor] = {}
    if whole is not None and _apart(book):
        for place, bits in enumerate(book.streams):
            part = whole[..., place]  # int16 wraps: the bit pattern of the unsigned code
            state[_stream(name, place)] = part.to(torch.int16 if bits == 16 else torch.uint8)
    elif whole is not None:
        state[f"{name}_codes"] = pack_bits(whole, book.streams[0])
    if tail is not None:
        state[f"{name}_tail"] = pack_bits(tail, int(book.bits))
    return state


def unpack_codes(
    codes: list[Tensor], tail: Tensor | None, book: Codebook, width: int, low: int, high: int
) -> tuple[Int64[Tensor, "rows blocks streams"] | None, Int64[Tensor, "rows t"] | None]:
    """Codes of the rows ``low`` to ``high``; ``low`` is a multiple of ROW_TILE."""
    rows, whole = high - low, width // book.dim
    found = None
    if codes and _apart(book):
        masks = [(1 << bits) - 1 for bits in book.streams]
        parts = [c[low:high].long() & mask for c, mask in zip(codes, masks, strict=True)]
        found = torch.stack(parts, dim=-1)
    elif codes:
        per_row, bits = whole * len(book.streams), book.streams[0]
        flat = _unpack_rows(codes[0], bits, per_row, low, rows)
        found = flat.reshape(rows, whole, len(book.streams))
    return found, None if tail is None else unpack_tail(tail, book, width, low, high)


def unpack_tail(
    tail: Tensor, book: Codebook, width: int, low: int, high: int
) -> Int64[Tensor, "rows t"]:
    """Scalar codes of the last columns of the rows ``low`` to ``high``."""
    count = width % book.dim
    return _unpack_rows(tail, int(book.bits), count, low, high - low).reshape(high - low, count)


def _unpack_rows(packed: Tensor, bits: int, per_row: int, low: int, rows: int) -> Tensor:
    start, count = low * per_row * bits // 8, rows * per_row
    return unpack_bits(packed[start : start + packed_size(count, bits)], bits, count)


def decode_rows(
    codes: list[Tensor], tail: Tensor | None, name: str, bits: int, width: int, low: int, high: int
) -> Float[Tensor, "rows n"]:
    """Rows of a coded matrix in unit-rms units, float32."""
    book = make_codebook(name, bits)
    blocks = CodebookBlocks(book, width)
    return blocks.decode_packed(*unpack_codes(codes, tail, book, width, low, high))


def pack_factor(name: str, factor: QuantisedFactor, skip: int, length: int) -> dict[str, Tensor]:
    """Tensors of one factor without its first ``skip`` components.

    Raises:
        ConfigError: components are coded together and ``skip`` would cut a group.
    """
    codes = factor.codes[skip:]
    if factor.bits == 16:
        return {f"{name}_codes": codes.to(torch.int16)}
    book = make_codebook(factor.codebook, factor.bits)
    if skip % rows_of(book):
        raise ConfigError(
            f"ft_rank={skip}: {book.name} codes {rows_of(book)} components together; "
            "use a multiple of it"
        )
    slots = (length // book.dim) * len(book.streams)
    whole = codes[:, :slots].unflatten(1, (-1, len(book.streams))) if slots else None
    state = pack_codes(name, whole, codes[:, slots:] if length % book.dim else None, book)
    state[f"{name}_scales"] = factor.scales[skip:] if book.dim == 1 else factor.scales
    return state


def unpack_factor(
    codes: list[Tensor],
    tail: Tensor | None,
    scales: Tensor | None,
    *,
    codebook: str,
    bits: int,
    rank: int,
    length: int,
) -> Float[Tensor, "r length"]:
    """One coded factor, float32."""
    if bits == 16 or scales is None:
        return decode_factor(codes[0], codes[0], 16)
    book = make_codebook(codebook, bits)
    whole, rest = unpack_codes(codes, tail, book, length, 0, rank)
    parts = [part.flatten(1) for part in (whole, rest) if part is not None]
    return decode_factor(torch.cat(parts, 1), scales, bits, codebook, length)


def pack_decomposition(
    result: Decomposition, bias: Tensor | None = None, ft_rank: int = 0
) -> dict[str, Tensor]:
    """The state of a layer from the codes of a decomposition."""
    state: dict[str, Tensor] = {}
    m, n = result.shape
    if result.q_codes:
        book = make_codebook(result.codebook, result.q_bits)
        tail = result.q_codes[-1] if n % book.dim else None
        whole = result.q_codes[:-1] if tail is not None else result.q_codes
        state |= pack_codes("q", torch.stack(whole, dim=1) if whole else None, tail, book)
        state["q_scale"] = torch.tensor([result.q_scale], dtype=torch.float32).view(torch.int32)
        several = getattr(result, "q_scales", None)
        if several is not None:
            state["q_scale"] = several.patterns
    if result.left is not None and result.right is not None:
        if ft_rank:
            state["lora_L"] = trained_value(result.left.decode()[:ft_rank].T)
            state["lora_R"] = trained_value(result.right.decode()[:ft_rank])
        if ft_rank < result.rank:
            state |= pack_factor("l", result.left, ft_rank, m)
            state |= pack_factor("r", result.right, ft_rank, n)
    if result.signs_out is not None and result.signs_in is not None:
        state["signs_out"] = pack_signs(result.signs_out)
        state["signs_in"] = pack_signs(result.signs_in)
    rescale = getattr(result, "rescale", None)
    if rescale is not None:
        state["rescale"] = rescale
    if bias is not None:
        state["bias"] = bias.detach()
    return state


def trained_value(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest bfloat16 that float16 holds as well: a model saved in either keeps it exactly."""
    limit = 65280.0  # the largest number both types hold
    return x.detach().to(torch.bfloat16).clamp(-limit, limit).half().to(torch.bfloat16).contiguous()


def float_signs(patterns: Any) -> Float[Tensor, " n"]:
    """float16 patterns as float32."""
    return patterns.view(torch.float16).float()
