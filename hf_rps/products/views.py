"""Products on zero-copy views of psi: no weight is made, and outputs are scaled and signed.

For matrices of :class:`hf_rps.mappings.fold.FoldMatrix`, whose rows are contiguous in psi. A block of rows is a view
that goes straight into the matrix product; the few rows that a run's end splits are pieced together. The backward pass
adds each block's gradient straight into a slice of psi's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.fold import FoldMatrix
from hf_rps.products.base import Product, register

# How many weights can be pieced together on a CPU in the time that a run of its own costs; docs/benchmarks.md has the
# measurement. On a GPU a run costs launches, and made weights are quicker (docs/design.md).
_WEIGHTS_PER_RUN = 1 << 15
_SHARE_OUT_FROM = 1 << 18  # weights from which the product with a single token is shared out between threads


@register
class Views(Product):
    matrix: FoldMatrix

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return isinstance(matrix, FoldMatrix)

    def fits(self, x: Tensor) -> bool:
        """True where W is better read in views than made for this product.

        Every run after the first costs launches of its own and reading x anew, and every output is scaled in a pass
        over y in the forward and one in the backward pass. Making W costs a few passes over it.
        """
        rows, cols, runs = self.matrix.rows, self.matrix.cols, len(self.matrix.layout.runs)
        if x.device.type != "cpu" and runs > 1:
            return False
        outputs = x.numel() // cols * rows
        return (runs - 1) * (_WEIGHTS_PER_RUN + x.numel()) + outputs // 2 <= rows * cols

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        rows, cols = self.matrix.rows, self.matrix.cols
        y = x.new_empty(*x.shape[:-1], rows)  # (..., rows)
        if x.dim() == 2:
            self._multiply(x, psi, y)
        else:
            self._multiply(x.reshape(-1, cols), psi, y.view(-1, rows))
        factor = self.matrix.factor(psi)
        return y.mul_(factor) if bias is None else torch.addcmul(bias, y, factor, out=y)

    def _multiply(self, x: Tensor, psi: Tensor, y: Tensor) -> None:
        """Write x (tokens, cols) times the unscaled weight transposed to y (tokens, rows), which is contiguous."""
        matrix, layout = self.matrix, self.matrix.layout
        threads = torch.get_num_threads() if x.size(0) == 1 and x.device.type == "cpu" else 1
        for row, count, slot in layout.blocks:
            if threads > 1 and count * matrix.cols >= _SHARE_OUT_FROM and x.dtype == torch.float32:
                shared = self._share_out(x, psi, y, threads, (row, count, slot))
                row, count, slot = row + shared, count - shared, slot + shared * matrix.cols
            if count:
                out = y.as_strided((x.size(0), count), (matrix.rows, 1), y.storage_offset() + row)  # (tokens, count)
                torch.mm(x, matrix.block(psi, count, slot).t(), out=out)
        if layout.split:
            split = x @ self._split_rows(psi).t()  # (tokens, number of split rows)
            for (row, _), column in zip(layout.split, split.unbind(1), strict=True):
                y.select(1, row).copy_(column)

    def _share_out(self, x: Tensor, psi: Tensor, y: Tensor, threads: int, block: tuple[int, int, int]) -> int:
        """The product of a single token x (1, cols) with a block, a batch entry for every thread.

        A CPU's library gives a matrix-vector product to one thread, which can't draw all that memory has to give.

        Returns:
            How many rows of the block are done, a multiple of ``threads``.
        """
        row, count, slot = block
        share, cols = count // threads, self.matrix.cols
        # (threads, cols, share): one part of the block per thread, transposed
        weights = psi.as_strided((threads, cols, share), (share * cols, 1, cols), psi.storage_offset() + slot)
        out = y.as_strided((threads, 1, share), (share, share, 1), y.storage_offset() + row)  # (threads, 1, share)
        torch.bmm(x.expand(threads, 1, cols), weights, out=out)
        return share * threads

    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        scaled = (gy * self.matrix.factor(psi)).to(gy.dtype)  # (tokens, rows)
        gx = self._input_gradient(scaled, psi) if needs_x else None
        if into is not None:
            self._add_weight_gradient(into, scaled, x)
        return gx

    def _input_gradient(self, gy: Tensor, psi: Tensor) -> Tensor:
        """gy (tokens, rows), already scaled, times the unscaled weight: (tokens, cols)."""
        gx = None
        for row, count, slot in self.matrix.layout.blocks:
            weight, part = self.matrix.block(psi, count, slot), gy[:, row : row + count]
            gx = part @ weight if gx is None else gx.addmm_(part, weight)
        if self.matrix.layout.split:
            weight, part = self._split_rows(psi), self._split_columns(gy)
            gx = part @ weight if gx is None else gx.addmm_(part, weight)
        return gx

    def _add_weight_gradient(self, into: Tensor, gy: Tensor, x: Tensor) -> None:
        """Add gy^T x, gy (tokens, rows) scaled, into the slots of ``into`` (m,) that the weight reads."""
        layout = self.matrix.layout
        for row, count, slot in layout.blocks:
            part, target = gy[:, row : row + count].t(), self.matrix.block(into, count, slot)  # (count, tokens), view
            if into.dtype == x.dtype:
                target.addmm_(part, x)
            else:  # the product of one block in the compute dtype, summed over blocks and layers in the gradient's
                target.add_(part @ x)
        if layout.split:
            split = self._split_columns(gy).t() @ x  # (number of split rows, cols)
            for i, (_, parts) in enumerate(layout.split):
                column = 0
                for slot, length in parts:
                    into[slot : slot + length].add_(split[i, column : column + length])
                    column += length

    def _split_rows(self, psi: Tensor) -> Tensor:
        """The split rows of W, pieced together: (number of split rows, cols)."""
        pieces = [psi[slot : slot + length] for _, parts in self.matrix.layout.split for slot, length in parts]
        return torch.cat(pieces).view(-1, self.matrix.cols)

    def _split_columns(self, gy: Tensor) -> Tensor:
        """The columns of gy (tokens, rows) that belong to split rows: (tokens, number of split rows)."""
        return torch.stack([gy[:, row] for row, _ in self.matrix.layout.split], dim=1)

    def traced(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        layout, cols, parts = self.matrix.layout, self.matrix.cols, []
        for row, count, slot in layout.blocks:
            parts.append((row, x @ psi[slot : slot + count * cols].view(count, cols).t()))
        if layout.split:
            split = x @ self._split_rows(psi).t()
            parts += [(row, split[..., i : i + 1]) for i, (row, _) in enumerate(layout.split)]
        y = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])], dim=-1)  # (..., rows)
        y = y * self.matrix.factor(psi)
        return (y if bias is None else y + bias).to(x.dtype)
