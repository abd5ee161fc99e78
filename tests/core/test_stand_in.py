"""The stand-in for ``layer.weight``: everything that can be read is right, everything that would be lost raises."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_rps import RPSConfig, get_rps_model
from hf_rps.layers.stand_in import WeightStandIn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return get_rps_model(Net(), RPSConfig(ratio=0.5))


READS = {
    "==": lambda w: w == 1,
    "**": lambda w: w**2,
    ">": lambda w: w > 0,
    "abs": abs,
    "1 -": lambda w: 1 - w,
    "matmul": lambda w: w @ w.t(),
    "iteration": lambda w: torch.stack(list(w)),
    "slice": lambda w: w[1:3, ::2],
    "mask": lambda w: w[w > 0],
    "index": lambda w: w[torch.tensor([2, 0])],
    "chained views": lambda w: w.t().reshape(-1)[3:].unsqueeze(0),
    "T": lambda w: w.T.contiguous(),
    "data": lambda w: w.data + 0,
    "detach": lambda w: w.detach() * 2,
    "cat": lambda w: torch.cat([w, w]),
    "norm": torch.linalg.norm,
    "float": lambda w: w.double(),
    "clone then write": lambda w: w.clone().mul_(3),
    "chunk": lambda w: torch.stack(w.chunk(2)),
    "linear": lambda w: nn.functional.linear(torch.ones(2, w.shape[1]), w),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "deepcopy": lambda w: copy.deepcopy(w) if w.is_leaf else w,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "stride": lambda w: torch.tensor(w.t().stride()),
    "new_zeros": lambda w: w.new_zeros(3),
}


@pytest.mark.parametrize("name", READS)
def test_reads_as_a_tensor(net, name):
    layer = net.a
    expected = READS[name](layer.dense_weight())
    torch.testing.assert_close(READS[name](layer.weight) + 0, expected + 0)


def test_metadata_costs_nothing(net, monkeypatch):
    layer, dense = net.a, net.a.dense_weight()
    monkeypatch.setattr(type(layer), "dense_weight", lambda self: pytest.fail("the weight was made"))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert isinstance(weight, WeightStandIn)
    for read in ("shape", "dtype", "device", "ndim", "requires_grad", "is_meta", "nbytes"):
        assert getattr(weight, read) == getattr(dense, read), read
    for read in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__"):
        assert getattr(weight, read)() == getattr(dense, read)(), read
    assert weight.t().shape == (8, 6)
    assert weight.data[0].shape == (8,)
    assert not weight.data.requires_grad
    assert "shape=(6, 8)" in repr(weight)
    assert weight.grad is None


@pytest.mark.parametrize("read", [lambda w: w.sum(), lambda w: (w.t() * 2).sum(), lambda w: w[1:].sum()])
def test_gradients_reach_the_array(net, read):
    (expected,) = torch.autograd.grad(read(net.a.dense_weight()), net.rps.psi)
    (gradient,) = torch.autograd.grad(read(net.a.weight), net.rps.psi)
    torch.testing.assert_close(gradient, expected)


def assign(name):
    return lambda w: setattr(w, name, torch.zeros(6, 8) if name != "requires_grad" else False)


def set_item(w):
    w[0] = 1


def add_in_place(w):
    w += 1


WRITES = {
    "nn.init": nn.init.zeros_,
    "nn.init normal": nn.init.normal_,
    "mul_": lambda w: w.mul_(0),
    "copy_": lambda w: w.copy_(torch.zeros(6, 8)),
    "data =": assign("data"),
    "grad =": assign("grad"),
    "requires_grad =": assign("requires_grad"),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "data.zero_": lambda w: w.data.zero_(),
    "detach().add_": lambda w: w.detach().add_(1),
    "view().zero_": lambda w: w.view(-1).zero_(),
    "t().mul_": lambda w: w.t().mul_(2),
    "[0].fill_": lambda w: w[0].fill_(0),
    "T.zero_": lambda w: w.T.zero_(),
    "[0] =": set_item,
    "+=": add_in_place,
    "out=": lambda w: torch.add(w, 1, out=w),
    "register_hook": lambda w: w.register_hook(print),
    "post accumulate hook": lambda w: w.register_post_accumulate_grad_hook(print),
    "retain_grad": lambda w: w.retain_grad(),
    "share_memory_": lambda w: w.share_memory_(),
}


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_what_would_be_lost_raises(net, name, no_grad):
    x = torch.randn(2, 8)
    before = net(x)
    with torch.set_grad_enabled(not no_grad), pytest.raises(RuntimeError, match=r"shared array.*to_dense"):
        WRITES[name](net.a.weight)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(6, 8)), torch.zeros(6, 8)])
def test_the_weight_of_a_layer_can_not_be_replaced(net, value):
    with pytest.raises(AttributeError, match=r"the weight of 'a' is made from a shared array.*to_dense"):
        net.a.weight = value


def test_a_custom_autograd_function_is_refused():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, gradient):
            x, w = ctx.saved_tensors
            return gradient @ w, gradient.t() @ x

    net = get_rps_model(Net(), RPSConfig(ratio=0.5))
    x = torch.randn(2, 8)
    torch.testing.assert_close(Product.apply(x, net.a.weight), x @ net.a.dense_weight().t())
    with pytest.raises(RuntimeError, match=r"dense_weight\(\)"):
        Product.apply(x, net.a.weight).sum().backward()
    Product.apply(x, net.a.dense_weight()).sum().backward()
    assert net.rps.psi.grad.abs().sum() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_conv1d_weight_lies_in_memory_as_a_parameter_does(compiled, monkeypatch):
    """Its matrix is the transposed one; models and torch's own utilities flatten weights by ``view``."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layer = Conv1D(6, 8)
    expected = model.layer.weight.detach().clone()
    get_rps_model(model, RPSConfig(ratio=1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    weight = model.layer.weight
    assert (weight + 0).stride() == expected.stride()
    torch.testing.assert_close(weight.view(-1) + 0, expected.view(-1))
    torch.testing.assert_close(torch.as_strided(weight, (8,), (1,)), torch.as_strided(expected, (8,), (1,)))
    with torch.no_grad():
        torch.testing.assert_close(weight.data.view(4, 12) + 0, expected.view(4, 12))
