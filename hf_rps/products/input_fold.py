"""The product with a folded input: a small one for each block of rows, and no weight of the dense size either way."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.fold import FoldMatrix
from hf_rps.mappings.input_fold import FoldedMatrix
from hf_rps.products.base import Product, register


@register
class Folded(Product):
    """A batched product of the folded input with the narrow matrix Z, block by block.

    Z is a view of psi where it is contiguous in it, and else made for the time of the product.
    """

    matrix: FoldedMatrix

    def __init__(self, matrix: FoldedMatrix):
        super().__init__(matrix)
        inner = matrix.inner
        self.input_fold, self.rows, self.cols = matrix.input_fold, inner.rows, inner.cols
        is_run = isinstance(inner, FoldMatrix) and len(inner.layout.runs) == 1
        self.slot = inner.layout.runs[0][0] if is_run else None
        size = matrix.block_rows
        whole = self.rows // size
        # (blocks, rows, rows of each block): those that are full, and one that is not
        self.groups = [(slice(0, whole), slice(0, whole * size), size)] if whole else []
        if rest := self.rows - whole * size:
            self.groups.append((slice(whole, whole + 1), slice(whole * size, self.rows), rest))

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return isinstance(matrix, FoldedMatrix)

    def fits(self, x: Tensor) -> bool:
        return True

    def tokens(self, x: Tensor) -> Tensor:
        return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])

    def by_definition(self, x: Tensor, psi: Tensor) -> Tensor:
        return self.matrix.linear_of_folded(x, psi)

    def _narrow(self, psi: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Z (rows, narrow columns), and what its rows must still be multiplied with: outputs, or their gradients.

        With many tokens it costs less to scale Z itself.
        """
        if self.slot is None or tokens > self.cols:
            return self.matrix.inner.make(psi), None
        return self.matrix.inner.block(psi, self.rows, self.slot), self.matrix.inner.factor(psi)

    def _blocks_of(self, weight: Tensor) -> list[Tensor]:
        """weight (rows, narrow columns) as (blocks, rows of each, narrow columns), a tensor for every group."""
        return [weight[rows].view(-1, size, self.cols) for _, rows, size in self.groups]

    def _outputs_of(self, y: Tensor) -> list[Tensor]:
        """y (tokens, rows) as (blocks, tokens, rows of each), a tensor for every group."""
        return [y[:, rows].unflatten(1, (-1, size)).transpose(0, 1) for _, rows, size in self.groups]

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(*x.shape[:-2], self.rows)
        x = self.tokens(x).transpose(0, 1)  # (blocks, tokens, narrow columns)
        weight, factor = self._narrow(psi, x.size(1))
        outputs = self._outputs_of(y.view(-1, self.rows))
        for (blocks, _, _), part, out in zip(self.groups, self._blocks_of(weight), outputs, strict=True):
            torch.bmm(x[blocks], part.transpose(1, 2), out=out)
        if factor is not None:
            return y.mul_(factor) if bias is None else torch.addcmul(bias, y, factor, out=y)
        return y if bias is None else y.add_(bias)

    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        weight, factor = self._narrow(psi, gy.size(0))
        gy = gy if factor is None else (gy * factor).to(gy.dtype)  # (tokens, rows)
        outputs, gx = self._outputs_of(gy), None
        if needs_x:
            gx = gy.new_empty(self.input_fold.blocks, gy.size(0), self.cols)
            gx[self.matrix.blocks :] = 0
            for (blocks, _, _), part, g in zip(self.groups, self._blocks_of(weight), outputs, strict=True):
                torch.bmm(g, part, out=gx[blocks])
            gx = gx.transpose(0, 1)
        if into is not None:
            x = x.transpose(0, 1)  # (blocks, tokens, narrow columns)
            if factor is not None and into.dtype == gy.dtype:
                target = self.matrix.inner.block(into, self.rows, self.slot)
                for (blocks, _, _), part, g in zip(self.groups, self._blocks_of(target), outputs, strict=True):
                    part.baddbmm_(g.transpose(1, 2), x[blocks])
            else:
                self._add_made(into, outputs, x, is_scaled=factor is not None)
        return gx

    def _add_made(self, into: Tensor, outputs: list[Tensor], x: Tensor, is_scaled: bool) -> None:
        """``into`` (m,) += the gradient of Z, made first: of each group's ``outputs`` with x (blocks, tokens, cols)."""
        gradient = x.new_empty(self.rows, self.cols)
        for (blocks, _, _), part, g in zip(self.groups, self._blocks_of(gradient), outputs, strict=True):
            torch.bmm(g.transpose(1, 2), x[blocks], out=part)
        if is_scaled:
            self.matrix.inner.block(into, self.rows, self.slot).add_(gradient)
        else:
            self.matrix.inner.add_adjoint(into, gradient)

    def traced(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        y = self.matrix.linear(x, psi)
        return y if bias is None else y + bias
