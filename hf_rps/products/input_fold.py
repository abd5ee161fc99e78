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
        whole, rest = divmod(self.rows, size)
        # (first block, blocks, rows of each): those that are full, and one that is not
        self.groups = [group for group in ((0, whole, size), (whole, 1, rest)) if group[1] * group[2]]

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return isinstance(matrix, FoldedMatrix)

    def fits(self, x: Tensor) -> bool:
        return True

    def tokens(self, x: Tensor) -> Tensor:
        return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])

    def by_definition(self, x: Tensor, psi: Tensor) -> Tensor:
        return self.matrix.linear_of_folded(x, psi)

    def _narrow(self, psi: Tensor, tokens: int) -> tuple[Tensor, int, Tensor | None]:
        """Where Z (rows, narrow columns) lies, contiguous: a tensor and the place in it. And what its rows must still
        be multiplied with, in the outputs or their gradients.

        With many tokens it costs less to scale Z itself.
        """
        if self.slot is None or tokens > self.cols:
            return self.matrix.inner.make(psi), 0, None
        return psi, self.slot, self.matrix.inner.factor(psi)

    # A view costs two microseconds whatever its size, which is a good part of a small layer: one each, by its strides.

    def _weights(self, array: Tensor, slot: int) -> list[Tensor]:
        """Z at a place of ``array`` as (blocks, rows of each, narrow columns), a view for every group."""
        cols, start = self.cols, array.storage_offset() + slot
        size = self.matrix.block_rows * cols
        return [
            array.as_strided((blocks, rows, cols), (size, cols, 1), start + first * size)
            for first, blocks, rows in self.groups
        ]

    def _outputs(self, y: Tensor, tokens: int) -> list[Tensor]:
        """A contiguous y (..., rows) as (blocks, tokens, rows of each), a view for every group."""
        size, start = self.matrix.block_rows, y.storage_offset()
        return [
            y.as_strided((blocks, tokens, rows), (size, self.rows, 1), start + first * size)
            for first, blocks, rows in self.groups
        ]

    def _inputs(self, x: Tensor, tokens: int) -> list[Tensor]:
        """A contiguous x (..., blocks, narrow columns) as (blocks, tokens, narrow columns), a view for every group."""
        cols, start = self.cols, x.storage_offset()
        strides = (cols, self.input_fold.blocks * cols, 1)
        return [x.as_strided((blocks, tokens, cols), strides, start + first * cols) for first, blocks, _ in self.groups]

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-2], self.rows)
        tokens = y.numel() // self.rows
        array, slot, factor = self._narrow(psi, tokens)
        parts = zip(self._inputs(x, tokens), self._weights(array, slot), self._outputs(y, tokens), strict=True)
        for part, weight, out in parts:
            torch.bmm(part, weight.transpose(1, 2), out=out)
        if factor is not None:
            return y.mul_(factor) if bias is None else torch.addcmul(bias, y, factor, out=y)
        return y if bias is None else y.add_(bias)

    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        tokens, gx = gy.size(0), None
        array, slot, factor = self._narrow(psi, tokens)
        gy = gy.contiguous() if factor is None else (gy * factor).to(gy.dtype).contiguous()  # (tokens, rows)
        outputs = self._outputs(gy, tokens)
        if needs_x:
            gx = gy.new_empty(self.input_fold.blocks, tokens, self.cols)
            for (first, blocks, _), g, weight in zip(self.groups, outputs, self._weights(array, slot), strict=True):
                torch.bmm(g, weight, out=gx[first : first + blocks])
            if self.matrix.blocks < self.input_fold.blocks:
                gx[self.matrix.blocks :] = 0
            gx = gx.transpose(0, 1)
        if into is not None:
            inputs = self._inputs(x.contiguous(), tokens)
            if factor is not None and into.dtype == gy.dtype:
                for g, part, target in zip(outputs, inputs, self._weights(into, slot), strict=True):
                    target.baddbmm_(g.transpose(1, 2), part)
            else:
                self._add_made(into, outputs, inputs, is_scaled=factor is not None)
        return gx

    def _add_made(self, into: Tensor, outputs: list[Tensor], inputs: list[Tensor], is_scaled: bool) -> None:
        """``into`` (m,) += the gradient of Z, made first."""
        gradient = inputs[0].new_empty(self.rows, self.cols)
        for g, part, target in zip(outputs, inputs, self._weights(gradient, 0), strict=True):
            torch.bmm(g.transpose(1, 2), part, out=target)
        if is_scaled:
            self.matrix.inner.block(into, self.rows, self.slot).add_(gradient)
        else:
            self.matrix.inner.add_adjoint(into, gradient)

    def traced(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        y = self.matrix.linear(x, psi)
        return y if bias is None else y + bias
