"""One pass: what the layers of a model share from the beginning of a forward call to its end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_rps import internals
from hf_rps.mappings.input_fold import InputFold
from hf_rps.products.autograd import folded_input
from hf_rps.psi.sink import GradientBuffer


class Reading(NamedTuple):
    """psi (m,) as the layers of one pass read it, on one device and in one dtype.

    ``buffer`` receives its gradient; None where none is asked for.
    """

    psi: Tensor
    buffer: GradientBuffer | None


class _Entry(NamedTuple):
    """A reading, the parameter that was read, and its version then."""

    reading: Reading
    psi: nn.Parameter
    version: int | None

    def is_stale(self, psi: nn.Parameter) -> bool:
        """True where ``psi``, as it is now, is not what was read.

        A sharded parameter (FSDP2) is another object while it is gathered, and no less the same.
        """
        if psi is self.psi:
            return _version(psi) != self.version
        return type(psi) is nn.Parameter and type(self.psi) is nn.Parameter


def _version(psi: Tensor) -> int | None:
    """How often psi was written to; None for a tensor that does not count."""
    return None if psi.is_inference() else psi._version


class _Folded(NamedTuple):
    """An input, how and to what it was folded, and its version then."""

    x: weakref.ref
    version: int
    fold: InputFold
    dtype: torch.dtype
    folded: Tensor

    def is_of(self, x: Tensor, fold: InputFold, dtype: torch.dtype) -> bool:
        return (
            self.x() is x
            and self.version == x._version
            and self.fold is fold
            and self.dtype == dtype
            and self.folded.requires_grad == (x.requires_grad and torch.is_grad_enabled())
            and self.folded.is_inference() == torch.is_inference_mode_enabled()
        )


class _Traced(NamedTuple):
    """psi as all layers read it in a training pass that a compiler follows, and who opened the pass."""

    opener: nn.Module
    psi: nn.Parameter
    divided: Tensor


class Passes:
    """The pass that is open in each thread, and its readings.

    psi is cast to the compute dtype, and copied to each device that layers live on, once per pass. Layers called
    outside any pass get a reading of their own per call, which is as right and slower.

    Attributes:
        before: Called with the module that opens a pass, before it does.
        owner: A weak reference to the module that owns psi (:class:`hf_rps.psi.bank.ArrayOwner`).
    """

    def __init__(self):
        self._handles: list = []
        self.before: Callable[[nn.Module], None] | None = None
        self.owner: weakref.ref | None = None
        self._reset()

    def _reset(self) -> None:
        self._open_here = threading.local()  # the forward pass that is open in this thread
        self._ddp: weakref.ref | None = None  # the DistributedDataParallel that ran the last pass
        self._recomputation: tuple[int, dict] = (-1, {})  # readings made inside this backward pass

    def __getstate__(self):
        # a module that was watched may be gone: a head whose base model alone is still in use
        handles = [handle for handle in self._handles if internals.hooks_of(handle) is not None]
        return {"_handles": handles, "before": self.before}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.owner = None  # a copy's owner sets it
        self._reset()

    def watch(self, module: nn.Module) -> None:
        """Make every forward call of ``module`` a pass. Nested calls join the outer one."""
        self._handles.append(module.register_forward_pre_hook(self._open))
        self._handles.append(module.register_forward_hook(self._close, always_call=True))

    def unwatch(self) -> None:
        """Remove the hooks that :meth:`watch` added."""
        while self._handles:
            self._handles.pop().remove()

    def is_watching_outside(self, model: nn.Module) -> bool:
        """True where a module that is not in ``model`` opens passes, too: a model around it."""
        inside = {id(hooks) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)}
        found = (internals.hooks_of(handle) for handle in self._handles)
        return any(hooks is not None and id(hooks) not in inside for hooks in found)

    def _open(self, module, args) -> None:
        if torch.compiler.is_compiling():
            self._open_traced(module)
            return
        # an opener that is called anew was never closed (its pass may have ended inside compiled code)
        if getattr(self._open_here, "opener", None) in (None, module):
            if self.before is not None:
                self.before(module)
            self._open_here.opener, self._open_here.readings = module, {}
            ddp = internals.active_ddp()
            self._ddp = None if ddp is None else weakref.ref(ddp)

    def _close(self, module, args, output) -> None:
        traced = getattr(self._open_here, "traced", None)
        if traced is not None and traced.opener is module:
            self._open_here.traced = None
        if torch.compiler.is_compiling():
            return
        if getattr(self._open_here, "opener", None) is module:
            self._open_here.opener = self._open_here.readings = None

    def _open_traced(self, module: nn.Module) -> None:
        """Read psi for all layers of a pass that a compiler follows.

        Each by itself would have its part of the gradient, an array of psi's size, divided by itself. It is done here
        and not when the first layer asks, which may be inside a checkpoint, where compilers allow no such note.
        """
        traced = getattr(self._open_here, "traced", None)
        owner = None if self.owner is None else self.owner()
        if owner is None or not (traced is None or traced.opener is module):
            return
        psi = owner.psi
        if torch.is_grad_enabled() and psi.requires_grad:
            self._open_here.traced = _Traced(module, psi, owner.array.divided(psi))

    def traced(self, psi: Tensor, device: torch.device) -> Tensor | None:
        """What :meth:`_open_traced` has read, if it is what a layer on ``device`` needs now."""
        traced = getattr(self._open_here, "traced", None)
        if traced is None or not torch.is_grad_enabled():
            return None
        return traced.divided if traced.psi is psi and psi.device == device else None

    def reading(
        self, psi: nn.Parameter, device: torch.device, dtype: torch.dtype, make: Callable[..., Reading]
    ) -> Reading:
        """This pass's reading of ``psi`` for ``device`` and ``dtype``, by ``make(device, dtype)`` where there is none.

        A pass that Ctrl-C has cut short is never closed. It is found out by a change of psi since.
        """
        readings = self._kept()
        if readings is None:
            return make(device, dtype)
        key = (device, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        entry = readings.get(key)
        if entry is None or entry.is_stale(psi):
            entry = readings[key] = _Entry(make(device, dtype), psi, _version(psi))
        return entry.reading

    def folded(self, x: Tensor, fold: InputFold, dtype: torch.dtype) -> Tensor:
        """x (..., channels) cast to ``dtype`` and folded, once for those that ask for the same one after the other.

        What was folded last is kept, and until the pass ends. An inference tensor does not count how often it was
        written to, and is folded anew each time.
        """
        kept = None if x.is_inference() else self._kept()
        last = None if kept is None else kept.get(_Folded)
        if last is not None and last.is_of(x, fold, dtype):
            return last.folded
        folded = folded_input(x.to(dtype), fold)
        if kept is not None:
            kept[_Folded] = _Folded(weakref.ref(x), x._version, fold, dtype, folded)
        return folded

    def _kept(self) -> dict | None:
        """What is kept until the end of this pass, or of the backward pass that recomputes a part of it."""
        kept = getattr(self._open_here, "readings", None)
        return self._recomputed() if kept is None else kept

    def _recomputed(self) -> dict | None:
        """The readings of layers that run inside a backward pass (gradient checkpointing), dropped at its end."""
        task = internals.backward_id()
        if task == -1:
            return None
        if self._recomputation[0] != task:
            self._recomputation = (task, {})
            internals.after_backward(self._end_recomputation)
        return self._recomputation[1]

    def _end_recomputation(self) -> None:
        self._recomputation = (-1, {})

    def check_reentrant(self, psi: nn.Parameter) -> None:
        """Refuse those who take a part of psi's gradient for the whole, silently.

        Reentrant checkpointing runs a backward pass of its own for every checkpointed block, and each brings psi a part
        of its gradient. A hook on psi is called for each of them. DistributedDataParallel's reducer, if it was not told
        to wait (static_graph), sums the first part over the processes.
        """
        if internals.has_accumulation_hooks(psi):
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True brings the shared array its gradient in several parts, "
                "and a hook on it (register_post_accumulate_grad_hook, used by optimizers that step in the backward "
                "pass) would take each for the whole. Use use_reentrant=False (transformers: "
                "gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None and not ddp.static_graph and ddp.process_group.size() > 1:
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True under DistributedDataParallel would reduce only a part "
                "of the shared array's gradient. Use use_reentrant=False (transformers: gradient_checkpointing_kwargs="
                "{'use_reentrant': False}), or DistributedDataParallel(..., static_graph=True)"
            )
