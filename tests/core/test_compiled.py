"""torch.compile, torch.export and functorch are given every kind of layer by plain operations."""

import copy

import pytest
import torch
from networks import Network, inputs
from ways import read

from hf_rps.psi.divisor import Divisor


@pytest.mark.parametrize("scaling", ["none", "norm", "projection"])
def test_functorch_takes_the_plain_path(network, scaling):
    network.bank.array.divisor.scaling = scaling
    parameters = dict(network.named_parameters())
    x = inputs().detach()

    def loss(parameters, x):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    network(x).square().sum().backward()
    torch.testing.assert_close(gradients[f"bank.{network.bank.psi_name}"], network.bank.psi.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each[f"bank.{network.bank.psi_name}"].sum(0), network.bank.psi.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph(backend):
    for options in ({"ratio": 0.05}, {"mapping": "hash", "sign": "element"}, {"kind": "convolution"}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = Network(dtype=torch.float32, **options)
        x = inputs(torch.float32)
        network(x).square().sum().backward()
        expected = network.bank.psi.grad.clone()
        network.zero_grad()
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        compiled(x).square().sum().backward()
        torch.testing.assert_close(network.bank.psi.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_inference(made, bias):
    """Without gradients a compiler is given the products on views: no weight is made."""
    torch._dynamo.reset()
    network = read(Network(dtype=torch.float32, bias=bias, ratio=0.2), "made" if made else "views")
    x, graphs = inputs(torch.float32).detach(), []

    def backend(graph, examples):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(torch.compile(network, backend=backend, fullgraph=True)(x), expected)
    assert ("linear" in graphs[0]) == made


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_export(kind):
    network = Network(kind, dtype=torch.float32).eval()
    x = inputs(torch.float32).detach()
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x))
    assert [name for name in program.state_dict if "psi" in name] == [f"bank.{network.bank.psi_name}"]


def test_compiled_training_divides_once(monkeypatch):
    """Not once for each layer, with gradient checkpointing or without; also in a copy, and after a pass cut short."""
    made = []
    tensor = Divisor.tensor
    monkeypatch.setattr(Divisor, "tensor", lambda self, *args: made.append(args) or tensor(self, *args))
    for copied in (False, True):
        for checkpointing in (None, False):
            network, x = Network(dtype=torch.float32, ratio=0.2), inputs(torch.float32)
            network = copy.deepcopy(network) if copied else network
            network(x).square().sum().backward()
            expected = network.bank.psi.grad.clone()
            torch._dynamo.reset()
            compiled = torch.compile(lambda x, n=network, c=checkpointing: n(x, c), backend="eager", fullgraph=True)
            compiled(x)  # and no backward pass
            for _ in range(2):
                made.clear()
                network.zero_grad()
                compiled(x).square().sum().backward()
                torch.testing.assert_close(network.bank.psi.grad, expected, rtol=1e-4, atol=1e-5)
                assert len(made) <= 1


def test_compiled_layers_of_one_pass_and_none():
    """Layers that are compiled by themselves, in passes that compilers do not see, and without gradients."""
    torch._dynamo.reset()
    network, x = Network(dtype=torch.float32, ratio=0.2), inputs(torch.float32)
    network(x).square().sum().backward()
    expected, expected_output = network.bank.psi.grad.clone(), network(x)
    network.zero_grad()
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected_output)
    for layer in network.layers:
        layer.compile(backend="aot_eager")
    network(x).square().sum().backward()
    torch.testing.assert_close(network.bank.psi.grad, expected, rtol=1e-4, atol=1e-5)
    network.bank.psi.data.mul_(2)
    expected_output = copy.deepcopy(network)(x)
    torch.testing.assert_close(compiled(x), expected_output)


def test_a_compiled_pass_cut_short_leaves_nothing():
    torch._dynamo.reset()
    network, x = Network(dtype=torch.float32, ratio=0.2), inputs(torch.float32)
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    compiled = torch.compile(network, backend="aot_eager")
    fails = network.layers[2].register_forward_pre_hook(torch.compiler.disable(lambda *args: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        compiled(x)
    fails.remove()
    for _ in range(2):
        network.zero_grad()
        compiled(x).square().sum().backward()
        torch.testing.assert_close(network.bank.psi.grad, expected, rtol=1e-4, atol=1e-5)
