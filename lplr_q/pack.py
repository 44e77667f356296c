"""Codes of 1 to 16 bits packed without gaps into bytes, little-endian.

Code i occupies bits i*b .. i*b + b - 1 of the byte string; the last byte is padded with zeros.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from workbench.errors import ConfigError, DataError


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> packed_size(3, 3)
    2
    """
    return (count * bits + 7) // 8


_PIECE = 1 << 16  # codes packed at a time: a multiple of 8, and few megabytes of work


def code_dtype(bits: int) -> torch.dtype:
    """The smallest integer type that holds codes of so many bits.

    >>> code_dtype(2), code_dtype(16)
    (torch.uint8, torch.int32)
    """
    return torch.uint8 if bits <= 8 else torch.int16 if bits < 16 else torch.int32


def pack_bits(codes: Int[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack codes in row-major order.

    Raises:
        ConfigError: bits not in 1..16.
        DataError: a code outside 0..2^bits - 1.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise DataError(f"codes span {int(flat.min())}..{int(flat.max())}, not {bits} bits")
    if bits == 8:
        return flat.to(torch.uint8)
    packed = [_packed(piece.long(), bits) for piece in flat.split(_PIECE)]
    return torch.cat(packed)


def _packed(flat: Int64[Tensor, " codes"], bits: int) -> UInt8[Tensor, " bytes"]:
    run = 8 // math.gcd(bits, 8)  # so many codes fill whole bytes
    width = bits * run // 8
    padded = flat.new_zeros(-(-flat.numel() // run) * run)
    padded[: flat.numel()] = flat
    columns = padded.reshape(-1, run).T
    found = torch.zeros(padded.numel() // run, width, dtype=torch.long, device=flat.device)
    for place in range(run):
        low, shift = divmod(bits * place, 8)
        moved = columns[place] << shift
        for byte in range(low, min(low + (bits + shift + 7) // 8, width)):
            found[:, byte] |= (moved >> (8 * (byte - low))) & 255
    return found.view(-1)[: packed_size(flat.numel(), bits)].to(torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int64[Tensor, " count"]:
    """The first ``count`` codes.

    Raises:
        DataError: fewer bytes than that many codes need.
    """
    _check_bits(bits)
    if packed.numel() != packed_size(count, bits):
        raise DataError(
            f"{packed.numel()} bytes hold no {count} codes of {bits} bits "
            f"({packed_size(count, bits)} bytes expected); the file is damaged or of another shape"
        )
    if bits == 8:
        return packed.long()
    if bits < 8:
        return _unpack_words(packed, bits)[:count]
    spare = torch.zeros(3, dtype=torch.long, device=packed.device)
    window = torch.cat([packed.long(), spare])
    start = torch.arange(count, device=packed.device) * bits
    byte = start >> 3
    value = window[byte] | (window[byte + 1] << 8) | (window[byte + 2] << 16)
    return (value >> (start & 7)) & ((1 << bits) - 1)


def _unpack_words(packed: UInt8[Tensor, " bytes"], bits: int) -> Int64[Tensor, " codes"]:
    """All codes of fewer than 8 bits, and some zeros: the shortest run of codes that ends at a byte
    is one integer."""
    codes = 8 // math.gcd(bits, 8)
    width = bits * codes // 8
    missing = -packed.numel() % width
    if missing:
        packed = torch.cat([packed, packed.new_zeros(missing)])
    columns = packed.reshape(-1, width).long().T
    word = columns[0].clone()
    for place in range(1, width):
        word |= columns[place] << (8 * place)
    found = torch.empty(len(word), codes, dtype=torch.long, device=packed.device)
    for place in range(codes):
        found[:, place] = (word >> (bits * place)) & ((1 << bits) - 1)
    return found.view(-1)


def pack_signs(signs: Tensor) -> UInt8[Tensor, " bytes"]:
    """+-1 as one bit each, 1 = negative."""
    return pack_bits((signs < 0).long(), 1)


def unpack_signs(packed: UInt8[Tensor, " bytes"], count: int) -> Tensor:
    """Inverse of :func:`pack_signs`, int8."""
    return (1 - 2 * unpack_bits(packed, 1, count)).to(torch.int8)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ConfigError(f"codes of {bits} bits cannot be packed; use 1 to 16")
