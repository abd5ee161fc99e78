"""y = x W^T + b where W is a signed, scaled slice of the shared array psi: the fast path and, beside it, the plain one.

The fast path (:func:`rps_linear`) feeds zero-copy views of psi to the matrix product and folds scale and sign into the
output, so no weight is materialised; in the backward pass it adds each block's gradient straight into a slice of one
gradient buffer. Where views would be slow, a weight is made for the time of one product
(:func:`hf_rps.kernels.makes_weight`). The plain path (:func:`rps_linear_reference`) builds W from its definition out
of differentiable operations; it is what the fast path is tested against, and what torch.compile, torch.export and
double backward use. :func:`rps_weight` is the fast path of all other operations (convolutions): W itself, with the same
way of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps import kernels
from hf_rps.folding import RowLayout


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
    return kernels.linear(x, psi, bias, row_scale, layout)  # an autograd node costs as much as a small product


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
    return (kernels.unscaled_weight(psi, layout) * row_scale[:, None]).to(psi.dtype)


def indexed_weight(psi: Tensor, slots: Tensor, signed_scale: Tensor) -> Tensor:
    """W = signed_scale * psi[slots] by index gather, for mappings that have no views. ``slots`` int64 (rows, cols)."""
    return (psi[slots] * signed_scale).to(psi.dtype)


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
        return kernels.linear(x, psi, bias, row_scale, layout)

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
        gy, inputs = gy.reshape(-1, layout.rows), x.reshape(-1, layout.cols)
        gx = gbias = None
        if needs_bias:
            gbias = gy.sum(0).to(bias.dtype)
        if kernels.makes_weight(x, layout):
            if needs_x:
                gx = gy @ kernels.make_weight(psi, layout, row_scale)
            if needs_psi:
                kernels.fold_gradient(ctx.buffer.get(psi), gy.t() @ inputs, row_scale, layout)
        elif needs_x or needs_psi:
            scaled = (gy * row_scale).to(gy.dtype)
            if needs_x:
                gx = kernels.input_gradient(scaled, psi, layout)
            if needs_psi:
                kernels.add_weight_gradient(ctx.buffer.get(psi), scaled, inputs, layout)
        return None if gx is None else gx.view(x.shape), None, gbias, None, None, None


def _added(weight: Tensor, psi: Tensor, layout: RowLayout, row_scale: Tensor) -> Tensor:
    """``weight`` (rows, cols), in whatever order it lies, plus the shared weight: a new contiguous tensor."""
    total = torch.empty(layout.rows, layout.cols, dtype=weight.dtype, device=weight.device)
    return torch.addcmul(weight, kernels.unscaled_weight(psi, layout), row_scale[:, None].to(weight.dtype), out=total)


class _RPSWeight(torch.autograd.Function):
    """The weight itself; like :class:`_RPSLinear` its backward adds psi's gradient to the buffer."""

    @staticmethod
    def forward(ctx, psi, row_scale, layout, buffer):
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.buffer = layout, buffer
        ctx.save_for_backward(psi, row_scale)
        return kernels.make_weight(psi, layout, row_scale)

    @staticmethod
    def backward(ctx, gradient):
        gpsi = None
        if gradient is not None:
            psi, row_scale = ctx.saved_tensors
            if torch.is_grad_enabled():  # double backward: differentiate the plain path
                weight = dense_weight(psi, ctx.layout, row_scale)
                (gpsi,) = _plain_gradients(weight, gradient, (psi,), ctx.needs_input_grad[:1])
            else:
                kernels.fold_gradient(ctx.buffer.get(psi), gradient, row_scale, ctx.layout)
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
            kernels.fold_gradient(ctx.buffer.get(psi), flat.t() @ x.reshape(-1, layout.cols), row_scale, layout)
        return gx, None, None, gbias, None, None, None
