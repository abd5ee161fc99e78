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

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.hashing import hash_signs
from hf_rps.mappings.base import DeviceCopies, SharedMatrix


def folded_size(channels: int, fold: int) -> tuple[int, int]:
    """(c, channels of Z): how far an input of so many channels can be folded, and what is left of it.

    >>> folded_size(768, 4), folded_size(770, 4), folded_size(3, 4)
    ((4, 192), (4, 193), (3, 1))
    """
    c = min(fold, channels)
    return c, -(-channels // c)


def mixing(blocks: int, c: int) -> np.ndarray:
    """``mix`` (blocks, c), float64: rows of length sqrt(c), any c that follow each other orthogonal.

    Hadamard's matrix (Sylvester's construction) where c is a power of two, the DCT-II elsewhere, repeated for more
    blocks than c.
    """
    if c & (c - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < c:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    else:
        row, column = np.arange(c)[:, None], np.arange(c)[None]
        matrix = np.cos(math.pi * row * (2 * column + 1) / (2 * c)) * math.sqrt(2)
        matrix[0] = 1.0
    return matrix[np.arange(blocks) % c]


class InputFold:
    """How the input of one matrix is folded: the same for all that share the stream ``key`` and the sizes.

    Args:
        channels: Of the input; each is ``positions`` columns of the matrix (more than one in convolutions).
        fold: c, at most the number of channels.
        rows: Of the matrix.
        key: Of the hashed streams.
    """

    def __init__(self, channels: int, positions: int, fold: int, rows: int, key: int):
        self.channels, self.positions, self.rows = channels, positions, rows
        self.c, self.width = folded_size(channels, fold)
        self.block_rows = -(-rows // min(self.c, rows))
        self.blocks = -(-rows // self.block_rows)
        padded = self.c * self.width
        self.signs = hash_signs(key, padded).reshape(self.c, self.width)
        self.mix = mixing(self.blocks, self.c)
        with torch.inference_mode(False):
            self._mix = DeviceCopies(torch.from_numpy(self.mix))
            self._signs = DeviceCopies(torch.from_numpy(self.signs))
        self._typed: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __getstate__(self):
        return self.__dict__ | {"_typed": {}}

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """mix (J, c) and signs (c, width, 1), where ``like`` is and in its dtype."""
        key = (like.device, like.dtype)
        if key in self._typed:
            return self._typed[key]
        mix = self._mix.on(like.device).to(like.dtype)
        signs = self._signs.on(like.device).to(like.dtype).view(self.c, self.width, 1)
        if not torch.compiler.is_compiling():
            with torch.inference_mode(False):
                self._typed[key] = (mix.clone(), signs.clone())
        return mix, signs

    def coefficients(self, like: Tensor) -> Tensor:
        """(J, c, width): what each channel counts in each block, ``fold_j(x)[b] = sum_t this[j, t, b] x[t, b]``."""
        mix, signs = self._constants(like)
        return mix[:, :, None] * signs.squeeze(-1)

    def fold(self, x: Tensor) -> Tensor:
        """x (..., channels * positions) folded for every block: (..., J, width * positions)."""
        mix, signs = self._constants(x)
        missing = self.c * self.width - self.channels
        x = F.pad(x, (0, missing * self.positions)) if missing else x
        tiles = x.unflatten(-1, (self.c, self.width, self.positions)) * signs
        return torch.matmul(mix, tiles.flatten(-2))

    def fold_tokens(self, x: Tensor) -> Tensor:
        """x (tokens, channels * positions) folded for every block, block by block: (J, tokens, width * positions).

        One product with all tokens side by side, where :meth:`fold` has a small one for each.
        """
        mix, signs = self._constants(x)
        if missing := self.c * self.width - self.channels:
            x = F.pad(x, (0, missing * self.positions))
        tokens = x.size(0)
        tiles = x.new_empty(self.c, tokens, self.width, self.positions)
        torch.mul(x.view(tokens, self.c, self.width, self.positions).transpose(0, 1), signs[:, None], out=tiles)
        return torch.mm(mix, tiles.view(self.c, -1)).view(self.blocks, tokens, -1)

    def unfold_tokens(self, folded: Tensor) -> Tensor:
        """The adjoint of :meth:`fold_tokens`, of a contiguous (J, tokens, width * positions)."""
        mix, signs = self._constants(folded)
        tokens = folded.size(1)
        tiles = torch.mm(mix.t(), folded.view(self.blocks, -1)).view(self.c, tokens, self.width, self.positions)
        x = folded.new_empty(tokens, self.c, self.width, self.positions)
        torch.mul(tiles, signs[:, None], out=x.transpose(0, 1))
        return x.view(tokens, -1)[:, : self.channels * self.positions]

    def fold_channels(self, x: Tensor) -> Tensor:
        """x (N, channels, ...) folded for every block, channel by channel: (N, J * width, ...)."""
        mix, signs = self._constants(x)
        missing = self.c * self.width - self.channels
        x = torch.cat([x, x.new_zeros(x.size(0), missing, *x.shape[2:])], 1) if missing else x
        tiles = x.unflatten(1, (self.c, self.width)) * signs.view(1, self.c, self.width, *[1] * (x.dim() - 2))
        return torch.tensordot(tiles, mix, dims=([1], [1])).movedim(-1, 1).flatten(1, 2)

    def blocks_of(self, rows: Tensor) -> Tensor:
        """(..., rows) as (..., J, rows of a block), filled up with zeros."""
        missing = self.blocks * self.block_rows - self.rows
        return (F.pad(rows, (0, missing)) if missing else rows).unflatten(-1, (self.blocks, self.block_rows))

    def tensors(self) -> list[Tensor]:
        return [*self._mix.tensors(), *self._signs.tensors(), *(t for pair in self._typed.values() for t in pair)]


class FoldedMatrix(SharedMatrix):
    """W (rows, cols) = Z S for a shared matrix Z (rows, cols / c) and the fold S of the input."""

    def __init__(self, inner: SharedMatrix, fold: InputFold):
        self.inner, self.input_fold = inner, fold
        self.rows, self.cols = inner.rows, fold.channels * fold.positions

    @property
    def multiplications(self) -> int:
        return self.inner.multiplications + self.input_fold.blocks * self.cols  # Z, and the fold

    def unfolded(self, narrow: Tensor) -> Tensor:
        """Z S for any Z (rows, cols / c): (rows, cols)."""
        fold = self.input_fold
        blocks = fold.blocks_of(narrow.t()).permute(1, 2, 0)  # (J, rows of a block, narrow columns)
        blocks = blocks.unflatten(-1, (fold.width, fold.positions))
        tiles = blocks[:, :, None] * fold.coefficients(narrow)[:, None, :, :, None]
        return tiles.flatten(0, 1)[: self.rows].flatten(1)[:, : self.cols]

    def folded(self, wide: Tensor) -> Tensor:
        """G S^T for any G (rows, cols): (rows, cols / c)."""
        fold = self.input_fold
        every = fold.fold(wide)  # (rows, J, narrow columns): of each row by the folds of all blocks
        own = torch.arange(self.rows, device=wide.device) // fold.block_rows
        return every[torch.arange(self.rows, device=wide.device), own]

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
        there = (torch.arange(fold.c * fold.width) < fold.channels).view(fold.c, fold.width)
        per_block = (fold.coefficients(torch.zeros((), dtype=torch.float64)).square() * there).sum(1)
        per_block = per_block.repeat_interleave(fold.positions, dim=1)
        return per_block.repeat_interleave(fold.block_rows, dim=0)[: self.rows]

    def linear(self, x: Tensor, psi: Tensor) -> Tensor:
        fold, narrow = self.input_fold, self.inner.weight(psi).to(x.dtype)
        blocks = fold.blocks_of(narrow.t()).permute(1, 0, 2)  # (J, narrow columns, rows of a block)
        y = torch.einsum("...jk,jkn->...jn", fold.fold(x), blocks)
        return y.flatten(-2)[..., : self.rows]

    def kept_tensors(self) -> list[Tensor]:
        return [*self.inner.kept_tensors(), *self.input_fold.tensors()]
