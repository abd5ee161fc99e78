"""Passes: what several forwards and backwards, threads, checkpointing and exceptions do to the one gradient of psi."""

import copy
import threading

import pytest
import torch
from networks import Network, inputs
from torch import nn

from hf_rps.psi.bank import Bank


def is_open(network):
    return getattr(network.bank.array.passes._open_here, "readings", None) is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(network, reentrant):
    x = inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone(), x.grad.clone()
    network.zero_grad()
    x.grad = None
    network(x, checkpointing=reentrant).square().sum().backward()
    torch.testing.assert_close((network.bank.psi.grad, x.grad), expected)


def test_accumulation_two_forwards_one_backward_and_a_retained_graph(network):
    a, b = inputs(), inputs()
    expected = network.psi_gradient(
        lambda psi: sum(network.by_definition(x.detach(), psi).square().sum() for x in (a, b))
    )
    (network(a).square().sum() + network(b).square().sum()).backward()
    torch.testing.assert_close(network.bank.psi.grad, expected)
    network.zero_grad()
    network(a).square().sum().backward()
    loss = network(b).square().sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(network.bank.psi.grad, expected)
    network.zero_grad()
    loss.backward(retain_graph=True)
    once = network.bank.psi.grad.clone()
    loss.backward()
    torch.testing.assert_close(network.bank.psi.grad, 2 * once)


def test_layers_outside_a_pass(network):
    x = inputs()
    layer = network.layers[0]
    layer(x).sum().backward()
    layer(x).sum().backward()
    once = network.bank.psi.grad.clone()
    network.zero_grad()
    (layer(x) + layer(x)).sum().backward()
    torch.testing.assert_close(network.bank.psi.grad, once)


def test_an_exception_in_mid_backward_leaves_nothing_behind(network):
    x = inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    network.zero_grad()

    class Interrupted(Exception):
        pass

    def interrupt(gradient):
        if armed:
            raise Interrupted

    armed = True
    h = torch.tanh(network.layers[0](x))
    network.bank.array.passes._open(network, ())
    h = torch.tanh(network.layers[0](x))
    h.register_hook(interrupt)
    for layer in network.layers[1:]:
        h = torch.tanh(layer(h))
    network.bank.array.passes._close(network, (), None)
    loss = h.square().sum()
    with pytest.raises(Interrupted):
        loss.backward(retain_graph=True)
    assert network.bank.psi.grad is None
    armed = False
    loss.backward()  # the same graph again
    torch.testing.assert_close(network.bank.psi.grad, expected)
    network.zero_grad()
    network(x).square().sum().backward()
    torch.testing.assert_close(network.bank.psi.grad, expected)


def test_an_exception_in_forward_closes_the_pass(network):
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, dtype=torch.float64))
    assert not is_open(network)
    network(inputs()).sum().backward()


def test_held_gradients_are_not_overwritten():
    network = Network()
    network(inputs()).sum().backward()
    held = network.bank.psi.grad
    before = held.clone()
    network.zero_grad()
    network(inputs()).sum().backward()
    torch.testing.assert_close(held, before)
    address = held.data_ptr()
    del held
    second = network.bank.psi.grad.data_ptr()
    assert second != address
    network.zero_grad()
    network(inputs()).sum().backward()
    assert network.bank.psi.grad.data_ptr() == second, "memory that nobody holds is taken again"
    memory = network.bank.array.memory
    assert memory._last is not None
    with torch.no_grad():
        network(inputs())
    assert memory._last is None, "an evaluation gives it back"


def test_autocast_casts_psi_once_a_pass(monkeypatch):
    network = Network(dtype=torch.float32)
    calls = []
    forward = Bank.forward
    monkeypatch.setattr(Bank, "forward", lambda self, *a: calls.append(a) or forward(self, *a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(inputs(torch.float32)).float().sum().backward()
    assert len(calls) == 1
    calls.clear()
    network(inputs(torch.float32), checkpointing=False).sum().backward()
    assert len(calls) == 2  # the pass, and one for all recomputation


def test_concurrent_passes_in_threads(network):
    """Serving in no_grad beside training in another thread must not take each other's readings."""
    x = inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    stop, errors = threading.Event(), []

    def serve():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    assert not network(x).requires_grad
            except Exception as error:
                errors.append(error)

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(20):
            network.zero_grad()
            network(x).square().sum().backward()
            torch.testing.assert_close(network.bank.psi.grad, expected)
    finally:
        stop.set()
        server.join()
    assert not errors


def test_a_pass_that_was_never_closed_does_not_outlive_the_next_call(network):
    """Compiled code may end a pass without its closing hook; the next call must not find that pass's readings."""
    network.bank.array.passes._open(network, ())
    network.layers[0](inputs())
    with torch.no_grad():
        network.bank.psi.mul_(2)
    x = inputs()
    torch.testing.assert_close(network(x), network.by_definition(x, network.bank.psi))
    assert not is_open(network)


@pytest.mark.parametrize("grad", [True, False])
def test_a_pass_cut_short_by_ctrl_c_leaves_no_old_weights(network, grad):
    """Torch runs no hook at the end of a call that KeyboardInterrupt leaves, so the pass stays open."""

    def interrupt(module, args):
        raise KeyboardInterrupt

    x, layer = inputs(), network.layers[0]
    handle = network.layers[-1].register_forward_pre_hook(interrupt)
    with torch.set_grad_enabled(grad), pytest.raises(KeyboardInterrupt):
        network(x)
    handle.remove()
    with torch.no_grad():
        network.bank.psi.mul_(2)  # an optimizer's step
    fresh = copy.deepcopy(network).layers[0]
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), fresh(x))  # by itself: no call of the model opens a pass
    network.bank.psi = nn.Parameter(torch.zeros_like(network.bank.psi))  # a loader
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), copy.deepcopy(network).layers[0](x))


def test_a_change_of_psi_before_the_backward_pass_is_refused(network):
    loss = network(inputs()).square().sum()
    with torch.no_grad():
        network.bank.psi.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an in.?place operation"):
        loss.backward()
    network(inputs()).sum().backward()


def test_saved_tensor_hooks_see_no_copy_of_psi_per_layer(network):
    """What activation offloading would copy: inputs and biases, not the array."""
    saved = []
    x = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = network(x).square().sum()
    array = network.bank.psi.untyped_storage().data_ptr()
    assert saved
    assert all(tensor.untyped_storage().data_ptr() != array for tensor in saved)
    loss.backward()
    expected = network.psi_gradient(lambda psi: network.by_definition(x.detach(), psi).square().sum())
    torch.testing.assert_close(network.bank.psi.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_optimizers_that_step_in_the_backward_pass(network, reentrant):
    """One step per backward pass, or a refusal: the array's gradient must not come in parts."""
    steps, x = [], inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    network.zero_grad()
    network.bank.psi.register_post_accumulate_grad_hook(lambda p: steps.append(p.grad.clone()))
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            network(x, checkpointing=True).square().sum().backward()
    else:
        network(x, checkpointing=False).square().sum().backward()
        (step,) = steps
        torch.testing.assert_close(step, expected)
