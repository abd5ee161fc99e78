"""Codes of a few bits, packed without a gap: eight codes of b bits take b bytes.

Rows are packed by themselves, so that each begins on a byte. Code i of eight is bits b i to b (i + 1) - 1 of the b
bytes, the first byte being the lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EIGHT = 8


def packed_size(cols: int, bits: int) -> int:
    """Bytes of a row of ``cols`` codes.

    >>> packed_size(768, 3), packed_size(10, 4), packed_size(64, 8)
    (288, 8, 64)
    """
    return -(-cols // _EIGHT) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, cols), each below 2**bits, as uint8 (rows, packed_size(cols, bits))."""
    rows, cols = codes.shape
    eights = torch.nn.functional.pad(codes, (0, -cols % _EIGHT)).unflatten(1, (-1, _EIGHT)).to(torch.int64)
    words = (eights << (bits * torch.arange(_EIGHT, device=codes.device))).sum(-1)  # of 8 b bits, no two overlap
    return torch.stack([words >> (8 * i) & 255 for i in range(bits)], -1).to(torch.uint8).view(rows, -1)


def unpack(packed: Tensor, cols: int, bits: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 (rows, cols)."""
    if bits == _EIGHT:
        return packed[:, :cols]
    if _EIGHT % bits == 0:  # no code crosses a byte
        shifts = torch.arange(0, _EIGHT, bits, device=packed.device, dtype=torch.uint8)
        codes = packed[:, :, None] >> shifts & (2**bits - 1)
    else:
        groups = packed.unflatten(1, (-1, bits)).to(torch.int64)
        words = (groups << (8 * torch.arange(bits, device=packed.device))).sum(-1)
        codes = words[..., None] >> (bits * torch.arange(_EIGHT, device=packed.device)) & (2**bits - 1)
    return codes.flatten(1)[:, :cols].to(torch.uint8)
