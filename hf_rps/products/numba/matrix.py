"""What the kernels do for a coded matrix on a CPU, on torch's tensors, which are read and written where they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.codebook import FASTER, CodebookMatrix, CodedMatrix, VectorMatrix
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


def _codes(matrix: CodedMatrix) -> np.ndarray | None:
    """What the matrix stores, flat, where it is as the kernels read it."""
    codes, shape = matrix.codes, (matrix.rows, matrix.row_bytes)
    if codes.device.type != "cpu" or codes.shape != shape or codes.dtype != torch.uint8 or not codes.is_contiguous():
        return None
    if not codes.data_ptr():  # a tensor that only stands for others, as a sharded one
        return None
    return _view(codes).reshape(-1)


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous float32 copy, or the memory of ``tensor`` itself where it is that already."""
    return _view(tensor.detach().to(torch.float32).contiguous())


def _books(matrix: CodedMatrix, psi: Tensor) -> Tensor:
    """Codebooks in the shape in which the kernels read them."""
    return matrix.books(psi) if isinstance(matrix, CodebookMatrix) else matrix.segment(psi)


def _form(matrix: CodedMatrix) -> tuple[int, ...]:
    """What the kernels must know of a matrix beside its arrays."""
    tile = (matrix.tile,) if isinstance(matrix, VectorMatrix) else ()
    return (matrix.bits, *tile, matrix.group)


def _empty(rows: int, cols: int) -> Tensor:
    return torch.empty(rows, cols, dtype=torch.float32, device="cpu")


def _worthwhile(matrix: CodedMatrix) -> bool:
    return matrix.rows * matrix.cols > 0


def few_tokens(matrix: CodedMatrix, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (tokens, cols) W^T + bias: (tokens, rows) in x's dtype; None where the codes are not where kernels can read."""
    codes, kernels = _codes(matrix), loaded()
    if codes is None or kernels is None:
        return None
    kernel = kernels.few_tokens if isinstance(matrix, CodebookMatrix) else kernels.few_tokens_vectors
    books, inputs, y = _array(_books(matrix, psi)), _array(x), _empty(x.size(0), matrix.rows)
    added, out, form = np.empty(0, np.float32) if bias is None else _array(bias), _view(y), _form(matrix)

    def work(first: int, stop: int) -> None:
        kernel(codes, books, inputs, out, added, *form, first, stop)

    share_out(work, matrix.rows, matrix.rows * matrix.cols)
    return y.to(x.dtype)


class NumbaKernels:
    """W and its adjoint for whoever asks a coded matrix for them (:data:`hf_rps.mappings.codebook.FASTER`)."""

    def make(self, matrix: CodedMatrix, psi: Tensor) -> Tensor | None:
        if not (usable(psi) and _worthwhile(matrix)):
            return None
        codes, kernels = _codes(matrix), loaded()
        if codes is None or kernels is None:
            return None
        kernel = kernels.make if isinstance(matrix, CodebookMatrix) else kernels.make_vectors
        books, weight, form = _array(_books(matrix, psi)), _empty(matrix.rows, matrix.cols), _form(matrix)
        out = _view(weight)

        def work(first: int, stop: int) -> None:
            kernel(codes, books, out, *form, first, stop)

        share_out(work, matrix.rows, matrix.rows * matrix.cols)
        return weight.to(psi.dtype)

    def add_adjoint(self, matrix: CodedMatrix, into: Tensor, gradient: Tensor) -> bool:
        if not (usable(into) and usable(gradient) and _worthwhile(matrix)):
            return False
        codes, kernels = _codes(matrix), loaded()
        if codes is None or kernels is None:
            return False
        books, numbers, form = _books(matrix, into.detach()), _array(gradient), _form(matrix)
        if isinstance(matrix, VectorMatrix):  # all rows add to the same books: each range to sums of its own
            parts: dict[int, np.ndarray] = {}

            def add(first: int, stop: int) -> None:
                parts[first] = np.zeros(matrix.size, np.float32)
                kernels.add_adjoint_vectors(codes, parts[first], numbers, *form, first, stop)

            share_out(add, matrix.rows, matrix.rows * matrix.cols)
            total = sum(parts[first] for first in sorted(parts))  # in one order, whichever thread was the first
            books.add_(torch.from_numpy(total).to(books.dtype))
            return True
        part = books if books.dtype == torch.float32 and books.is_contiguous() else _empty(*books.shape).zero_()
        sums = _view(part)

        def work(first: int, stop: int) -> None:
            kernels.add_adjoint(codes, sums, numbers, *form, first, stop)

        share_out(work, matrix.rows, matrix.rows * matrix.cols)
        if part is not books:
            books.add_(part)
        return True


FASTER.append(NumbaKernels())
