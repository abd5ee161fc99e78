"""Codebook matrices with random codes, for the tests of the kernels that read them."""

import ctypes
import mmap

import torch
from torch import Tensor, nn

from hf_rps.mappings.base import Span
from hf_rps.mappings.codebook import CodebookMatrix, CodedMatrix, VectorMatrix, pack_vectors
from hf_rps.mappings.codes import pack

BEFORE, AFTER = 3, 5  # slots of psi that belong to others


def matrix_of(rows: int, cols: int, bits: int, group: int | None = None, seed: int = 0, device="cpu") -> CodebookMatrix:
    matrix = CodebookMatrix(Span(0, rows, cols), bits, min(group or cols, cols), BEFORE)
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=draw, dtype=torch.uint8)
    keep(matrix, nn.Parameter(pack(codes, bits).to(device), requires_grad=False))
    return matrix


def vectors_of(rows: int, cols: int, bits: int, tile: int, group: int | None = None, seed: int = 0) -> VectorMatrix:
    group = cols if group is None or group * tile >= cols else group * tile
    matrix = VectorMatrix(Span(0, rows, cols), bits, group, BEFORE, tile)
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, -(-cols // tile)), generator=draw, dtype=torch.uint8)
    stored = pack_vectors(codes, torch.randn(rows, generator=draw), bits)
    keep(matrix, nn.Parameter(stored, requires_grad=False))
    return matrix


def keep(matrix: CodedMatrix, codes: Tensor) -> None:
    """From now on ``codes``, packed, are those of ``matrix``."""
    matrix.keep_in({"codes": codes}, {"codes": "codes"})


def psi_of(matrix: CodedMatrix, dtype: torch.dtype = torch.float32, device="cpu") -> Tensor:
    return torch.randn(BEFORE + matrix.size + AFTER).to(device, dtype)


def lock_behind(matrix: CodedMatrix) -> None:
    """Move the codes, a multiple of a page, to where what comes after them is a page that nobody may read (Linux)."""
    codes, page = matrix.codes, mmap.PAGESIZE
    assert codes.numel() % page == 0
    pages = torch.frombuffer(mmap.mmap(-1, codes.numel() + page), dtype=torch.uint8)
    memory = pages[: codes.numel()].view(codes.shape).copy_(codes)
    behind = ctypes.c_void_p(pages.data_ptr() + codes.numel())
    assert ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(page), 0) == 0
    keep(matrix, memory)
