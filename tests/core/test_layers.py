"""Conformance of every kind of layer: output, gradients, dtypes and copies, the fast path against the definition."""

import copy
import pickle

import pytest
import torch
from networks import Network, inputs
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.bank import Bank


def test_forward_and_gradients_follow_the_definition(network):
    x = inputs()
    y = network(x)
    biases = [layer.bias for layer in network.layers if layer.bias is not None]
    torch.testing.assert_close(y, network.by_definition(x, network.bank.psi))
    grad_x, *grad_bias = torch.autograd.grad(y.square().sum(), [x, *biases])
    expected = torch.autograd.grad(
        network.by_definition(x, network.bank.psi).square().sum(),
        [x, *biases],
    )
    torch.testing.assert_close([grad_x, *grad_bias], list(expected))
    network(x).square().sum().backward()
    expected = network.psi_gradient(lambda psi: network.by_definition(x.detach(), psi).square().sum())
    torch.testing.assert_close(network.bank.psi.grad, expected)


@pytest.mark.parametrize("grad_scaling", ["projection", "norm", "none"])
@pytest.mark.parametrize("mapping", ["fold", "hash"])
def test_every_gradient_scaling(grad_scaling, mapping):
    network = Network(grad_scaling=grad_scaling, mapping=mapping)
    x = inputs()
    network(x).square().sum().backward()
    expected = network.psi_gradient(lambda psi: network.by_definition(x.detach(), psi).square().sum())
    torch.testing.assert_close(network.bank.psi.grad, expected)


def test_long_pieces_are_divided_in_place():
    targets = [Target("a", 256, 512, 0.1), Target("b", 512, 256, 0.2)]
    bank = Bank(WeightMap(targets, ratio=0.6), dtype=torch.float64)
    gradient = torch.randn(bank.weight_map.m, dtype=torch.float64)
    divisor = bank.array.divisor
    expected = gradient / divisor.tensor(gradient.device, gradient.dtype)
    divisor.divide_(gradient)
    assert not divisor.kept_tensors(), "the piecewise branch was meant"
    torch.testing.assert_close(gradient, expected)


def test_frozen_psi_and_frozen_input(network):
    network.bank.psi.requires_grad_(False)
    x = inputs()
    network(x).sum().backward()
    assert x.grad is not None
    assert network.bank.psi.grad is None
    network.bank.psi.requires_grad_(True)
    network(x.detach()).sum().backward()
    assert network.bank.psi.grad is not None


def test_no_grad_and_inference_mode_then_training(network):
    with torch.inference_mode():
        y = network(inputs().detach())
    with torch.no_grad():
        network(inputs())
    assert y.isfinite().all()
    network(inputs()).sum().backward()
    assert network.bank.psi.grad.isfinite().all()


def test_double_backward():
    for options in ({}, {"ratio": 0.004, "bias": False}, {"kind": "conv1d"}, {"kind": "convolution"}):
        torch.manual_seed(0)
        network = Network(grad_scaling="none", **options)
        x = inputs()
        network.bank.array.passes.unwatch()  # gradcheck compares psi's own gradients, so psi must be an argument
        psi = network.bank.psi.detach().clone().requires_grad_()

        def with_psi(x, psi, network=network):
            return torch.func.functional_call(network, {f"bank.{network.bank.psi_name}": psi}, (x,))

        (gx,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gx.square().sum().backward()
        actual = network.bank.psi.grad
        (gx,) = torch.autograd.grad(network.by_definition(x, psi).square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(gx.square().sum(), psi)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    network = Network(dtype=torch.float32)
    x = inputs(torch.float32)
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    network.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = network(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert network.bank.psi.grad.dtype == torch.float32
    assert (network.bank.psi.grad - expected).norm() < 0.02 * expected.norm()


def test_pure_bfloat16():
    torch.manual_seed(0)
    network = Network(dtype=torch.float32)
    low = copy.deepcopy(network).bfloat16()
    x = inputs(torch.float32)
    low(x.bfloat16()).float().square().sum().backward()
    network(x).square().sum().backward()
    assert low.bank.psi.grad.dtype == torch.bfloat16
    difference = (low.bank.psi.grad.float() - network.bank.psi.grad).norm()
    assert difference < 0.05 * network.bank.psi.grad.norm()


def test_deepcopy_and_pickle(network):
    x = inputs()
    network(x).sum().backward()
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(layer.bank is twin.bank for layer in twin.layers)
        torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
        with torch.no_grad():
            twin.bank.psi.zero_()
        assert network.bank.psi.abs().sum() > 0
        twin.zero_grad()
        twin(x).sum().backward()
        assert twin.bank.psi.grad is not None


def test_replaced_parameter_object_is_used(network):
    """Loaders and FSDP replace the parameter; nothing may keep the old one."""
    network(inputs())
    network.bank.psi = nn.Parameter(torch.zeros_like(network.bank.psi))
    x = inputs()
    layer = network.layers[0]
    y = layer(x).movedim(1 if isinstance(layer, RPSConv) else -1, -1)
    torch.testing.assert_close(y, torch.zeros_like(y) if layer.bias is None else layer.bias.expand_as(y))


def test_dense_weight_and_to_dense(network):
    x = inputs()
    for layer in network.layers:
        dense = copy.deepcopy(layer).to_dense()
        assert type(dense) in (nn.Linear, Conv1D, nn.Conv1d)
        assert dense.weight.is_contiguous()
        assert dense.weight.shape == layer.weight.shape
        y = layer(x)
        torch.testing.assert_close(dense(x), y)
        x = torch.tanh(y)


def test_lazy_weight_reads_as_a_tensor(network):
    layer = network.layers[0]
    weight = layer.weight
    dense = layer.dense_weight()
    assert isinstance(weight, WeightStandIn)
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
    assert weight.ndim == weight.dim() == dense.ndim
    assert weight.size(0) == dense.size(0)
    torch.testing.assert_close(torch.cat([weight, weight]), torch.cat([dense, dense]))
    torch.testing.assert_close(weight.mT @ weight, dense.mT @ dense)
    torch.testing.assert_close(weight[1:3] * 2, dense[1:3] * 2)
    (weight * 1).sum().backward()
    assert network.bank.psi.grad.abs().sum() > 0


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="one process per GPU"):
        Network().layers[0]._replicate_for_data_parallel()
