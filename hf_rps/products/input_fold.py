"""The product with a folded input: two small ones, and no weight of the size of the dense one in either direction."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.fold import FoldMatrix
from hf_rps.mappings.input_fold import FoldedMatrix
from hf_rps.products.base import Product, register


@register
class Folded(Product):
    """x is folded for each block of rows, and a batched product with the narrow matrix Z follows.

    Z is a view of psi where it is contiguous in it, and else made for the time of the product.
    """

    matrix: FoldedMatrix

    def __init__(self, matrix: FoldedMatrix):
        super().__init__(matrix)
        inner = matrix.inner
        self.fold, self.rows, self.cols = matrix.input_fold, inner.rows, inner.cols
        is_run = isinstance(inner, FoldMatrix) and len(inner.layout.runs) == 1
        self.slot = inner.layout.runs[0][0] if is_run else None
        whole = self.rows // self.fold.block_rows
        # (blocks, first row, rows of each): those that are full, and one that is not
        self.groups = [(slice(0, whole), 0, self.fold.block_rows)] if whole else []
        if rest := self.rows - whole * self.fold.block_rows:
            self.groups.append((slice(whole, whole + 1), whole * self.fold.block_rows, rest))

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return isinstance(matrix, FoldedMatrix)

    def fits(self, x: Tensor) -> bool:
        return True

    def _narrow(self, psi: Tensor) -> tuple[Tensor, Tensor | None]:
        """Z (rows, narrow columns), and what its rows must still be multiplied with."""
        if self.slot is None:
            return self.matrix.inner.make(psi), None
        return self.matrix.inner.block(psi, self.rows, self.slot), self.matrix.inner.factor(psi)

    def _parts(self, rows: Tensor) -> list[tuple[slice, Tensor]]:
        """(rows, ...) as (blocks, rows of a block, ...) for the full blocks, and for the one that is not."""
        return [
            (blocks, rows[first : first + (blocks.stop - blocks.start) * size].unflatten(0, (-1, size)))
            for blocks, first, size in self.groups
        ]

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.rows)  # (..., rows)
        folded = self.fold.fold_tokens(x.reshape(-1, x.size(-1)))  # (J, tokens, narrow columns)
        weight, factor = self._narrow(psi)
        for (blocks, part), (_, out) in zip(self._parts(weight), self._parts(y.view(-1, self.rows).t()), strict=True):
            torch.bmm(folded[blocks], part.transpose(1, 2), out=out.transpose(1, 2))
        if factor is not None:
            return y.mul_(factor) if bias is None else torch.addcmul(bias, y, factor, out=y)
        return y if bias is None else y.add_(bias)

    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        weight, factor = self._narrow(psi)
        gy = gy if factor is None else (gy * factor).to(gy.dtype)  # (tokens, rows)
        gx = None
        if needs_x:
            folded = gy.new_empty(self.fold.blocks, gy.size(0), self.cols)
            for (blocks, part), (_, g) in zip(self._parts(weight), self._parts(gy.t()), strict=True):
                torch.bmm(g.transpose(1, 2), part, out=folded[blocks])
            gx = self.fold.unfold_tokens(folded)
        if into is not None:
            self._add_weight_gradient(into, gy, self.fold.fold_tokens(x))
        return gx

    def _add_weight_gradient(self, into: Tensor, gy: Tensor, folded: Tensor) -> None:
        """``into`` (m,) += R^T of gy (tokens, rows) with ``folded`` (J, tokens, narrow columns)."""
        if self.slot is not None and into.dtype == gy.dtype:
            target = self.matrix.inner.block(into, self.rows, self.slot)
            for (blocks, g), (_, out) in zip(self._parts(gy.t()), self._parts(target), strict=True):
                out.baddbmm_(g, folded[blocks])
            return
        gradient = gy.new_empty(self.rows, self.cols)
        for (blocks, g), (_, out) in zip(self._parts(gy.t()), self._parts(gradient), strict=True):
            torch.bmm(g, folded[blocks], out=out)
        if self.slot is not None:  # scaled already
            self.matrix.inner.block(into, self.rows, self.slot).add_(gradient)
        else:
            self.matrix.inner.add_adjoint(into, gradient)

    def traced(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        y = self.matrix.linear(x, psi)
        return y if bias is None else y + bias
