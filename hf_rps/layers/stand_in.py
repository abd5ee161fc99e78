"""What stands for ``layer.weight`` where a model reads the weight of a layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_rps import internals

_REMEDY = (
    "this weight is made from a shared array and is not stored, so the change would be lost. Change the array (its "
    "bank's psi), or call hf_rps.to_dense(model) first"
)
FREEZE_REMEDY = (
    "Some compressed layers can't be frozen while others are trained. Leave the frozen ones out of the compression "
    "(RPSConfig(exclude_modules=[...]), after hf_rps.to_dense(model) if it is done: they stay dense and frozen), "
    "compress the trained part by itself (get_rps_model(model.part, ...)), or freeze all (model.requires_grad_(False))"
)


class WeightStandIn(Tensor):
    """A tensor that is made when its numbers are used. Shape, dtype and device cost nothing.

    Any operation on it makes the weight, differentiably, so that a model which reads ``layer.weight`` is right, and as
    fast as its own use of dense weights allows. Views of it are stand-ins again. What would write to it, or watch it,
    raises.
    """

    _is_hf_initialized = True  # transformers' initialisers would make it and throw away what they drew
    _make: Callable[[], Tensor]

    @staticmethod
    def of(
        make: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A stand-in for ``make()`` of ``shape`` and ``dtype``, with device and requires_grad of ``like``.

        Without a ``dtype`` it is that of ``like``, too. As a parameter's, its numbers lie one after the other, however
        ``make`` leaves them (Conv1D's are a transposed matrix): models flatten weights by ``view``.

        Under a compiler it is the weight itself, which the compiler drops where only its shape or dtype is read.
        """
        if torch.compiler.is_compiling():
            return make().contiguous()
        make_flat = lambda: make().contiguous()  # noqa: E731
        return _stand_in(make_flat, torch.Size(shape), dtype or like.dtype, like.device, like.requires_grad)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            with internals.without_subclasses():
                return function(*args, **kwargs)
        _refuse_writes(function, args, kwargs)
        if function in _VIEWS and isinstance(args[0], cls) and _is_basic(args[1:]):
            return _view(function, args, kwargs)
        return _with_weights(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None) -> Any:
        """What reaches torch below autograd, such as the inside of a custom autograd function."""
        return _with_weights(function, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"WeightStandIn(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo) -> Tensor:
        return self._make().detach().clone().requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        return self._make().detach().__reduce_ex__(protocol)


def _stand_in(make: Callable[[], Tensor], shape, dtype, device, requires_grad: bool) -> WeightStandIn:
    stand_in = internals.empty_tensor_of(WeightStandIn, shape, dtype, device, requires_grad)
    stand_in._make = make
    if requires_grad:
        with internals.without_subclasses():
            stand_in.register_hook(_refuse_gradient)
    return stand_in


def _with_weights(function, args: tuple, kwargs: dict) -> Any:
    """The function of the weights themselves."""
    args, kwargs = tree_map_only(WeightStandIn, lambda weight: weight._make(), (args, kwargs))
    return function(*args, **kwargs)


def _view(function, args: tuple, kwargs: dict) -> WeightStandIn:
    """A stand-in for a view of a stand-in: to write to the one is to write to the other."""
    source, *rest = args
    shape = function(torch.empty(source.shape, device="meta"), *rest, **kwargs).shape
    requires_grad = source.requires_grad and torch.is_grad_enabled() and function not in _DETACHED
    make = lambda: function(source._make(), *rest, **kwargs)  # noqa: E731
    return _stand_in(make, shape, source.dtype, source.device, requires_grad)


def _is_basic(arguments: tuple) -> bool:
    """False for indexing by tensors and lists, which copies."""
    flat = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else arguments
    return all(argument is None or argument is ... or isinstance(argument, (int, slice)) for argument in flat)


def _refuse_gradient(gradient: Tensor) -> None:
    """Raise where a gradient arrives at a stand-in, which would lose it: a custom autograd function was given it."""
    raise RuntimeError(
        "a custom autograd function was given the weight of a compressed layer, and its gradient would be lost. Give "
        "it layer.dense_weight() instead"
    )


def _refuse_writes(function, args: tuple, kwargs: dict) -> None:
    """Raise where ``function`` would write to a stand-in, or watch it: it is made anew on every use."""
    name = getattr(function, "__name__", "")
    if function in _FREEZES:
        raise RuntimeError(f"{_WRITES[function]} the weight of a compressed layer: {_REMEDY}. {FREEZE_REMEDY}")
    if function in _WRITES:
        raise RuntimeError(f"{_WRITES[function]} the weight of a compressed layer: {_REMEDY}")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    out = kwargs.get("out")
    written = [
        *((args[:1] or kwargs.values()) if in_place else ()),
        *(out if isinstance(out, (tuple, list)) else (out,)),
    ]
    if any(isinstance(tensor, WeightStandIn) for tensor in written):
        raise RuntimeError(f"called {name} on the weight of a compressed layer: {_REMEDY}")


_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "grad", "grad_fn",
                 "itemsize", "nbytes", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "_version")
) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.get_device, Tensor.__len__, Tensor.ndimension, Tensor.__hash__,
}  # fmt: skip
_DETACHED = frozenset({Tensor.data.__get__, Tensor.detach, torch.detach})
_VIEWS = _DETACHED | {
    Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute,
    torch.permute, Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.squeeze,
    torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.narrow, torch.narrow, Tensor.select, torch.select,
    Tensor.__getitem__,
}  # fmt: skip
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
_FREEZES = frozenset({Tensor.requires_grad.__set__, Tensor.requires_grad_})
_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift",
                                "rshift", "matmul")
)  # fmt: skip
