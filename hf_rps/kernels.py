"""Between psi and one weight matrix, without autograd: products on views of psi, W made whole, gradients folded back.

W (rows, cols) is described by a :class:`hf_rps.folding.RowLayout` in the shared array psi (m,) and ``row_scale``
(rows,), the scale times the sign of every row. "Unscaled" means without that factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.folding import Fold, RowLayout
from hf_rps.mapping import WEIGHTS_A_RUN

_WEIGHTS_A_RUN_ON_GPU = 1 << 21  # from the time of a launch and the bandwidth, not measured
_SHARE_OUT_FROM = 1 << 18  # weights from which the product with a single token is shared out between threads


def unscaled_weight(psi: Tensor, layout: RowLayout) -> Tensor:
    """W without sign and scale (rows, cols), pieced together; differentiable in psi."""
    return torch.cat(_runs(psi, layout)).view(layout.rows, layout.cols)


def make_weight(psi: Tensor, layout: RowLayout, row_scale: Tensor) -> Tensor:
    """W (rows, cols) in psi's dtype, in memory of its own."""
    weight = psi.new_empty(layout.rows, layout.cols)
    if len(layout.runs) == 1:
        block = _block(psi, layout, layout.rows, layout.runs[0][0])
        return torch.mul(block, row_scale[:, None], out=weight)
    torch.cat(_runs(psi, layout), out=weight.view(-1))
    return weight.mul_(row_scale[:, None])


def fold_gradient(buffer: Tensor, gradient: Tensor, row_scale: Tensor, layout: RowLayout) -> None:
    """Add the gradient (rows, cols) of W, scaled, into the slots of ``buffer`` (m,) that the weight reads."""
    if len(layout.runs) == 1:
        _block(buffer, layout, layout.rows, layout.runs[0][0]).addcmul_(gradient, row_scale[:, None])
        return
    pieces = (gradient * row_scale[:, None]).reshape(-1).split([length for _, length in layout.runs])
    for (slot, length), piece in zip(layout.runs, pieces, strict=True):
        buffer[slot : slot + length].add_(piece)


def _runs(psi: Tensor, layout: RowLayout) -> list[Tensor]:
    """The contiguous runs of psi that W consists of, as views."""
    return [psi[slot : slot + length] for slot, length in layout.runs]


# ---- all weights of a small model at once


def unfold(psi: Tensor, folds: tuple[Fold, ...]) -> Tensor:
    """All weights at once, unscaled: the flat index range (n,) read from psi (m,), in a few operations a fold."""
    parts = []
    for fold in folds:
        twice = psi[fold.base : fold.base + fold.m].repeat(2)  # a rotation by u is its slice [u, u + m)
        shifts = torch.tensor(fold.shifts, device=psi.device)
        parts.append(twice.as_strided((fold.m, fold.m), (1, 1)).index_select(0, shifts).view(-1)[: fold.n])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fold_back(gradient: Tensor, folds: tuple[Fold, ...]) -> Tensor:
    """The transpose of :func:`unfold`: (n,) to (m,), the sum over the weights on each slot."""
    totals = []
    for part, fold in zip(gradient.split([fold.n for fold in folds]), folds, strict=True):
        twice = part.new_zeros(2 * fold.m)
        for partition, shift in zip(part.split(fold.m), fold.shifts, strict=True):
            twice[shift : shift + len(partition)].add_(partition)
        totals.append(twice[: fold.m] + twice[fold.m :])
    return totals[0] if len(totals) == 1 else torch.cat(totals)


# ---- products


def makes_weight(x: Tensor, layout: RowLayout) -> bool:
    """True where W is better made for a product with x (..., cols), and dropped after it, than read in views of psi.

    On views every run after the first costs launches of its own and reading x anew, and every output is scaled in a
    pass over y in the forward and one in the backward pass. Making W costs a few passes over it. The weights of these
    costs were measured on a CPU (docs/benchmarks.md).
    """
    run = (WEIGHTS_A_RUN if x.device.type == "cpu" else _WEIGHTS_A_RUN_ON_GPU) + x.numel()
    outputs = x.numel() // layout.cols * layout.rows
    return (len(layout.runs) - 1) * run + outputs // 2 > layout.rows * layout.cols


def linear(x: Tensor, psi: Tensor, bias: Tensor | None, row_scale: Tensor, layout: RowLayout) -> Tensor:
    """x (..., cols) times W transposed, plus bias: (..., rows), a new tensor and not a view of one."""
    if makes_weight(x, layout):
        return F.linear(x, make_weight(psi, layout, row_scale), None if bias is None else bias.to(x.dtype))
    y = x.new_empty(*x.shape[:-1], layout.rows)
    _multiply(x.reshape(-1, layout.cols), psi, layout, y.view(-1, layout.rows))
    return y.mul_(row_scale) if bias is None else torch.addcmul(bias, y, row_scale, out=y)


def _multiply(x: Tensor, psi: Tensor, layout: RowLayout, y: Tensor) -> None:
    """Write x (tokens, cols) times the unscaled weight transposed to y (tokens, rows), which is contiguous."""
    threads = torch.get_num_threads() if x.size(0) == 1 and x.device.type == "cpu" else 1
    for row, count, slot in layout.blocks:
        if threads > 1 and count * layout.cols >= _SHARE_OUT_FROM and x.dtype == torch.float32:
            shared = _share_out(x, psi, layout, y, threads, (row, count, slot))
            row, count, slot = row + shared, count - shared, slot + shared * layout.cols
        if count:
            out = y.as_strided((x.size(0), count), (layout.rows, 1), y.storage_offset() + row)
            torch.mm(x, _block(psi, layout, count, slot).t(), out=out)
    if layout.torn:
        torn = x @ _torn_rows(psi, layout).t()
        for (row, _), column in zip(layout.torn, torn.unbind(1), strict=True):
            y.select(1, row).copy_(column)


def _share_out(x: Tensor, psi: Tensor, layout: RowLayout, y: Tensor, threads: int, block: tuple[int, int, int]) -> int:
    """The product of a single token x (1, cols) with a block, a batch entry for every thread.

    A CPU's library gives a matrix-vector product to one thread, which can't draw all that memory has to give.

    Returns:
        How many rows of the block are done, a multiple of ``threads``.
    """
    row, count, slot = block
    share, cols = count // threads, layout.cols
    weights = psi.as_strided((threads, cols, share), (share * cols, 1, cols), psi.storage_offset() + slot)
    out = y.as_strided((threads, 1, share), (share, share, 1), y.storage_offset() + row)
    torch.bmm(x.expand(threads, 1, cols), weights, out=out)
    return share * threads


def traced_linear(x: Tensor, psi: Tensor, bias: Tensor | None, row_scale: Tensor, layout: RowLayout) -> Tensor:
    """The same on views as ordinary operations, which a compiler can trace and fuse; (..., rows)."""
    parts = []
    for row, count, slot in layout.blocks:
        parts.append((row, x @ psi[slot : slot + count * layout.cols].view(count, layout.cols).t()))
    if layout.torn:
        torn = x @ _torn_rows(psi, layout).t()
        parts += [(row, torn[..., i : i + 1]) for i, (row, _) in enumerate(layout.torn)]
    y = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])], dim=-1) * row_scale
    return (y if bias is None else y + bias).to(x.dtype)


def input_gradient(gy: Tensor, psi: Tensor, layout: RowLayout) -> Tensor:
    """gy (tokens, rows), already scaled, times the unscaled weight: (tokens, cols)."""
    gx = None
    for row, count, slot in layout.blocks:
        weight, part = _block(psi, layout, count, slot), gy[:, row : row + count]
        gx = part @ weight if gx is None else gx.addmm_(part, weight)
    if layout.torn:
        weight, part = _torn_rows(psi, layout), _columns(gy, layout)
        gx = part @ weight if gx is None else gx.addmm_(part, weight)
    return gx


def add_weight_gradient(buffer: Tensor, gy: Tensor, x: Tensor, layout: RowLayout) -> None:
    """Add gy^T x, gy (tokens, rows) scaled, into the slots of ``buffer`` (m,) that the weight reads: W's gradient."""
    for row, count, slot in layout.blocks:
        part, target = gy[:, row : row + count].t(), _block(buffer, layout, count, slot)
        if buffer.dtype == x.dtype:
            target.addmm_(part, x)
        else:  # the product of one block in the compute dtype, summed over blocks and layers in the buffer's
            target.add_(part @ x)
    if layout.torn:
        torn = _columns(gy, layout).t() @ x
        for i, (_, parts) in enumerate(layout.torn):
            column = 0
            for slot, length in parts:
                buffer[slot : slot + length].add_(torn[i, column : column + length])
                column += length


def _block(array: Tensor, layout: RowLayout, count: int, slot: int) -> Tensor:
    """View of ``count`` rows from ``slot`` of psi or its gradient buffer: (count, cols)."""
    return array.as_strided((count, layout.cols), (layout.cols, 1), array.storage_offset() + slot)


def _torn_rows(psi: Tensor, layout: RowLayout) -> Tensor:
    """The torn rows of W, pieced together: (number of torn rows, cols)."""
    pieces = [psi[slot : slot + length] for _, parts in layout.torn for slot, length in parts]
    return torch.cat(pieces).view(-1, layout.cols)


def _columns(gy: Tensor, layout: RowLayout) -> Tensor:
    """The columns of gy (tokens, rows) that belong to torn rows: (tokens, number of torn rows)."""
    return torch.stack([gy[:, row] for row, _ in layout.torn], dim=1)
