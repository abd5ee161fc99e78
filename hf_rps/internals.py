"""What the library takes of torch that torch does not promise: one place, with a canary test for each."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def backward_id() -> int:
    """Id of the backward pass that runs in this thread, or -1: no two that run at one time have the same."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` at the end of the backward pass that runs in this thread."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def is_transformed() -> bool:
    """True inside torch.func's transforms, which take no autograd node of the old style."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """True inside torch.autograd.forward_ad's levels, where tensors may have tangents, which only torch carries on."""
    return torch.autograd.forward_ad._current_level >= 0


def is_followed() -> bool:
    """True where a compiler, torch.func or forward-mode differentiation follows each of torch's operations.

    A kernel of our own, which is given addresses, is none of them.
    """
    return torch.compiler.is_compiling() or is_transformed() or is_forward_mode()


def apply_function(function: type[torch.autograd.Function], *args):
    """``function.apply(*args)`` outside torch.func's transforms, without its search for what they left in ``args``."""
    return super(torch.autograd.Function, function).apply(*args)


def reshaped(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A new, contiguous tensor that nobody else refers to, in another shape and not marked as a view."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def divide_each_(tensors: list[torch.Tensor], numbers: list[float]) -> None:
    """Divide each tensor by its number, in place, in one call."""
    torch._foreach_div_(tensors, numbers)


def is_unshared(tensor: torch.Tensor) -> bool:
    """True where no other tensor has the memory of ``tensor``."""
    return _storage_uses(tensor) == _storage_uses(torch.empty(0))


def _storage_uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward call runs in this thread."""
    return DistributedDataParallel._get_active_ddp_module()


def current_stream(device: int) -> int:
    """Handle of the current CUDA stream of ``device``, without the object around it."""
    return torch._C._cuda_getCurrentRawStream(device)


def empty_tensor_of(
    cls: type[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> torch.Tensor:
    """A tensor of class ``cls`` without memory."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)


def without_subclasses():
    """A context in which tensor subclasses are plain tensors to torch's functions."""
    return torch._C.DisableTorchFunctionSubclass()


def has_accumulation_hooks(parameter: torch.Tensor) -> bool:
    """True where a hook runs each time that a part of the parameter's gradient has been added."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_hooked(module: nn.Module) -> bool:
    """True where calling ``module`` does more than its class's forward: hooks, or a forward put on the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__  # as accelerate's hooks put there


def hooks_of(handle: torch.utils.hooks.RemovableHandle) -> dict | None:
    """The hooks of which ``handle`` would remove one; None where their module is gone, and it can't be copied."""
    return handle.hooks_dict_ref()


def wrap_method(cls: type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Put ``wrapper(original)`` in the place of a method or class method of ``cls``, once per process.

    For libraries that have no hook where one is needed.
    """
    found = cls.__dict__[name]
    original = found.__func__ if isinstance(found, classmethod) else found
    if getattr(original, "wrapped_by_hf_rps", False):
        return
    wrapped = functools.wraps(original)(wrapper(original))
    wrapped.wrapped_by_hf_rps = True
    setattr(cls, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)
