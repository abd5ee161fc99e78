"""Passes: what several forwards and backwards, threads, checkpointing and exceptions do to the one gradient of psi."""

import threading

import pytest
import torch
from networks import Network, inputs

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
