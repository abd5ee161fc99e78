"""A folded matrix whose work with psi is done by Triton kernels, where they can be had."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.fold import FoldMatrix
from hf_rps.products.triton.launch import INTERPRETED, Launcher, loaded

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

# Blocks are fixed, by shape and dtype only: a kernel that tunes itself would take seconds for each shape of a model,
# and could choose another order of summation on every start. Four warps of 32 threads, each thread with four loads of
# 16 bytes under way, hide the memory's latency where some ten programs share a multiprocessor.
_ROWS, _COLS = 4, 1024  # one token: rows of a program, and how much of them is read at once
_DOT_ROWS, _DOT_BYTES = 16, 512  # few tokens: the matrix units' least tile, and bytes of a row that are read at once
_STAGES = 4  # of the pipeline: three such tiles under way, with the inputs 48 KiB of shared memory
_TILE, _TILE_COLS = 4096, 256  # weights that a program makes; a warp reads 256 neighbours in 16-bit precision
_SLOTS = 2048  # slots of a program that gathers a gradient


def can_serve(matrix: SharedMatrix) -> bool:
    """True for folded rows that are not longer than the array, and offsets that fit an int32."""
    if not isinstance(matrix, FoldMatrix):
        return False
    m, base, *_ = matrix.rotations
    # kernels count on to the end of a block before they mask what is beyond the row, hence the margin
    return matrix.cols <= m and m + max(base, matrix.rows * matrix.cols) < 2**31 - 2**16


def usable(tensor: Tensor) -> bool:
    """True where kernels can read ``tensor`` by its address: an ordinary tensor of a dtype and device they know, and
    nobody follows what is done with it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype in DTYPES
        and (tensor.is_cuda or INTERPRETED)
        and not internals.is_followed()
        and loaded() is not None
    )


class KernelMatrix(SharedMatrix):
    """The same matrix as ``matrix``, made and differentiated by one launch each.

    Tables and launchers are made on first use on a device. They are not copied and not pickled.
    """

    def __init__(self, matrix: FoldMatrix):
        self.plain = matrix
        self.rows, self.cols = matrix.rows, matrix.cols
        self._places: dict[torch.device, _Place] = {}

    def __getstate__(self):
        return self.__dict__ | {"_places": {}}

    def _place(self, psi: Tensor) -> _Place:
        place = self._places.get(psi.device)
        if place is None:
            with torch.inference_mode(False):  # an inference tensor would break training later
                place = self._places[psi.device] = _Place(self.plain, psi)
        return place

    def weight(self, psi: Tensor) -> Tensor:
        return self.plain.weight(psi)

    def few(self, x: Tensor, psi: Tensor, bias: Tensor | None, tokens: int) -> Tensor | None:
        """x (..., cols), up to 16 ``tokens``, times W^T plus bias; None where Triton fails."""
        y = x.new_empty(*x.shape[:-1], self.rows)
        launch = self._place(psi).product(tokens == 1, x.dtype, None if bias is None else bias.dtype)
        tensors = (x.contiguous(), psi, y, bias)
        launched = launch(tensors) if tokens == 1 else launch(tensors, tokens)
        return y if launched else None

    def make(self, psi: Tensor, base: Tensor | None = None) -> Tensor:
        if usable(psi) and (base is None or (same_place(base, psi) and base.dtype in DTYPES)):
            weight = torch.empty(self.rows, self.cols, device=psi.device, dtype=(psi if base is None else base).dtype)
            if self._place(psi).make(psi.dtype, None if base is None else base.dtype)((psi, weight, base)):
                return weight
        return self.plain.make(psi, base)

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        if usable(gradient) and same_place(into, gradient):
            gradient = gradient.contiguous()
            if self._place(into).adjoint(gradient.dtype, into.dtype)((gradient, into)):
                return
        self.plain.add_adjoint(into, gradient)

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        self.plain.add_load(into, factor)

    def load_pieces(self) -> list[tuple[int, int, float]]:
        return self.plain.load_pieces()

    def kept_tensors(self) -> list[Tensor]:
        return [place.shifts for place in self._places.values()]


def same_place(tensor: Tensor, other: Tensor) -> bool:
    return tensor.get_device() == other.get_device() and tensor.is_contiguous()


class _Place:
    """What the kernels need to know of one matrix on one device, and their launchers."""

    def __init__(self, matrix: FoldMatrix, psi: Tensor):
        m, base, start, shifts = matrix.rotations
        align = math.gcd(8, m, base, start, matrix.cols, *shifts)
        self.shape, self.device = (matrix.rows, matrix.cols), psi.device
        self.partitions, self.reach = len(shifts), min(m, matrix.rows * matrix.cols)
        # one more than there are partitions: kernels read the next one's before they know that there is none
        table = [shift // align for shift in (*shifts, 0)]
        self.shifts = torch.tensor(table, dtype=torch.int32, device="cpu").to(psi.device)  # (partitions + 1,)
        self.fixed = (self.shifts, matrix.factor(psi), m // align, start // align, base // align, matrix.rows)
        self.constants = (matrix.cols, align)
        self._launchers: dict[tuple, Launcher] = {}

    def product(self, one: bool, dtype: torch.dtype, bias: torch.dtype | None) -> Launcher:
        """Of (x, psi, y, bias) and, unless it is for ``one`` token, their number."""
        key = (one, dtype, bias)
        launcher = self._launchers.get(key)
        if launcher is None:
            rows, cols = self.shape
            block_rows, most = (_ROWS, _COLS) if one else (_DOT_ROWS, _DOT_BYTES // dtype.itemsize)
            launcher = self._launchers[key] = Launcher(
                loaded().one_token if one else loaded().few_tokens,
                (-(-rows // block_rows), 1, 1),
                (*self.fixed, *self.constants, bias is not None, block_rows, _block(cols, most)),
                self.device, num_warps=4, num_stages=_STAGES,
            )  # fmt: skip
        return launcher

    def make(self, dtype: torch.dtype, added: torch.dtype | None) -> Launcher:
        """Of (psi, out, added)."""
        key = ("make", dtype, added)
        launcher = self._launchers.get(key)
        if launcher is None:
            rows, cols = self.shape
            block_cols = _block(cols, _TILE_COLS)
            block_rows = _TILE // block_cols
            launcher = self._launchers[key] = Launcher(
                loaded().whole_weight,
                (-(-rows // block_rows), -(-cols // block_cols), 1),
                (*self.fixed, *self.constants, added is not None, block_rows, block_cols),
                self.device, num_warps=4,
            )  # fmt: skip
        return launcher

    def adjoint(self, dtype: torch.dtype, into: torch.dtype) -> Launcher:
        """Of (gradient, into)."""
        key = ("adjoint", dtype, into)
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = self._launchers[key] = Launcher(
                loaded().add_adjoint,
                (-(-self.reach // _SLOTS), min(self.partitions, 2), 1),
                (*self.fixed, self.partitions, *self.constants, _SLOTS),
                self.device, num_warps=4,
            )  # fmt: skip
        return launcher


def _block(cols: int, most: int) -> int:
    """The power of two that covers ``cols``, at least 16 and at most ``most``."""
    return max(16, min(most, 1 << (cols - 1).bit_length()))
