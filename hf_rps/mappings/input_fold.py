"""Folding the input: a layer of K inputs is computed as one of K / c, with 1 / c of the multiplications.

    W = Z S          fold_j(x)[b] = sum_t mix[j, t] * sign[t, b] * x[t * K / c + b]          y_j = Z_j fold_j(x)

Z (rows, K / c) is a shared matrix like any other, by whatever mapping; its rows lie in J blocks, and each block reads a
fold of its own of the c tiles of the input. ``mix`` (J, c) has orthogonal rows of length sqrt(c), so for J = c folding
is an isometry (times sqrt(c)): no direction of the input is lost, and every weight of Z stands for c weights of W whose
squares add up to c of its own. ``sign`` is hashed. At c = 1 all of it is the identity.

Source: 'SS1: Accelerating inference with fast and expressive sketch structured transform' (NeurIPS 2024) folds once for
all outputs (J = 1), which leaves W of rank K / c; with J = c it has full rank.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.hashing import hash_signs
from hf_rps.mappings.base import DeviceCopies, SharedMatrix

_MIXED_AT_ONCE = 16  # tiles, up to which one small matrix product costs less than two


def folded_size(channels: int, fold: int) -> tuple[int, int]:
    """(c, channels of Z): how far an input of so many channels is folded if ``fold`` is asked for, and what is left.

    c is the largest divisor of the channels up to ``fold``, unless that is less than three quarters of it. Then c is
    ``fold``, and the input is filled up: the last tile is shorter, and Gamma an array of its own.

    >>> folded_size(768, 4), folded_size(768, 10), folded_size(770, 4), folded_size(3, 4)
    ((4, 192), (8, 96), (4, 193), (3, 1))
    """
    most = min(fold, channels)
    c = next(divisor for divisor in range(most, 0, -1) if channels % divisor == 0)
    c = c if 4 * c >= 3 * most else most
    return c, -(-channels // c)


def mixing_factors(c: int) -> tuple[np.ndarray, ...]:
    """Matrices whose Kronecker product is ``mix`` (c, c), float64: each orthogonal with rows of length sqrt(its size).

    One for c up to 16, else two of sizes a <= b with c = a b as near to each other as can be, which cost a + b
    multiplications a channel and not c. Each is Hadamard's matrix (Sylvester's construction, whose Kronecker products
    are of its kind again) where its size is a power of two, and the DCT-II elsewhere.
    """
    a = 1 if c <= _MIXED_AT_ONCE else max(d for d in range(1, math.isqrt(c) + 1) if c % d == 0)
    return tuple(_orthogonal(size) for size in (a, c // a) if size > 1) or (_orthogonal(1),)


def _orthogonal(size: int) -> np.ndarray:
    if size & (size - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix
    row, column = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.cos(math.pi * row * (2 * column + 1) / (2 * size)) * math.sqrt(2)
    matrix[0] = 1.0
    return matrix


class InputFold:
    """How an input is folded: the same for all layers that share the stream ``key`` and the number of channels.

    Args:
        channels: Of the input; each is ``positions`` columns of the matrix (more than one in convolutions).
        fold: How often it is to be folded; c follows, see :func:`folded_size`.
        key: Of the hashed signs.

    Attributes:
        blocks: How many folds of the input there are: c.
    """

    def __init__(self, channels: int, positions: int, fold: int, key: int):
        self.channels, self.positions = channels, positions
        self.c, self.width = folded_size(channels, fold)
        self.blocks = self.c
        self.signs = hash_signs(key, self.c * self.width).reshape(self.c, self.width)
        factors = mixing_factors(self.c)
        self.mix = functools.reduce(np.kron, factors)
        with torch.inference_mode(False):
            self._factors = [DeviceCopies(torch.from_numpy(factor)) for factor in factors]
            columns = torch.from_numpy(self.signs.ravel()[:channels].repeat(positions))
            self._signs = DeviceCopies(columns)
        self._typed: dict[tuple, tuple[list[Tensor], Tensor]] = {}

    def __getstate__(self):
        return self.__dict__ | {"_typed": {}}

    @property
    def _padded(self) -> int:
        """Columns of the tiles: at least those of the input."""
        return self.c * self.width * self.positions

    @property
    def multiplications(self) -> int:
        """Of one input."""
        return self.channels * self.positions * sum(len(factor.tensors()[0]) for factor in self._factors)

    def _constants(self, like: Tensor) -> tuple[list[Tensor], Tensor]:
        """The factors of mix and the signs (columns of the input,), where ``like`` is and in its dtype."""
        key = (like.device, like.dtype)
        if key in self._typed:
            return self._typed[key]
        factors = [factor.on(like.device).to(like.dtype) for factor in self._factors]
        signs = self._signs.on(like.device).to(like.dtype)
        if not torch.compiler.is_compiling():
            with torch.inference_mode(False):
                self._typed[key] = ([factor.clone() for factor in factors], signs.clone())
        return factors, signs

    @property
    def coefficients(self) -> np.ndarray:
        """(blocks, c, width): what channels count, ``fold_j(x)[b] = sum_t this[j, t, b] x[t, b]``."""
        return self.mix[:, :, None] * self.signs

    def fold(self, x: Tensor) -> Tensor:
        """x (..., channels * positions) folded for every block: (..., blocks, width * positions)."""
        factors, signs = self._constants(x)
        x, missing = x * signs, self._padded - x.size(-1)
        return _mixed((F.pad(x, (0, missing)) if missing else x).unflatten(-1, (self.c, -1)), factors)

    def fold_unfollowed(self, x: Tensor) -> Tensor:
        """:meth:`fold`, a pass faster, where nothing follows the operations: no autograd, compiler or transform."""
        cols = x.size(-1)
        if cols == self._padded:
            return self.fold(x)
        factors, signs = self._constants(x)
        tiles = x.new_empty(*x.shape[:-1], self._padded)
        torch.mul(x, signs, out=tiles[..., :cols])
        tiles[..., cols:] = 0
        return _mixed(tiles.view(*x.shape[:-1], self.c, -1), factors)

    def unfold(self, folded: Tensor) -> Tensor:
        """The adjoint of :meth:`fold`: (..., blocks, width * positions) as (..., channels * positions)."""
        factors, signs = self._constants(folded)
        return _mixed(folded, [factor.t() for factor in factors]).flatten(-2)[..., : len(signs)] * signs

    def fold_channels(self, x: Tensor) -> Tensor:
        """x (N, channels, ...) folded for every block, channel by channel: (N, blocks * width, ...)."""
        factors, signs = self._constants(x)
        sizes, x = x.shape[2:], x.flatten(2) * signs[:: self.positions, None]
        missing = self.c * self.width - self.channels
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return _mixed(x.unflatten(1, (self.c, self.width)).flatten(2), factors).view(x.size(0), -1, *sizes)

    def tensors(self) -> list[Tensor]:
        typed = [tensor for factors, signs in self._typed.values() for tensor in (*factors, signs)]
        return [*(t for factor in self._factors for t in factor.tensors()), *self._signs.tensors(), *typed]


def _mixed(tiles: Tensor, factors: list[Tensor]) -> Tensor:
    """tiles (..., c, size), mixed by a matrix (c, c) that is one factor, or the Kronecker product of two."""
    if len(factors) == 1:
        return torch.matmul(factors[0], tiles)
    first, last = factors
    tiles = torch.matmul(last, tiles.unflatten(-2, (len(first), len(last))))
    return torch.matmul(first, tiles.flatten(-2)).unflatten(-1, (len(last), -1)).flatten(-3, -2)


class FoldedMatrix(SharedMatrix):
    """W (rows, cols) = Z S for a shared matrix Z (rows, cols / c) and the fold S of the input.

    The rows lie in J = :attr:`blocks` blocks of :attr:`block_rows`, the last of which may be shorter; each reads a fold
    of its own.
    """

    def __init__(self, inner: SharedMatrix, fold: InputFold):
        self.inner, self.input_fold = inner, fold
        self.rows, self.cols = inner.rows, fold.channels * fold.positions
        self.block_rows = -(-self.rows // min(fold.blocks, self.rows))
        self.blocks = -(-self.rows // self.block_rows)

    @property
    def multiplications(self) -> int:
        return self.inner.multiplications + self.input_fold.multiplications

    def in_blocks(self, rows: Tensor) -> Tensor:
        """(..., rows) as (..., J, rows of a block), filled up with zeros."""
        missing = self.blocks * self.block_rows - self.rows
        return (F.pad(rows, (0, missing)) if missing else rows).unflatten(-1, (self.blocks, self.block_rows))

    def unfolded(self, narrow: Tensor) -> Tensor:
        """Z S for any Z (rows, cols / c): (rows, cols)."""
        fold = self.input_fold
        blocks = self.in_blocks(narrow.t()).permute(1, 2, 0)  # (J, rows of a block, narrow columns)
        blocks = blocks.unflatten(-1, (fold.width, fold.positions))
        coefficients = torch.from_numpy(fold.coefficients[: self.blocks]).to(narrow.device, narrow.dtype)
        tiles = blocks[:, :, None] * coefficients[:, None, :, :, None]
        return tiles.flatten(0, 1)[: self.rows].flatten(1)[:, : self.cols]

    def folded(self, wide: Tensor) -> Tensor:
        """G S^T for any G (rows, cols): (rows, cols / c)."""
        every = self.input_fold.fold(wide)  # (rows, blocks, narrow columns): of each row by the folds of all blocks
        row = torch.arange(self.rows, device=wide.device)
        return every[row, row // self.block_rows]

    def weight(self, psi: Tensor) -> Tensor:
        return self.unfolded(self.inner.weight(psi))

    def make(self, psi: Tensor, base: Tensor | None = None) -> Tensor:
        weight = self.unfolded(self.inner.make(psi))
        return weight.contiguous() if base is None else torch.add(base, weight.to(base.dtype))

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        self.inner.add_adjoint(into, self.folded(gradient.to(into.dtype)))

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        if self._is_even:
            self.inner.add_load(into, factor * self.input_fold.c)
        else:
            squares = self._squares().to(into.device, into.dtype)
            self.inner.add_adjoint(into, self.inner.make(torch.ones_like(into)) * squares * factor)

    def load_pieces(self) -> list[tuple[int, int, float]] | None:
        pieces = self.inner.load_pieces()
        if pieces is None or not self._is_even:
            return None
        return [(slot, length, value * self.input_fold.c) for slot, length, value in pieces]

    @property
    def _is_even(self) -> bool:
        """True where every weight of Z stands for c weights of W, none of them beyond the input's end."""
        return self.input_fold.c * self.input_fold.width == self.input_fold.channels

    def _squares(self) -> Tensor:
        """What each weight of Z has of squares in W, (rows, cols / c): c, less where the input was filled up."""
        fold = self.input_fold
        there = (np.arange(fold.c * fold.width) < fold.channels).reshape(fold.c, fold.width)
        per_block = (np.square(fold.coefficients[: self.blocks]) * there).sum(1).repeat(fold.positions, axis=1)
        return torch.from_numpy(per_block.repeat(self.block_rows, axis=0)[: self.rows])

    def linear(self, x: Tensor, psi: Tensor) -> Tensor:
        return self.linear_of_folded(self.input_fold.fold(x), psi)

    def linear_of_folded(self, folded: Tensor, psi: Tensor) -> Tensor:
        """The same for an input that is folded already, (..., blocks, cols / c)."""
        narrow = self.inner.weight(psi).to(folded.dtype)
        weights = self.in_blocks(narrow.t()).permute(1, 0, 2)  # (J, narrow columns, rows of a block)
        y = torch.einsum("...jk,jkn->...jn", folded[..., : self.blocks, :], weights)
        return y.flatten(-2)[..., : self.rows]

    def kept_tensors(self) -> list[Tensor]:
        return [*self.inner.kept_tensors(), *self.input_fold.tensors()]
