"""The gradient sink: the autograd node between psi and all its uses in one pass.

Backward passes of layers add into its buffer, and the sink hands the sum, divided slot by slot, to psi once. So
whatever hooks on psi (DDP, FSDP, gradient accumulation, clipping, GradScaler) sees one ordinary gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.psi.divisor import Divisor
from hf_rps.psi.memory import GradientMemory


class GradientBuffer:
    """Where the backward passes of all layers that share one sink add up the gradient of psi.

    A backward pass adds into a buffer of its own (of float32, or float64 for a float64 psi), found by the id of the
    autograd engine's graph task: a backward pass that an exception cut short leaves nothing for the next one, and one
    that runs inside another (reentrant checkpointing) does not mix with it.
    """

    __slots__ = ("_buffers", "_memory")

    def __init__(self, memory: GradientMemory):
        self._memory = memory
        self._buffers: dict[int, Tensor] = {}

    def get(self, psi: Tensor) -> Tensor:
        """The buffer (m,) of the running backward pass, zero at first."""
        task = internals.backward_id()
        buffer = self._buffers.get(task)
        if buffer is None:
            buffer = self._buffers[task] = self._memory.zeros(psi)
        return buffer

    def take(self) -> Tensor | None:
        """Hand over the buffer of the running backward pass, or None if nothing was added."""
        buffer = self._buffers.pop(internals.backward_id(), None)
        if buffer is not None:
            self._memory.remember(buffer)
        return buffer


class GradientSink(torch.autograd.Function):
    """Identity (or a cast made beforehand) from psi to its uses; backward returns buffer and gradient, divided.

    ``check_nested`` is called with psi in the backward pass of a sink that was made inside a backward pass, and may
    raise.
    """

    @staticmethod
    def forward(ctx, psi: Tensor, cast: Tensor | None, buffer: GradientBuffer, divisor: Divisor, check_nested):
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.divisor, ctx.check_nested, ctx.dtype = buffer, divisor, check_nested, psi.dtype
        ctx.recomputed = internals.backward_id() != -1
        ctx.psi = psi
        source = psi if cast is None else cast
        return source.view_as(source)

    @staticmethod
    def backward(ctx, grad):
        if ctx.recomputed:
            ctx.check_nested(ctx.psi)
        total = ctx.buffer.take()
        if total is not None and not torch.is_grad_enabled():
            if grad is not None:
                total.add_(grad)
            ctx.divisor.divide_(total)
        elif grad is not None:  # from the plain path; the tensor is not ours to write to
            total = grad if total is None else grad + total
            total = ctx.divisor.divided(total.to(torch.promote_types(total.dtype, torch.float32)))
        return (None if total is None else total.to(ctx.dtype)), None, None, None, None


class Divide(torch.autograd.Function):
    """Identity whose gradient is divided: the sink of the plain path, for compilers and torch.func's transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(psi, divisor):
        return psi.view_as(psi)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (divisor,) = ctx.saved_tensors
        return grad / divisor, None
