"""What stands for ``layer.weight`` where a model reads the weight of a layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_rps import internals

_REMEDY = (
    "this weight is made from a shared array and is not stored, so a change of it would be lost. Change the array "
    "(its bank's psi), or call hf_rps.to_dense(model) first"
)
_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "grad", "grad_fn",
                 "itemsize", "nbytes", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "_version")
) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.stride, Tensor.get_device, Tensor.__len__, Tensor.ndimension, Tensor.__hash__,
}  # fmt: skip


class WeightStandIn(Tensor):
    """A tensor that is made when its numbers are used. Shape, dtype and device cost nothing.

    Any operation on it makes the weight, differentiably, so that a model which reads ``layer.weight`` is right, and as
    fast as its own use of dense weights allows. What would write to it, or watch it, raises.
    """

    _is_hf_initialized = True  # transformers' initialisers would make it and throw away what they drew

    @staticmethod
    def of(make: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A stand-in for ``make()`` of ``shape``, with dtype, device and requires_grad of ``like``.

        Under a compiler it is the weight itself, which the compiler drops where only its shape or dtype is read.
        """
        if torch.compiler.is_compiling():
            return make()
        stand_in = internals.empty_tensor_of(WeightStandIn, torch.Size(shape), like)
        stand_in._make = make
        if stand_in.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                stand_in.register_hook(_refuse_gradient)
        return stand_in

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        _refuse_writes(function, args, kwargs)
        return cls._with_weights(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None) -> Any:
        """What reaches torch below autograd, such as the inside of a custom autograd function."""
        return cls._with_weights(function, args, kwargs or {})

    @classmethod
    def _with_weights(cls, function, args: tuple, kwargs: dict) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight._make(), (args, kwargs))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"WeightStandIn(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo) -> Tensor:
        return self._make().detach().clone().requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        return self._make().detach().__reduce_ex__(protocol)


def _refuse_gradient(gradient: Tensor) -> None:
    """Raise where a gradient arrives at a stand-in, which would lose it: a custom autograd function was given it."""
    raise RuntimeError(
        "a custom autograd function was given the weight of a compressed layer, and its gradient would be lost. Give "
        "it layer.dense_weight() instead"
    )


_WRITES = {
    Tensor.data.__set__: "assigned to .data of",
    Tensor.grad.__set__: "assigned to .grad of",
    Tensor.requires_grad.__set__: "assigned to .requires_grad of",
    Tensor.requires_grad_: "called requires_grad_ on",
    Tensor.register_hook: "registered a hook on",
    Tensor.register_post_accumulate_grad_hook: "registered a hook on",
    Tensor.retain_grad: "called retain_grad on",
    Tensor.__setitem__: "assigned to items of",
    Tensor.set_: "called set_ on",
}


def _refuse_writes(function, args: tuple, kwargs: dict) -> None:
    """Raise where ``function`` would write to a stand-in, or watch it: it is made anew on every use."""
    name = getattr(function, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name in _IN_PLACE)
    written = args[0] if args else None
    out = kwargs.get("out")
    if function in _WRITES:
        raise RuntimeError(f"{_WRITES[function]} the weight of a compressed layer: {_REMEDY}")
    outs = out if isinstance(out, (tuple, list)) else (out,)
    if (in_place and isinstance(written, WeightStandIn)) or any(isinstance(o, WeightStandIn) for o in outs):
        raise RuntimeError(f"called {name} on the weight of a compressed layer: {_REMEDY}")


_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift",
                                "rshift", "matmul")
)  # fmt: skip
