"""What the kernels do for a codebook matrix on a CPU, on torch's tensors, which are read and written where they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.codebook import FASTER, CodebookMatrix
from hf_rps.mappings.codes import packed_size
from hf_rps.products.numba.loading import loaded
from hf_rps.products.numba.threads import share_out

# the kernels compute in float32, which holds the other two exactly
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


class _Memory:
    """The memory of a contiguous tensor for NumPy, which keeps the tensor alive.

    ``tensor.numpy()`` would mark its storage as one that can't be resized, and FSDP2 frees gathered tensors that way.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        kind = {torch.float32: np.float32, torch.uint8: np.uint8}[tensor.dtype]
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape), "typestr": np.dtype(kind).str,
            "version": 3,
        }  # fmt: skip


def _view(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor of float32 or uint8 as an array on the same memory."""
    return np.asarray(_Memory(tensor.detach()))


def usable(tensor: Tensor) -> bool:
    """True where kernels can be given ``tensor``: an ordinary one on a CPU, and nobody follows what is done with it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
        and not internals.is_followed()
        and loaded() is not None
    )


def _codes(matrix: CodebookMatrix) -> np.ndarray | None:
    """The packed codes, flat, where they are as the kernels read them."""
    codes = matrix.codes
    shape = (matrix.rows, packed_size(matrix.cols, matrix.bits))
    if codes.device.type != "cpu" or codes.shape != shape or codes.dtype != torch.uint8 or not codes.is_contiguous():
        return None
    return _view(codes).reshape(-1)


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous float32 copy, or the memory of ``tensor`` itself where it is that already."""
    return _view(tensor.detach().to(torch.float32).contiguous())


def _empty(rows: int, cols: int) -> Tensor:
    return torch.empty(rows, cols, dtype=torch.float32, device="cpu")


def _worthwhile(matrix: CodebookMatrix) -> bool:
    return matrix.rows * matrix.cols > 0


def few_tokens(matrix: CodebookMatrix, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (tokens, cols) W^T + bias: (tokens, rows) in x's dtype; None where the codes are not where kernels can read."""
    codes, kernels = _codes(matrix), loaded()
    if codes is None or kernels is None:
        return None
    books, inputs, y = _array(matrix.books(psi)), _array(x), _empty(x.size(0), matrix.rows)
    added, out = np.empty(0, np.float32) if bias is None else _array(bias), _view(y)

    def work(first: int, stop: int) -> None:
        kernels.few_tokens(codes, books, inputs, out, added, matrix.bits, matrix.group, first, stop)

    share_out(work, matrix.rows, matrix.rows * matrix.cols)
    return y.to(x.dtype)


class NumbaKernels:
    """W and its adjoint for whoever asks a codebook matrix for them (:data:`hf_rps.mappings.codebook.FASTER`)."""

    def make(self, matrix: CodebookMatrix, psi: Tensor) -> Tensor | None:
        if not (usable(psi) and _worthwhile(matrix)):
            return None
        codes, kernels = _codes(matrix), loaded()
        if codes is None or kernels is None:
            return None
        books, weight = _array(matrix.books(psi)), _empty(matrix.rows, matrix.cols)
        out = _view(weight)

        def work(first: int, stop: int) -> None:
            kernels.make(codes, books, out, matrix.bits, matrix.group, first, stop)

        share_out(work, matrix.rows, matrix.rows * matrix.cols)
        return weight.to(psi.dtype)

    def add_adjoint(self, matrix: CodebookMatrix, into: Tensor, gradient: Tensor) -> bool:
        if not (usable(into) and usable(gradient) and _worthwhile(matrix)):
            return False
        codes, kernels = _codes(matrix), loaded()
        if codes is None or kernels is None:
            return False
        books = matrix.books(into.detach())
        part = books if books.dtype == torch.float32 and books.is_contiguous() else _empty(*books.shape).zero_()
        sums, numbers = _view(part), _array(gradient)

        def work(first: int, stop: int) -> None:
            kernels.add_adjoint(codes, sums, numbers, matrix.bits, matrix.group, first, stop)

        share_out(work, matrix.rows, matrix.rows * matrix.cols)
        if part is not books:
            books.add_(part)
        return True


FASTER.append(NumbaKernels())
