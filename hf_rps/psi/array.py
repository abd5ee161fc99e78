"""The shared array psi in use: how layers read it and what becomes of its gradient, whoever owns the parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import Choice, choose
from hf_rps.psi.divisor import Divisor
from hf_rps.psi.memory import GradientMemory
from hf_rps.psi.passes import Passes, Reading
from hf_rps.psi.sink import Divide, GradientBuffer, GradientSink


class Source(Protocol):
    """Where a layer finds psi: the module that owns it, or a reference that looks it up there.

    ``psi`` is looked up on every use, because loaders and wrappers (transformers, PEFT, FSDP2, offloading) replace the
    parameter object.
    """

    array: SharedArray

    @property
    def psi(self) -> nn.Parameter: ...

    @property
    def in_use(self) -> Source:
        """Where the layers find the array that they read now: here, unless another one stands in for this one."""

    def read(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """:meth:`SharedArray.read` by a call of the module that owns psi, whose hooks (offloading, sharding) put psi in
        place."""


class SharedArray:
    """What belongs to one shared array beside its numbers. It holds no parameter and no reference to the owner.

    Args:
        weight_map: Which weight reads which slots of the array.
        grad_scaling: "projection", "norm" or "none"; see :class:`hf_rps.RPSConfig`.
        like: Another array of the same map, whose matrices this one is read by, too: what a learned map has stored is
            there once. None: it has matrices of its own.

    Attributes:
        matrices: By target, the matrices that read the array, each made once for all that use it.
        choose: Picks the product for an input; see :func:`hf_rps.products.base.choose`.
        started: Where psi started: "project", "rescale" or False, as ``init_weights`` of :class:`hf_rps.RPSConfig`;
            None where it was loaded.
        weight_dtypes: By target, the dtype of the dense weight, as far as layers know one.
    """

    def __init__(self, weight_map: WeightMap, grad_scaling: str, like: SharedArray | None = None):
        self.weight_map = weight_map
        if like is None:
            self.matrices = {target.name: weight_map.matrix(target.name) for target in weight_map.targets}
            self.divisor = Divisor(self.matrices.values(), weight_map.m, grad_scaling)
        else:
            self.matrices, self.divisor = like.matrices, like.divisor.of_scaling(grad_scaling)
        self.passes = Passes()
        self.memory = GradientMemory()
        self.choose: Choice = choose
        self.started: bool | str | None = None
        self.weight_dtypes: dict[str, torch.dtype] = {}

    @property
    def dtype(self) -> torch.dtype | None:
        """The narrowest dtype that holds all weights in theirs; None where no layer knows its weight's."""
        return functools.reduce(torch.promote_types, self.weight_dtypes.values()) if self.weight_dtypes else None

    def read(
        self, psi: nn.Parameter, device: torch.device, dtype: torch.dtype, call_owner: Callable[..., Reading]
    ) -> Reading:
        """psi as this pass reads it; where it has not yet, ``call_owner(device, dtype)`` leads to :meth:`enter`."""
        return self.passes.reading(psi, device, dtype, call_owner)

    def enter(self, psi: Tensor, device: torch.device, dtype: torch.dtype) -> Reading:
        """A new reading of psi (m,): copied and cast, and behind a gradient sink of its own if it is trained."""
        psi = psi if psi.device == device else psi.to(device)
        if not (torch.is_grad_enabled() and psi.requires_grad):
            self.memory.release()
            return Reading(psi.detach().to(dtype), None)
        buffer = GradientBuffer(self.memory)
        cast = None if psi.dtype == dtype else psi.detach().to(dtype)
        return Reading(GradientSink.apply(psi, cast, buffer, self.divisor, self.passes.check_reentrant), buffer)

    def plain(self, psi: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """psi (m,) on ``device`` in ``dtype`` for the plain path: ordinary operations that compilers can trace."""
        traced = self.passes.traced(psi, device) if torch.compiler.is_compiling() else None
        return (self.divided(psi.to(device)) if traced is None else traced).to(dtype)

    def divided(self, psi: Tensor) -> Tensor:
        """psi (m,), with the divisor before its gradient where it gets one, by operations that compilers can trace."""
        if self.divisor.scaling == "none" or not (torch.is_grad_enabled() and psi.requires_grad):
            return psi
        return Divide.apply(psi, self.divisor.tensor(psi.device, torch.promote_types(psi.dtype, torch.float32)))

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this object keeps beside psi."""
        return self.divisor.kept_tensors()
