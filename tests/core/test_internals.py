"""Canaries: each thing that the library takes of torch without a promise does what the library takes it for."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_rps import internals


def test_backward_id():
    seen = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            seen.append(internals.backward_id())
            if len(seen) == 1:
                with torch.enable_grad():
                    Node.apply(torch.ones(1, requires_grad=True)).backward()
            return gradient

    assert internals.backward_id() == -1
    Node.apply(torch.ones(1, requires_grad=True)).backward()
    Node.apply(torch.ones(1, requires_grad=True)).backward()
    assert -1 not in seen
    assert len(set(seen)) == 3, "a nested pass and a later one have ids of their own"
    assert internals.backward_id() == -1


def test_after_backward():
    events = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: internals.after_backward(lambda: events.append("end")))
    x.register_hook(lambda gradient: events.append("x"))
    y.backward()
    assert events == ["x", "end"]


def test_is_transformed():
    seen = []
    torch.func.grad(lambda x: seen.append(internals.is_transformed()) or x.sum())(torch.ones(2))
    torch.func.vmap(lambda x: seen.append(internals.is_transformed()) or x)(torch.ones(2))
    assert seen == [True, True]
    assert not internals.is_transformed()


def test_is_forward_mode():
    assert not internals.is_forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert internals.is_forward_mode()
    assert not internals.is_forward_mode()


def test_is_followed():
    seen = [internals.is_followed()]
    torch.func.vmap(lambda x: seen.append(internals.is_followed()) or x)(torch.ones(2))
    torch.compile(lambda x: seen.append(internals.is_followed()) or x + 1, backend="eager")(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(internals.is_followed())
    assert seen == [False, True, True, True]


def test_active_ddp():
    seen = []

    class Net(nn.Linear):
        def forward(self, x):
            seen.append(internals.active_ddp())
            return super().forward(x)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(Net(2, 2))
        ddp(torch.ones(1, 2))
    finally:
        dist.destroy_process_group()
    assert seen == [ddp]
    assert internals.active_ddp() is None
    assert ddp.static_graph is False
    assert threading.current_thread() is threading.main_thread()


def test_apply_function():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, unused):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 3 * gradient, None

    x = torch.ones(2, requires_grad=True)
    y = internals.apply_function(Double, x, None)
    assert y.tolist() == [2, 2]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [3, 3]
    with torch.no_grad():
        assert not internals.apply_function(Double, x, None).requires_grad


def test_divide_each():
    whole = torch.ones(5)
    internals.divide_each_(list(whole.split([2, 3])), [2.0, 4.0])
    assert whole.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]


def test_is_unshared():
    tensor = torch.ones(3)
    assert internals.is_unshared(tensor)
    alias = tensor.view(3)
    assert not internals.is_unshared(tensor)
    del alias
    assert internals.is_unshared(tensor)
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = tensor
    kept = tensor.detach()
    del tensor
    assert not internals.is_unshared(kept)
    parameter.grad = None
    assert internals.is_unshared(kept)


def test_reshaped():
    class Reshaped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return internals.reshaped(2 * x, (2, 3))

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient.view(6)

    x = torch.arange(6.0).requires_grad_()
    y = Reshaped.apply(x)
    y += 1  # which autograd refuses for views
    assert y.tolist() == [[1, 3, 5], [7, 9, 11]]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [2.0] * 6


@pytest.mark.gpu
def test_current_stream():
    assert internals.current_stream(0) == torch.cuda.current_stream(0).cuda_stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert internals.current_stream(0) == stream.cuda_stream


def test_empty_tensor_of():
    class Empty(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("it has no numbers")

    tensor = internals.empty_tensor_of(Empty, torch.Size((1 << 20, 1 << 20)), torch.bfloat16, torch.device("cpu"), True)
    assert tensor.shape == (1 << 20, 1 << 20)
    assert (tensor.dtype, tensor.device.type, tensor.requires_grad) == (torch.bfloat16, "cpu", True)


def test_without_subclasses():
    called = []

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    tensor = torch.ones(2).as_subclass(Loud)
    called.clear()
    with internals.without_subclasses():
        tensor + 1
    assert not called
    tensor + 1
    assert called


def test_has_accumulation_hooks():
    parameter = nn.Parameter(torch.ones(2))
    assert not internals.has_accumulation_hooks(parameter)
    handle = parameter.register_post_accumulate_grad_hook(lambda p: None)
    assert internals.has_accumulation_hooks(parameter)
    handle.remove()
    assert not internals.has_accumulation_hooks(parameter)


def test_is_hooked():
    for hook in (
        lambda m: m.register_forward_hook(lambda *a: None),
        lambda m: m.register_forward_pre_hook(lambda *a: None),
        lambda m: m.register_full_backward_hook(lambda *a: None),
        lambda m: setattr(m, "forward", m.forward),
    ):
        module = nn.Linear(2, 2)
        assert not internals.is_hooked(module)
        hook(module)
        assert internals.is_hooked(module)


def test_hooks_of():
    module = nn.Linear(2, 2)
    handles = [module.register_forward_hook(print, always_call=True), module.register_forward_pre_hook(print)]
    assert internals.hooks_of(handles[0]) is module._forward_hooks
    assert internals.hooks_of(handles[1]) is module._forward_pre_hooks
    del module
    assert [internals.hooks_of(handle) for handle in handles] == [None, None]


def test_wrap_method():
    """Methods and class methods, once however often it is asked for, under their own names."""

    class Library:
        def method(self, x):
            """What it does."""
            return x

        @classmethod
        def of_the_class(cls, x):
            return cls, x

    def adding_one(original):
        def wrapped(self, x):
            return original(self, x + 1)

        return wrapped

    for _ in range(2):
        internals.wrap_method(Library, "method", adding_one)
        internals.wrap_method(Library, "of_the_class", adding_one)
    assert Library().method(1) == 2
    assert Library.of_the_class(1) == (Library, 2)
    assert (Library.method.__name__, Library.method.__doc__) == ("method", "What it does.")
