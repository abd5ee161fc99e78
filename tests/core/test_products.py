"""Products: which one is chosen, how a single token is shared out, and that none makes what is as large as a weight."""

import pytest
import torch
from networks import Network
from torch import nn

from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products import views
from hf_rps.products.autograd import linear_by_definition
from hf_rps.products.base import Made, choose, products_of
from hf_rps.products.views import Views
from hf_rps.psi.bank import Bank


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("ratio", [0.6, 0.3])
def test_a_single_token_is_shared_out(monkeypatch, threads, ratio):
    """With several threads every thread has its own part of a product with one token, and the rest is not lost."""
    monkeypatch.setattr(views, "_SHARE_OUT_FROM", 1)
    weight_map = WeightMap([Target("a", 40, 24, 0.1), Target("b", 25, 24, 0.1)], ratio=ratio)
    psi = torch.randn(weight_map.m)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("a", "b"):
            product, x = Views(weight_map.matrix(name)), torch.randn(1, 1, 24)
            found = product.linear(x, psi, None)
            torch.testing.assert_close(found, x @ definition.weight(psi, weight_map, name).t())
    finally:
        torch.set_num_threads(before)


def test_what_is_made():
    """A weight in many short runs is made for a product, one in few long ones is not, unless tokens are many."""
    weight_map = WeightMap([Target("a", 768, 768, 0.1), Target("b", 768, 768, 0.1)], ratio=0.9)
    many = WeightMap(weight_map.targets, ratio=0.01)
    x = torch.zeros(64, 768)
    few_runs, many_runs = products_of(weight_map.matrix("a")), products_of(many.matrix("a"))
    assert isinstance(choose(few_runs, x), Views)
    assert isinstance(choose(few_runs, x.expand(64, 64, 768)), Made)
    assert isinstance(choose(many_runs, x), Made)
    two_runs = products_of(weight_map.matrix("b"))
    assert isinstance(choose(two_runs, x), Views)
    assert isinstance(choose(two_runs, x.to("meta")), Made), "on any device but a CPU launches are dear"


def test_reference_equals_weight_by_definition():
    network = Network(ratio=0.004)
    layer, psi = network.layers[1], network.bank.psi
    weight = definition.weight(psi, network.bank.weight_map, layer.name)
    torch.testing.assert_close(layer.shared.matrix.weight(psi), weight)
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(linear_by_definition(x, psi, layer.bias, layer.shared.matrix), layer(x))


def test_no_dense_tensor_is_made(monkeypatch):
    """Forward and backward of the fast path allocate nothing of the size of a weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    targets = [Target("a", 1536, 512, 0.1), Target("b", 512, 1536, 0.1)]
    bank = Bank(WeightMap(targets, ratio=0.1))
    nn.init.normal_(bank.psi)
    layers = [RPSLinear(t.name, bank, nn.Linear(t.in_features, t.out_features)) for t in targets]
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                sizes.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    x = torch.randn(2, 512, requires_grad=True)
    with Watch():
        layers[1](torch.relu(layers[0](x))).sum().backward()
    assert bank.psi.grad is not None
    assert max(sizes) <= bank.weight_map.m < 1536 * 512
