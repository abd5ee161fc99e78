"""Codebook matrices on CUDA by Triton: the product with few tokens, and W and its adjoint for whoever asks for them."""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor

from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.codebook import FASTER, CodebookMatrix
from hf_rps.mappings.codes import packed_size
from hf_rps.products.base import FewTokens, register
from hf_rps.products.triton.launch import Launcher, loaded
from hf_rps.products.triton.matrix import same_place, usable

_KERNELS = "codebook_kernels"

# Blocks as those of drawn maps (:mod:`hf_rps.products.triton.matrix`), in codes. Right on an H200, not tuned on one.
_ROWS, _COLS = 4, 1024  # one token
_DOT_ROWS, _DOT_BYTES, _STAGES = 16, 512, 3  # few tokens
_TILE, _TILE_COLS = 4096, 256  # weights that a program makes
_SUMS = 8192  # that a program which adds up a gradient keeps in registers: an entry's for each code that it looks at


def can_serve(matrix: SharedMatrix) -> bool:
    """True for codes of single weights, and rows whose offsets fit an int32."""
    if not isinstance(matrix, CodebookMatrix) or getattr(matrix, "tile", 1) != 1 or not matrix.rows * matrix.cols:
        return False
    if matrix.cols > _TILE_COLS * 65_535:  # blocks of columns that a grid may have
        return False
    # kernels count on to the end of a block before they mask what is beyond the row, hence the margin
    return max(matrix.groups * matrix.entries, matrix.rows * matrix.groups) < 2**31 - 2**16


def _serves(matrix: CodebookMatrix, *tensors: Tensor) -> bool:
    return can_serve(matrix) and all(usable(tensor) for tensor in tensors) and loaded(_KERNELS) is not None


def _readable_codes(matrix: CodebookMatrix, device: torch.device) -> Tensor | None:
    """The packed codes, where they are on ``device`` and as the kernels read them."""
    codes = matrix.codes
    shape = (matrix.rows, packed_size(matrix.cols, matrix.bits))
    if codes.device != device or codes.dtype != torch.uint8 or codes.shape != shape or not codes.is_contiguous():
        return None
    return codes if codes.data_ptr() else None  # a sharded tensor (DTensor) has no memory of its own


def few_tokens(matrix: CodebookMatrix, x: Tensor, psi: Tensor, bias: Tensor | None, tokens: int) -> Tensor | None:
    """x (..., cols), up to 16 ``tokens``, times W^T plus bias; None where kernels can't read the codes or fail."""
    codes = _readable_codes(matrix, x.device)
    if codes is None:
        return None
    y = x.new_empty(*x.shape[:-1], matrix.rows)
    one, bias_dtype = tokens == 1, None if bias is None else bias.dtype
    launch = _product(_shape_of(matrix), one, x.device, x.dtype, bias_dtype)
    scalars = (matrix.start, matrix.rows) if one else (tokens, matrix.start, matrix.rows)
    return y if launch((x.contiguous(), psi, y, bias, codes), *scalars) else None


class TritonCodebooks:
    """W and its adjoint for whoever asks a codebook matrix for them (:data:`hf_rps.mappings.codebook.FASTER`)."""

    def make(self, matrix: CodebookMatrix, psi: Tensor) -> Tensor | None:
        if not (_serves(matrix, psi) and psi.is_contiguous()):
            return None
        codes = _readable_codes(matrix, psi.device)
        if codes is None:
            return None
        weight = torch.empty(matrix.rows, matrix.cols, device=psi.device, dtype=psi.dtype)
        launch = _make(_shape_of(matrix), psi.device, psi.dtype)
        return weight if launch((psi, weight, codes), matrix.start, matrix.rows) else None

    def add_adjoint(self, matrix: CodebookMatrix, into: Tensor, gradient: Tensor) -> bool:
        if not (_serves(matrix, into, gradient) and same_place(into, gradient)):
            return False
        codes = _readable_codes(matrix, into.device)
        if codes is None or gradient.shape != (matrix.rows, matrix.cols):
            return False
        launch = _adjoint(_shape_of(matrix), into.device, gradient.dtype, into.dtype)
        return launch((gradient.contiguous(), into, codes), matrix.start, matrix.rows * matrix.groups)


@register
class TritonCodebookProduct(FewTokens):
    """Few tokens: straight from packed codes, in float32 until the end. Many are for :class:`Made`.

    The matrix's own W and adjoint are a launch each. Up to how many tokens this is the better way was not measured;
    they are as many as with drawn maps, a tile of the matrix units.
    HF_RPS_DISABLE_TRITON=1 keeps it from being chosen.
    """

    matrix: CodebookMatrix

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return can_serve(matrix)

    def fits(self, x: Tensor) -> bool:
        return x.is_cuda and self._is_few(x)

    def _is_few(self, x: Tensor) -> bool:
        if not usable(x):
            return False
        cols, module = self.matrix.cols, loaded(_KERNELS)
        return module is not None and 0 < x.numel() <= module.FEW_TOKENS * cols and x.size(-1) == cols

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_few(x) and self._understands(x, psi, bias):
            y = few_tokens(self.matrix, x, psi, bias, x.numel() // self.matrix.cols)
            if y is not None:
                return y
        return self._made.linear(x, psi, bias)

    def _understands(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> bool:
        """False where an argument has to be brought into shape, or refused, by torch's own product."""
        return (
            x.dtype == psi.dtype
            and usable(psi)
            and same_place(psi, x)
            and (bias is None or (usable(bias) and same_place(bias, x) and bias.shape == (self.matrix.rows,)))
        )


# ---- launchers: one for all matrices of a shape


def _shape_of(matrix: CodebookMatrix) -> tuple[int, int, int, int, bool]:
    """What a launcher depends on: rows, columns, group, bits, and whether the first slot needs 64 bits."""
    return matrix.rows, matrix.cols, matrix.group, matrix.bits, matrix.start >= 2**31


def _power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()


def _constants(cols: int, group: int, bits: int) -> tuple[int, int, int, int, int]:
    """COLS, GROUP, BITS, BYTES and PACK of the kernels."""
    whole = gcd(8, bits)
    return cols, group, bits, bits // whole, 8 // whole


@cache
def _product(shape: tuple, one: bool, device: torch.device, dtype: torch.dtype, bias: torch.dtype | None) -> Launcher:
    """Of (x, psi, y, bias, codes), tokens unless it is for ``one``, start and rows."""
    rows, cols, group, bits, _ = shape
    constants, module = _constants(cols, group, bits), loaded(_KERNELS)
    block_rows, most = (_ROWS, _COLS) if one else (_DOT_ROWS, _DOT_BYTES // dtype.itemsize)
    block_cols = max(16, min(most, _power_of_two(cols)))
    return Launcher(
        module.one_token if one else module.few_tokens,
        (-(-rows // block_rows), 1, 1),
        (*constants, bias is not None, block_rows, block_cols // constants[-1]),
        device, num_warps=4, num_stages=_STAGES,
    )  # fmt: skip


@cache
def _make(shape: tuple, device: torch.device, dtype: torch.dtype) -> Launcher:
    """Of (psi, out, codes), start and rows."""
    rows, cols, group, bits, _ = shape
    constants = _constants(cols, group, bits)
    block_cols = max(constants[-1], min(_TILE_COLS, _power_of_two(cols)))
    block_rows = min(_TILE // block_cols, _power_of_two(rows))
    return Launcher(
        loaded(_KERNELS).whole_weight,
        (-(-rows // block_rows), -(-cols // block_cols), 1),
        (*constants, block_rows, block_cols // constants[-1]),
        device, num_warps=4,
    )  # fmt: skip


@cache
def _adjoint(shape: tuple, device: torch.device, dtype: torch.dtype, into: torch.dtype) -> Launcher:
    """Of (gradient, into, codes), start and the number of codebooks."""
    rows, cols, group, bits, _ = shape
    constants = _constants(cols, group, bits)
    pack, books = constants[-1], rows * -(-cols // group)
    span = -(-group // pack) if group % pack == 0 or group >= cols else (group + pack - 2) // pack + 1
    at_once = _SUMS >> bits
    block_packs = min(at_once // pack, _power_of_two(span))
    block_books = min(at_once // (block_packs * pack), _power_of_two(books))
    return Launcher(
        loaded(_KERNELS).add_adjoint,
        (-(-books // block_books), 1, 1),
        (*constants, span, block_books, block_packs),
        device, num_warps=4,
    )  # fmt: skip


FASTER.append(TritonCodebooks())
