"""y = x W^T + b where W is a signed, scaled slice of the shared array psi: the fast path and, beside it, the plain one.

The fast path (:func:`rps_linear`) feeds zero-copy views of psi to the matrix product and folds scale and sign into the
output, so no weight is materialised; in the backward pass it adds each block's gradient straight into a slice of one
gradient buffer. Only a weight of so many short runs that a product for each would be slow is pieced together, for the
time of one product (:func:`_is_pieced`). The plain path (:func:`rps_linear_reference`) builds W from its definition out
of differentiable operations; it is what the fast path is tested against, and what torch.compile, torch.export and
double backward use. :func:`rps_weight` is the fast path of all other operations (convolutions): W itself, with the same
way of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.folding import Fold, RowLayout
from hf_rps.mapping import WEIGHTS_A_RUN


class GradientBuffer:
    """Where the backward passes of all layers that share one gate add up the gradient of psi.

    A backward pass adds into a buffer of its own (of float32, or float64 for a float64 psi), found by the id of the
    autograd engine's graph task: a backward pass that an exception cut short leaves nothing for the next one, and one
    that runs inside another (reentrant checkpointing) does not mix with it.
    """

    __slots__ = ("_allocate", "_buffers")

    def __init__(self, allocate: Callable[[Tensor], Tensor]):
        self._allocate = allocate
        self._buffers: dict[int, Tensor] = {}

    def get(self, psi: Tensor) -> Tensor:
        """The buffer (m,) of the running backward pass, zero at first."""
        task = torch._C._current_graph_task_id()
        buffer = self._buffers.get(task)
        if buffer is None:
            buffer = self._buffers[task] = self._allocate(psi)
        return buffer

    def take(self) -> Tensor | None:
        """Hand over the buffer of the running backward pass, or None if nothing was added."""
        return self._buffers.pop(torch._C._current_graph_task_id(), None)


def rps_linear(
    x: Tensor, psi: Tensor, layout: RowLayout, row_scale: Tensor, bias: Tensor | None, buffer: GradientBuffer | None
) -> Tensor:
    """Apply the linear layer whose weight W (rows, cols) is described by ``layout``, through views of psi.

    Args:
        x: (..., cols), of psi's dtype.
        psi: (m,), the shared array; in training the output of a gate (see :mod:`hf_rps.bank`).
        layout: Blocks and torn rows of W.
        row_scale: (rows,), scale times sign of every row.
        bias: (rows,) or None.
        buffer: Receives the gradient of psi; its gate returns it to autograd. None: psi needs no gradient.

    Returns:
        (..., rows), equal to ``F.linear(x, dense_weight(psi, layout, row_scale), bias)``.
    """
    if torch.is_grad_enabled():
        return _RPSLinear.apply(x, psi, bias, row_scale, layout, buffer)
    return _linear(x, psi, bias, row_scale, layout)  # an autograd node costs as much as a small product


def rps_linear_reference(x: Tensor, psi: Tensor, layout: RowLayout, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The plain form of :func:`rps_linear`, by definition: build W, then ``F.linear``."""
    return F.linear(x, dense_weight(psi, layout, row_scale), bias)


def rps_delta_linear(
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    layout: RowLayout,
    row_scale: Tensor,
    bias: Tensor | None,
    buffer: GradientBuffer | None,
) -> Tensor:
    """Apply the linear layer whose weight is ``weight`` (rows, cols), constant, plus the W of :func:`rps_linear`.

    The sum is built once in the forward and once in the backward pass, in the dtype of ``weight`` and psi (they must
    agree), and dropped: one matrix product instead of two for every product of a dense layer. The gradient of the sum
    is made whole, too, and folded into psi's: at the ratios of adapters a matrix has so many blocks that a product a
    block is slow. The products run in the dtype of x. Everything else is as in :func:`rps_linear`.
    """
    return _RPSDeltaLinear.apply(x, weight, psi, bias, row_scale, layout, buffer)


def rps_delta_linear_reference(
    x: Tensor, weight: Tensor, psi: Tensor, layout: RowLayout, row_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The plain form of :func:`rps_delta_linear`, by definition."""
    return F.linear(x, (weight + dense_weight(psi, layout, row_scale)).to(x.dtype), bias)


def rps_weight(psi: Tensor, layout: RowLayout, row_scale: Tensor, buffer: GradientBuffer | None) -> Tensor:
    """Make W (rows, cols) whole, for operations other than a matrix product; its gradient is folded into ``buffer``.

    A convolution reuses its weight at every position, so making it costs little beside using it (the less, the larger
    its input). But autograd then keeps the whole W for the backward pass, as with a dense layer. The arguments are
    those of :func:`rps_linear`, and the result equals :func:`dense_weight`, whose own gradient would be an array of the
    size of psi for every run.
    """
    return _RPSWeight.apply(psi, row_scale, layout, buffer)


def dense_weight(psi: Tensor, layout: RowLayout, row_scale: Tensor) -> Tensor:
    """W (rows, cols) = row_scale[r] * psi[slot(r, c)], differentiable in psi (m,): the plain :func:`rps_weight`."""
    return (_unscaled(psi, layout) * row_scale[:, None]).to(psi.dtype)


def _unscaled(psi: Tensor, layout: RowLayout) -> Tensor:
    """W without sign and scale (rows, cols), pieced together; differentiable in psi."""
    return torch.cat(_runs(psi, layout)).view(layout.rows, layout.cols)


def _runs(psi: Tensor, layout: RowLayout) -> list[Tensor]:
    """The contiguous runs of psi that W consists of, as views."""
    return [psi[slot : slot + length] for slot, length in layout.runs]


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
        totals.append(twice[: fold.m].add_(twice[fold.m :]))
    return totals[0] if len(totals) == 1 else torch.cat(totals)


def indexed_weight(psi: Tensor, slots: Tensor, signed_scale: Tensor) -> Tensor:
    """W = signed_scale * psi[slots] by index gather, for mappings that have no views. ``slots`` int64 (rows, cols)."""
    return (psi[slots] * signed_scale).to(psi.dtype)


_WEIGHTS_A_RUN_ON_GPU = 1 << 21  # from the time of a launch and the bandwidth, not measured


def _is_pieced(x: Tensor, layout: RowLayout) -> bool:
    """True where W is put together for its product with x (..., cols), because it has so many short runs.

    On views every further run costs its own launches, and x is read once more.
    """
    run = (WEIGHTS_A_RUN if x.device.type == "cpu" else _WEIGHTS_A_RUN_ON_GPU) + x.numel() // 4
    return (len(layout.runs) - 1) * run > layout.rows * layout.cols


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


def _multiply(x: Tensor, psi: Tensor, layout: RowLayout) -> Tensor:
    """x (..., cols) times the unscaled weight transposed: (..., rows), a new tensor and not a view of one."""
    if len(layout.runs) == 1:
        return F.linear(x, _block(psi, layout, layout.rows, layout.runs[0][0]))
    if _is_pieced(x, layout):
        return F.linear(x, _unscaled(psi, layout))
    y = x.new_empty(*x.shape[:-1], layout.rows)
    x, columns = x.reshape(-1, layout.cols), y.view(-1, layout.rows)
    for row, count, slot in layout.blocks:
        torch.mm(x, _block(psi, layout, count, slot).t(), out=columns[:, row : row + count])
    if layout.torn:
        torn = x @ _torn_rows(psi, layout).t()
        for i, (row, _) in enumerate(layout.torn):
            columns[:, row].copy_(torn[:, i])
    return y


def _linear(x: Tensor, psi: Tensor, bias: Tensor | None, row_scale: Tensor, layout: RowLayout) -> Tensor:
    """The forward pass of :func:`rps_linear`."""
    y = _multiply(x, psi, layout)
    return y.mul_(row_scale) if bias is None else torch.addcmul(bias, y, row_scale, out=y)


def _input_gradient(gy: Tensor, psi: Tensor, layout: RowLayout, pieced: bool) -> Tensor:
    """gy (tokens, rows), already scaled, times the unscaled weight: (tokens, cols)."""
    if pieced:
        return gy @ _unscaled(psi, layout)
    gx = None
    for row, count, slot in layout.blocks:
        weight, part = _block(psi, layout, count, slot), gy[:, row : row + count]
        gx = part @ weight if gx is None else gx.addmm_(part, weight)
    if layout.torn:
        weight, part = _torn_rows(psi, layout), _columns(gy, layout)
        gx = part @ weight if gx is None else gx.addmm_(part, weight)
    return gx


def _add_weight_gradient(buffer: Tensor, gy: Tensor, x: Tensor, layout: RowLayout, pieced: bool) -> None:
    """Add gy^T x, the gradient of the unscaled weight, into the slots of ``buffer`` (m,) that the weight reads."""
    if pieced:
        _fold_gradient(buffer, gy.t() @ x, layout)
        return
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


def _fold_gradient(buffer: Tensor, gradient: Tensor, layout: RowLayout) -> None:
    """Add the gradient (rows, cols) of the unscaled weight into the slots of ``buffer`` (m,) that the weight reads."""
    pieces = gradient.view(-1).split([length for _, length in layout.runs])
    for (slot, length), piece in zip(layout.runs, pieces, strict=True):
        buffer[slot : slot + length].add_(piece)


def _plain_gradients(
    y: Tensor, gy: Tensor, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of the plain path's output y with respect to the ``inputs`` that need one."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
    return tuple(next(gradients) if need else None for need in needed)


class _RPSLinear(torch.autograd.Function):
    """The fast path. Its backward returns no gradient for psi: it adds it to the buffer, which the gate returns."""

    @staticmethod
    def forward(ctx, x, psi, bias, row_scale, layout, buffer):
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.buffer = layout, buffer
        ctx.save_for_backward(x, psi, bias, row_scale)
        return _linear(x, psi, bias, row_scale, layout)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return None, None, None, None, None, None
        x, psi, bias, row_scale = ctx.saved_tensors
        needs_x, needs_psi, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # double backward: differentiate the plain path
            y = rps_linear_reference(x, psi, ctx.layout, row_scale, bias)
            gx, gpsi, gbias = _plain_gradients(y, gy, (x, psi, bias), (needs_x, needs_psi, needs_bias))
            return gx, gpsi, gbias, None, None, None
        layout = ctx.layout
        flat = gy.reshape(-1, layout.rows)
        gx = gbias = None
        if needs_bias:
            gbias = flat.sum(0).to(bias.dtype)
        if needs_x or needs_psi:
            scaled = (flat * row_scale).to(flat.dtype)
            pieced = _is_pieced(x, layout)
            if needs_x:
                gx = _input_gradient(scaled, psi, layout, pieced).view(x.shape)
            if needs_psi:
                _add_weight_gradient(ctx.buffer.get(psi), scaled, x.reshape(-1, layout.cols), layout, pieced)
        return gx, None, gbias, None, None, None


def _added(weight: Tensor, psi: Tensor, layout: RowLayout, row_scale: Tensor) -> Tensor:
    """``weight`` (rows, cols), in whatever order it lies, plus the shared weight: a new contiguous tensor."""
    total = torch.empty(layout.rows, layout.cols, dtype=weight.dtype, device=weight.device)
    return torch.addcmul(weight, _unscaled(psi, layout), row_scale[:, None].to(weight.dtype), out=total)


def _fold_scaled_gradient(buffer: Tensor, gradient: Tensor, row_scale: Tensor, layout: RowLayout) -> None:
    """The same from the gradient (rows, cols) of W itself, which is scaled on the way, in no memory of its own."""
    cols = layout.cols
    for row, count, slot in layout.blocks:
        rows = slice(row, row + count)
        buffer[slot : slot + count * cols].view(count, cols).addcmul_(gradient[rows], row_scale[rows, None])
    for row, parts in layout.torn:
        column = 0
        for slot, length in parts:
            buffer[slot : slot + length].addcmul_(gradient[row, column : column + length], row_scale[row])
            column += length


class _RPSWeight(torch.autograd.Function):
    """The weight itself; like :class:`_RPSLinear` its backward adds psi's gradient to the buffer."""

    @staticmethod
    def forward(ctx, psi, row_scale, layout, buffer):
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.buffer = layout, buffer
        ctx.save_for_backward(psi, row_scale)
        weight = psi.new_empty(layout.rows, layout.cols)  # returned itself: models may change it in place
        torch.cat(_runs(psi, layout), out=weight.view(-1))
        return weight.mul_(row_scale[:, None])

    @staticmethod
    def backward(ctx, gradient):
        gpsi = None
        if gradient is not None:
            psi, row_scale = ctx.saved_tensors
            if torch.is_grad_enabled():  # double backward: differentiate the plain path
                weight = dense_weight(psi, ctx.layout, row_scale)
                (gpsi,) = _plain_gradients(weight, gradient, (psi,), ctx.needs_input_grad[:1])
            else:
                _fold_scaled_gradient(ctx.buffer.get(psi), gradient, row_scale, ctx.layout)
        return gpsi, None, None, None


class _RPSDeltaLinear(torch.autograd.Function):
    """The fast path of a delta; like :class:`_RPSLinear` it adds psi's gradient to the buffer."""

    @staticmethod
    def forward(ctx, x, weight, psi, bias, row_scale, layout, buffer):
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.buffer = layout, buffer
        ctx.save_for_backward(x, weight, psi, bias, row_scale)
        return F.linear(
            x, _added(weight, psi, layout, row_scale).to(x.dtype), None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 7
        x, weight, psi, bias, row_scale = ctx.saved_tensors
        needs_x, _, needs_psi, needs_bias = ctx.needs_input_grad[:4]
        layout = ctx.layout
        if torch.is_grad_enabled():  # double backward: differentiate the plain path
            y = rps_delta_linear_reference(x, weight, psi, layout, row_scale, bias)
            gx, gpsi, gbias = _plain_gradients(y, gy, (x, psi, bias), (needs_x, needs_psi, needs_bias))
            return gx, None, gpsi, gbias, None, None, None
        flat = gy.reshape(-1, layout.rows)
        gx = gbias = None
        if needs_bias:
            gbias = flat.sum(0).to(bias.dtype)
        if needs_x:
            gx = (flat @ _added(weight, psi, layout, row_scale).to(gy.dtype)).view(x.shape)
        if needs_psi:
            scaled = (flat * row_scale).to(flat.dtype)
            _fold_gradient(ctx.buffer.get(psi), scaled.t() @ x.reshape(-1, layout.cols), layout)
        return gx, None, None, gbias, None, None, None
