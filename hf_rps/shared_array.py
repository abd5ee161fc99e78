"""The shared array psi in use: the gate through which every use of it passes, and what its gradient is divided by.

One *gate*, an autograd node, stands between psi and all its uses in one forward pass. Backward passes of layers add
into the gate's gradient buffer, and the gate hands the sum, divided slot by slot as ``grad_scaling`` says, to psi
once. So whatever hooks on psi (DDP, FSDP, gradient accumulation, clipping, GradScaler) sees one ordinary gradient.
The gate also casts psi once a pass to the compute dtype and copies it once to each device that layers live on. For a
small model of many runs it makes all weights at once instead (:attr:`hf_rps.mapping.WeightMap.unfolds`), and the layers
are as ordinary as dense ones.
"""

from __future__ import annotations

import threading
import weakref
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_rps.functional import GradientBuffer
from hf_rps.kernels import fold_back, unfold
from hf_rps.mapping import WeightMap

Gated: TypeAlias = tuple[Tensor | tuple[Tensor, ...], GradientBuffer | None]

_SHORT_PIECE = 4096  # mean piece of Gamma (slots) below which one array of divisors is cheaper than a pass a piece


def signed_scale(weight_map: WeightMap, name: str, dtype: torch.dtype) -> Tensor:
    """Scale times sign of one target: (out_features, 1) or, with a sign an element, (out_features, in_features)."""
    return torch.from_numpy(weight_map.signs(name)).to(dtype) * weight_map.scale(name)


def _storage_uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


class _Gate(torch.autograd.Function):
    """Identity (or a cast made beforehand) from psi to its uses; backward returns buffer and gradient, divided."""

    @staticmethod
    def forward(ctx, psi, cast, buffer, bank):
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.bank, ctx.dtype = buffer, bank, psi.dtype
        ctx.recomputed = torch._C._current_graph_task_id() != -1
        source = psi if cast is None else cast
        return source.view_as(source)

    @staticmethod
    def backward(ctx, grad):
        if ctx.recomputed:
            ctx.bank.check_reentrant()
        total = ctx.buffer.take()
        if total is not None and not torch.is_grad_enabled():
            if grad is not None:
                total.add_(grad)
            ctx.bank.divide_(total)
            ctx.bank.recycle(total)
        elif grad is not None:  # from the plain path; the tensor is not ours to write to
            total = grad if total is None else grad + total
            total = ctx.bank.divided(total.to(torch.promote_types(total.dtype, torch.float32)))
        return (None if total is None else total.to(ctx.dtype)), None, None, None


class _UnfoldingGate(torch.autograd.Function):
    """From psi (m,) to all weights, scaled and signed, in the flat index range (n,); backward sums and divides.

    Saves no tensor: under checkpointing a gate is made in one block and made again in another.
    """

    @staticmethod
    def forward(ctx, psi, dtype, bank):
        ctx.set_materialize_grads(False)
        ctx.bank, ctx.dtype = bank, psi.dtype
        ctx.recomputed = torch._C._current_graph_task_id() != -1
        return bank.unfolded(psi, dtype)

    @staticmethod
    def backward(ctx, grad):
        if ctx.recomputed:
            ctx.bank.check_reentrant()
        if grad is None:
            return None, None, None
        total = fold_back(grad * ctx.bank.flat_factor(grad.device, grad.dtype), ctx.bank.weight_map.folds)
        if torch.is_grad_enabled():
            total = ctx.bank.divided(total)
        else:
            ctx.bank.divide_(total)
        return total.to(ctx.dtype), None, None


class _Divide(torch.autograd.Function):
    """Identity whose gradient is divided: the gate of the plain path, which has no buffer and can be traced."""

    @staticmethod
    def forward(ctx, psi, divisor):
        ctx.save_for_backward(divisor)
        return psi.view_as(psi)

    @staticmethod
    def backward(ctx, grad):
        (divisor,) = ctx.saved_tensors
        return grad / divisor, None


class SharedArray:
    """One shared array in use, whoever owns its parameter: a base class whose subclasses say where ``psi`` is.

    Args:
        weight_map: Which weight reads which slot of the array.
        grad_scaling: "projection", "norm" or "none"; see :class:`hf_rps.RPSConfig`.

    ``psi`` is looked up on every use, because loaders and wrappers (transformers, PEFT, FSDP2, offloading) replace the
    parameter object.
    """

    psi: nn.Parameter

    def __init__(self, weight_map: WeightMap, grad_scaling: str):
        self.weight_map = weight_map
        self.grad_scaling = grad_scaling
        # Gamma in pieces or, for the mappings where it has none, slot by slot; made here, for compilers can't trace it
        self._pieces = weight_map.squared_scales if weight_map.mapping == "fold" else ()
        self._gamma = None if self._pieces else torch.from_numpy(weight_map.squared_scale_array())
        self._reset()

    def _reset(self) -> None:
        self._passes = threading.local()  # the forward pass that is open in this thread
        self._ddp: weakref.ref | None = None  # the DistributedDataParallel that ran the last pass
        self._recomputation: tuple[int, dict] = (-1, {})  # gates made inside the backward pass of this graph task
        self._divisors: dict = {}
        self._factors: dict = {}  # scale times sign of all weights, by device and dtype; of maps that unfold
        self._spare: Tensor | None = None  # an alias of the last gradient, whose memory the next one may take

    def __getstate__(self):
        state = self.__dict__.copy()
        for name in ("_passes", "_ddp", "_recomputation", "_divisors", "_factors", "_spare"):
            del state[name]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    # ---- one gate per forward pass

    def watch(self, module: nn.Module) -> None:
        """Make every forward call of ``module`` a pass: its layers share one gate. Nested calls join the outer one.

        Layers called outside any pass are right too; each call then makes a gate of its own.
        """
        self._handles = getattr(self, "_handles", [])
        self._handles.append(module.register_forward_pre_hook(self._open))
        self._handles.append(module.register_forward_hook(self._close, always_call=True))

    def unwatch(self) -> None:
        """Remove the hooks that :meth:`watch` added."""
        for handle in self.__dict__.pop("_handles", []):
            handle.remove()

    def _open(self, module, args) -> None:
        if torch.compiler.is_compiling():
            return
        # an opener that is called anew was never closed (its pass may have ended inside compiled code)
        if getattr(self._passes, "opener", None) in (None, module):
            self._passes.opener, self._passes.gates = module, {}
            ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
            self._ddp = None if ddp is None else weakref.ref(ddp)
            if not torch.is_grad_enabled():
                self._spare = None  # evaluation: training may be over, or wants its memory elsewhere

    def _close(self, module, args, output) -> None:
        if torch.compiler.is_compiling():
            return
        if getattr(self._passes, "opener", None) is module:
            self._passes.opener = self._passes.gates = None

    def gated(self, device: torch.device, dtype: torch.dtype) -> Gated:
        """psi (m,) on ``device`` in ``dtype`` behind this pass's gate, and the gate's buffer (None: no gradient).

        Where the map unfolds: all weights, one (out_features, in_features) each of ``weight_map.flat_targets``, and
        None.
        """
        gates = getattr(self._passes, "gates", None)
        if gates is None:
            gates = self._recomputed_gates()
        if gates is None:
            return self._call_gate(device, dtype)
        key = (device, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        entry = gates.get(key)
        if entry is None:
            entry = gates[key] = self._call_gate(device, dtype)
        return entry

    def _recomputed_gates(self) -> dict | None:
        """The gates of layers that run inside a backward pass (gradient checkpointing), dropped at its end."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        if self._recomputation[0] != task:
            self._recomputation = (task, {})
            torch.autograd.Variable._execution_engine.queue_callback(self._end_recomputation)
        return self._recomputation[1]

    def _end_recomputation(self) -> None:
        self._recomputation = (-1, {})

    def _call_gate(self, device: torch.device, dtype: torch.dtype) -> Gated:
        """:meth:`make_gate` by way of the module that owns psi, whose hooks (offloading, sharding) put it in place."""
        return self.make_gate(device, dtype)

    def make_gate(self, device: torch.device, dtype: torch.dtype) -> Gated:
        """Make a gate; see :meth:`gated`, which is to be used."""
        psi = self.psi if self.psi.device == device else self.psi.to(device)
        trains = torch.is_grad_enabled() and psi.requires_grad
        if self.weight_map.unfolds:
            flat = _UnfoldingGate.apply(psi, dtype, self) if trains else self.unfolded(psi.detach(), dtype)
            targets = self.weight_map.flat_targets
            parts = zip(flat.split([target.numel for target in targets]), targets, strict=True)
            return tuple(part.view(target.out_features, target.in_features) for part, target in parts), None
        if not trains:
            return psi.detach().to(dtype), None
        buffer = GradientBuffer(self._new_buffer)
        cast = None if psi.dtype == dtype else psi.detach().to(dtype)
        return _Gate.apply(psi, cast, buffer, self), buffer

    def unfolded(self, psi: Tensor, dtype: torch.dtype) -> Tensor:
        """All weights in the flat index range (n,), in ``dtype``, from psi (m,)."""
        flat = unfold(psi.to(dtype), self.weight_map.folds)
        return (flat * self.flat_factor(flat.device, dtype)).to(dtype)

    def flat_factor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Scale times sign of all weights (n,), of float32, or float64 where ``dtype`` is."""
        dtype = torch.promote_types(dtype, torch.float32)
        if (device, dtype) not in self._factors:
            weight_map = self.weight_map
            with torch.inference_mode(False):  # an inference tensor would break training later
                factors = [
                    signed_scale(weight_map, target.name, dtype).expand(-1, target.in_features).flatten()
                    for target in weight_map.flat_targets
                ]
                self._factors[device, dtype] = torch.cat(factors).to(device)
        return self._factors[device, dtype]

    def plain(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """psi (m,) on ``device`` in ``dtype`` for the plain path: ordinary operations that compilers can trace."""
        psi = self.psi.to(device)
        if self.grad_scaling != "none" and torch.is_grad_enabled() and psi.requires_grad:
            psi = _Divide.apply(psi, self.divisor(device, torch.promote_types(psi.dtype, torch.float32)))
        return psi.to(dtype)

    def check_reentrant(self) -> None:
        """Refuse what DistributedDataParallel gets wrong, silently: psi's gradient in several parts.

        Reentrant checkpointing runs a backward pass of its own for every checkpointed block, and each brings psi a part
        of its gradient. A reducer that was not told to wait (static_graph) sums the first part over the processes.
        """
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None and not ddp.static_graph and ddp.process_group.size() > 1:
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True under DistributedDataParallel would reduce only a part "
                "of the shared array's gradient. Use use_reentrant=False (transformers: gradient_checkpointing_kwargs="
                "{'use_reentrant': False}), or DistributedDataParallel(..., static_graph=True)"
            )

    # ---- memory of the gradient

    def _new_buffer(self, psi: Tensor) -> Tensor:
        """Zeros (m,) of float32 (float64 for a float64 psi), in the memory of the last gradient if nobody holds that.

        ``zero_grad`` drops the gradient every step, and the C library hands a block of this size back to the system:
        taking a fresh one costs a page fault every 4 KiB. CUDA's caching allocator has no such cost.
        """
        dtype = torch.promote_types(psi.dtype, torch.float32)
        spare, self._spare = self._spare, None
        fits = spare is not None and (spare.device, spare.dtype, spare.shape) == (psi.device, dtype, psi.shape)
        if fits and _storage_uses(spare) == _storage_uses(torch.empty(0)):
            return spare.zero_()
        return torch.zeros_like(psi, dtype=dtype)

    def recycle(self, gradient: Tensor) -> None:
        """Remember the memory of ``gradient``; it is taken only once nothing else refers to it."""
        if gradient.device.type == "cpu" and hasattr(torch._C, "_storage_Use_Count"):
            self._spare = gradient.detach()

    # ---- the gradient's divisor

    def _divisor_pieces(self) -> list[tuple[int, float]]:
        """(length, divisor) pieces over the m slots."""
        exponent = {"projection": 1.0, "norm": 0.5}[self.grad_scaling]
        return [(length, value**exponent) for length, value in self._pieces]

    def divisor(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What psi's gradient is divided by, (m,): Gamma, its square root, or None for 1."""
        if self.grad_scaling == "none":
            return None
        if self._pieces:
            lengths, values = zip(*self._divisor_pieces(), strict=True)
            values = torch.tensor(values, dtype=dtype, device=device)
            return values.repeat_interleave(torch.tensor(lengths, device=device), output_size=self.weight_map.m)
        gamma = self._gamma if self.grad_scaling == "projection" else self._gamma.sqrt()
        return gamma.masked_fill(gamma == 0, 1.0).to(device, dtype)  # a slot that no weight reads has no gradient

    def divided(self, gradient: Tensor) -> Tensor:
        """``gradient`` (m,) over the divisor, differentiable."""
        divisor = self.divisor(gradient.device, gradient.dtype)
        return gradient if divisor is None else gradient / divisor

    @torch.no_grad()
    def divide_(self, gradient: Tensor) -> None:
        """Divide ``gradient`` (m,) by the divisor, in place; where Gamma has long pieces, without an array for it."""
        if self.grad_scaling == "none":
            return
        key = (gradient.device, gradient.dtype, self.grad_scaling)
        if key not in self._divisors:
            pieces = self._divisor_pieces()
            if len(pieces) * _SHORT_PIECE <= self.weight_map.m and pieces:
                lengths, values = zip(*pieces, strict=True)
                self._divisors[key] = (list(lengths), list(values))
            else:
                self._divisors[key] = self.divisor(gradient.device, gradient.dtype)
        divisor = self._divisors[key]
        if isinstance(divisor, Tensor):
            gradient.div_(divisor)
        else:
            torch._foreach_div_(list(gradient.split(divisor[0])), divisor[1])
