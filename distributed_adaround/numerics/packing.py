"""Codes of fewer than 8 bits, side by side: code i takes b bits from bit i*b on of a little-endian stream."""

import torch
from torch import Tensor

# Eight codes of b bits fill b bytes; so many groups of eight are worked on at once, in 8 bytes for each code.
_GROUPS = 1 << 17


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 `(packed_size,)` of integer codes of any shape, 1 to 7 bits each; of negative ones the two's complement."""
    flat = codes.reshape(-1)
    shifts = bits * torch.arange(8)
    packed = torch.empty(packed_size(flat.numel(), bits), dtype=torch.uint8)
    for start in range(0, flat.numel(), 8 * _GROUPS):
        part = flat[start : start + 8 * _GROUPS].long() & ((1 << bits) - 1)
        padded = torch.nn.functional.pad(part, (0, -part.numel() % 8)).reshape(-1, 8)
        stream = (padded << shifts).sum(dim=1).view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
        place = start // 8 * bits
        size = packed_size(part.numel(), bits)
        packed[place : place + size] = stream[:size]
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Inverse of `pack_bits`: int8 or uint8 `(count,)`."""
    codes = torch.empty(count, dtype=torch.int8 if signed else torch.uint8)
    shifts, sign = bits * torch.arange(8), 1 << (bits - 1)
    for start in range(0, count, 8 * _GROUPS):
        part = packed[start // 8 * bits :][: _GROUPS * bits]
        words = torch.zeros(-(-part.numel() // bits), 8, dtype=torch.uint8)
        words[:, :bits] = torch.nn.functional.pad(part, (0, -part.numel() % bits)).reshape(-1, bits)
        values = (words.view(torch.int64) >> shifts) & ((1 << bits) - 1)
        size = min(8 * _GROUPS, count - start)
        codes[start : start + size] = (((values ^ sign) - sign) if signed else values).reshape(-1)[:size]
    return codes
