"""The autograd nodes of shared weights: a linear layer by any product, an input folded, rows, and a weight made whole.

Their backward passes return no gradient for psi: they add it to the buffer of the pass, and the pass's own node
(:class:`hf_rps.psi.sink.GradientSink`) hands the sum to autograd. In a backward pass that is itself differentiated they
differentiate the weight's definition instead.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.input_fold import InputFold
from hf_rps.products.base import Made, Product


class Buffer(Protocol):
    """Where backward passes add up the gradient of psi; see :class:`hf_rps.psi.sink.GradientBuffer`."""

    def get(self, psi: Tensor) -> Tensor: ...


def shared_linear(
    x: Tensor, psi: Tensor, bias: Tensor | None, product: Product, buffer: Buffer | None, base: Tensor | None = None
) -> Tensor:
    """The linear layer whose weight is the shared matrix of ``product``, plus ``base`` if that is given.

    Args:
        x: (..., cols), or as the product's :attr:`input_fold` has made it.
        psi: (m,), the shared array as this pass reads it; of x's dtype or, with a base, of the base's.
        bias: (rows,) or None.
        product: How W is read. With a base the sum is always made, which is one product instead of two.
        buffer: Receives the gradient of psi. None: psi needs no gradient.
        base: (rows, cols), constant, or None.

    Returns:
        (..., rows), equal to ``F.linear(x, base + W, bias)``.
    """
    if torch.is_grad_enabled():
        return internals.apply_function(_SharedLinear, x, psi, bias, base, product, buffer)
    # an autograd node costs as much as a small product
    return _product(product, base).linear(x, psi, bias)


def folded_input(x: Tensor, fold: InputFold) -> Tensor:
    """x (..., cols) folded for every block of rows: (..., blocks, cols / c), differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return internals.apply_function(_FoldedInput, x, fold)
    return fold.fold_unfollowed(x)


def shared_weight(psi: Tensor, matrix: SharedMatrix, buffer: Buffer | None) -> Tensor:
    """W (rows, cols) made whole, for operations other than a matrix product; its gradient goes to ``buffer``.

    A convolution reuses its weight at every position, so making it costs little beside using it (the less, the larger
    its input). But autograd then keeps the whole W for the backward pass, as with a dense layer. The result equals
    ``matrix.weight(psi)``, whose own gradient would be an array of the size of psi for every run.
    """
    return _SharedWeight.apply(psi, matrix, buffer)


def shared_rows(
    ids: Tensor, psi: Tensor, matrix: SharedMatrix, buffer: Buffer | None, padding: int | None = None
) -> Tensor:
    """W[ids], (..., cols), without the rest of W; its gradient goes to ``buffer``, that of row ``padding`` nowhere.

    Args:
        ids: int64, (...).
        psi: (m,), the shared array as this pass reads it.
        matrix: W (rows, cols).
        buffer: Receives the gradient of psi. None: psi needs no gradient.
        padding: A row whose gradient is dropped.

    Raises:
        IndexError: An id is no row.
    """
    return _SharedRows.apply(psi, ids, matrix, buffer, padding)


def rows_by_definition(ids: Tensor, psi: Tensor, matrix: SharedMatrix, padding: int | None) -> Tensor:
    """:func:`shared_rows` out of operations that autograd, compilers and torch.func can follow."""
    rows = matrix.look_up(ids, psi)
    return rows if padding is None else torch.where((ids == padding)[..., None], rows.detach(), rows)


def linear_by_definition(x: Tensor, psi: Tensor, bias: Tensor | None, matrix: SharedMatrix) -> Tensor:
    """:func:`shared_linear` out of operations that autograd, compilers and torch.func can follow."""
    return _plus(matrix.linear(x, psi), bias)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _product(product: Product, base: Tensor | None) -> Product:
    return product if base is None else Made(product.matrix, base)


def _gradients_by_definition(
    y: Tensor, gy: Tensor, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of y with respect to the ``inputs`` that need one."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
    return tuple(next(gradients) if need else None for need in needed)


def _keep(ctx, psi: Tensor) -> None:
    """Keep psi for the backward pass: one tensor of the pass, which all its layers refer to.

    It is not among the saved tensors, of which hooks (offloading, compression) would make a copy for each layer.
    """
    ctx.psi, ctx.version = psi, psi._version


def _kept(ctx) -> Tensor:
    """psi as the forward pass has read it.

    Raises:
        RuntimeError: It was written to since, as autograd says of the tensors that it saves itself.
    """
    if ctx.psi._version != ctx.version:
        raise RuntimeError(
            "the shared array was modified by an in-place operation between a forward pass and its backward pass, "
            "whose gradients would be of other weights. Step the optimizer after all backward passes of a step"
        )
    return ctx.psi


class _FoldedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fold):
        ctx.set_materialize_grads(False)
        ctx.fold = fold
        return fold.fold_unfollowed(x)

    @staticmethod
    def backward(ctx, gradient):
        return None if gradient is None else ctx.fold.unfold(gradient), None


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, psi, bias, base, product, buffer):
        ctx.set_materialize_grads(False)
        ctx.product, ctx.buffer = product, buffer
        ctx.save_for_backward(x, bias, base)
        _keep(ctx, psi)
        return _product(product, base).linear(x, psi, bias)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 6
        (x, bias, base), psi = ctx.saved_tensors, _kept(ctx)
        needs_x, needs_psi, needs_bias = ctx.needs_input_grad[:3]
        product = _product(ctx.product, base)
        if torch.is_grad_enabled():  # double backward
            y = _plus(product.by_definition(x, psi), bias)
            gradients = _gradients_by_definition(y, gy, (x, psi, bias), (needs_x, needs_psi, needs_bias))
            return (*gradients, None, None, None)
        flat = gy if gy.dim() == 2 else gy.reshape(-1, gy.size(-1))  # (tokens, rows)
        gbias = flat.sum(0).to(bias.dtype) if needs_bias else None
        gx = None
        if needs_x or needs_psi:
            into = ctx.buffer.get(psi) if needs_psi else None
            gx = product.gradients(flat, product.tokens(x), psi, needs_x, into)
            if gx is not None and gx.shape != x.shape:
                gx = gx.view(x.shape)
        return gx, None, gbias, None, None, None


class _SharedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, psi, ids, matrix, buffer, padding):
        ctx.set_materialize_grads(False)
        ctx.matrix, ctx.buffer, ctx.padding = matrix, buffer, padding
        ctx.save_for_backward(ids)
        _keep(ctx, psi)
        return matrix.look_up(ids, psi)

    @staticmethod
    def backward(ctx, gradient):
        gpsi = None
        if gradient is not None:
            (ids,), psi = ctx.saved_tensors, _kept(ctx)
            if torch.is_grad_enabled():  # double backward
                rows = rows_by_definition(ids, psi, ctx.matrix, ctx.padding)
                (gpsi,) = _gradients_by_definition(rows, gradient, (psi,), ctx.needs_input_grad[:1])
            else:
                if ctx.padding is not None:
                    gradient = gradient * (ids != ctx.padding)[..., None]
                flat = gradient.reshape(-1, gradient.size(-1))
                ctx.matrix.add_look_up_adjoint(ctx.buffer.get(psi), ids.flatten(), flat)
        return gpsi, None, None, None, None


class _SharedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, psi, matrix, buffer):
        ctx.set_materialize_grads(False)
        ctx.matrix, ctx.buffer = matrix, buffer
        _keep(ctx, psi)
        return matrix.make(psi)

    @staticmethod
    def backward(ctx, gradient):
        gpsi = None
        if gradient is not None:
            psi = _kept(ctx)
            if torch.is_grad_enabled():  # double backward
                weight = ctx.matrix.weight(psi)
                (gpsi,) = _gradients_by_definition(weight, gradient, (psi,), ctx.needs_input_grad[:1])
            else:
                ctx.matrix.add_adjoint(ctx.buffer.get(psi), gradient)
        return gpsi, None, None
