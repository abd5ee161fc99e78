"""Layers whose product is Triton's, in all that autograd, copies and pickles do."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from triton_cases import (
    DEVICE,
    array,
    distance,
    layer_of,
    of_the_definition,
    triton_runs,
)

from hf_rps.products.triton import launch
from hf_rps.products.triton.matrix import usable
from hf_rps.products.triton.product import TritonProduct

pytestmark = pytest.mark.usefixtures("fresh")


@triton_runs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (17,), (2, 3, 20)], ids=str)
def test_a_layer_and_its_gradients(weight_map, shape, bias):
    layer = layer_of(weight_map, bias)
    x = torch.randn(*shape, layer.in_features, device=DEVICE, requires_grad=True)
    y = layer(x)
    (y.square().sum() / 2).backward()
    expected = of_the_definition(layer, x, weight_map)
    found = [y, x.grad, layer.bank.psi.grad] + ([layer.bias.grad] if bias else [])
    assert not launch._failures
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < 1e-4
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@triton_runs
def test_a_layer_in_half_precision(weight_map):
    layer = layer_of(weight_map, dtype=torch.bfloat16)
    for tokens in (1, 5, 24):
        x = torch.randn(tokens, layer.in_features, device=DEVICE).bfloat16().requires_grad_()
        y = layer(x)
        (y.float().square().sum() / 2).backward()
        expected = of_the_definition(layer, x, weight_map)
        for one, other in zip([y, x.grad, layer.bank.psi.grad, layer.bias.grad], expected, strict=True):
            assert distance(one, other) < 3e-2
        layer.zero_grad()
        layer.bank.zero_grad()


@triton_runs
def test_inputs_that_are_not_contiguous_or_not_aligned(weight_map):
    layer = layer_of(weight_map)
    cols = layer.in_features
    wide = torch.randn(4, cols + 3, device=DEVICE)
    flat = torch.randn(4 * cols + 1, device=DEVICE)
    with torch.no_grad():
        for _ in range(2):  # the second time by the remembered launch
            for x in (wide[:, :cols], wide[:, 3:], flat[1:].view(4, cols), flat[:-1].view(cols, 4).t(), wide[:0, 3:]):
                assert distance(layer(x), F.linear(x, layer.dense_weight(), layer.bias)) < 1e-4 or not x.numel()
                assert layer(x).shape == (len(x), layer.out_features)
    assert not launch._failures


@triton_runs
def test_what_does_not_fit_is_refused_as_by_torch(weight_map):
    layer = layer_of(weight_map)
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(torch.randn(2, layer.in_features + 1, device=DEVICE))
    assert not launch._failures


@triton_runs
def test_tangents_are_carried_on(weight_map):
    """Forward-mode differentiation sees no kernel."""
    product = TritonProduct(weight_map.matrix("it"))
    psi, x = array(weight_map), torch.randn(2, product.matrix.cols, device=DEVICE)
    weight, tangent = product.matrix.weight(psi), torch.randn_like(x)
    assert usable(x)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        assert not usable(x)
        y = product.linear(torch.autograd.forward_ad.make_dual(x, tangent), psi, None)
        assert distance(torch.autograd.forward_ad.unpack_dual(y).tangent, tangent @ weight.t()) < 1e-5
    assert not launch._failures


@triton_runs
def test_copies_and_pickles_leave_tables_behind(weight_map):
    layer = layer_of(weight_map)
    x = torch.randn(2, layer.in_features, device=DEVICE)
    with torch.inference_mode():
        expected = layer(x)
    (product,) = (p for p in layer.shared.products if isinstance(p, TritonProduct))
    kept = product.kept_tensors()
    assert kept
    assert not any(tensor.is_inference() for tensor in kept)
    assert all(any(tensor is one for one in layer.kept_tensors()) for tensor in kept)
    for again in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert not again.kept_tensors()
        with torch.no_grad():
            assert torch.equal(again.linear(x, layer.bank.psi.detach(), layer.bias), expected)
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.bank.psi.grad is not None
