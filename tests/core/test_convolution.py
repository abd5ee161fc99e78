"""One convolution that shares its weight, against the class that it replaces with the weight by definition.

What autograd does to one such layer among others is in test_layers.py, whose kinds of layers include it.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rps import RPSConfig, get_rps_model
from hf_rps.initial import check_weight, initial_std
from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.kinds import Candidate, kind_of
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.bank import Bank
from hf_rps.psi.memory import GradientMemory

# arguments of a convolution: (in_channels, out_channels, kernel_size) and options, and the size of its input
SHAPES = {
    "plain": ((4, 6, 3), {}, (9, 8)),
    "stride": ((4, 6, 3), {"stride": 2, "padding": 1}, (9, 8)),
    "unequal": ((4, 6, (3, 2)), {"stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)}, (9, 8)),
    "padding by name": ((4, 6, 3), {"padding": "same", "dilation": 2}, (9, 8)),
    "groups": ((4, 6, 3), {"groups": 2}, (9, 8)),
    "depthwise": ((5, 5, 3), {"groups": 5, "padding": 1}, (9, 8)),
    "pointwise": ((4, 6, 1), {}, (9, 8)),
    "patches": ((3, 6, 4), {"stride": 4}, (8, 8)),
    "reflect": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (9, 8)),
    "circular": ((4, 6, 3), {"padding": (1, 0), "padding_mode": "circular"}, (9, 8)),
    "one dimension": ((4, 6, 3), {"padding": 1, "groups": 2}, (9,)),
    "three dimensions": ((2, 3, 2), {"stride": 2}, (4, 5, 4)),
}


def layer_of(shape, options, size, bias=True, dtype=torch.float64, ratio=0.3, **map_options):
    """One shared convolution over a bank of its own."""
    torch.manual_seed(0)
    dense = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)](*shape, **options, bias=bias).to(dtype)
    weight = Candidate("conv", dense, kind_of(dense)).weight
    weight_map = WeightMap([Target("conv", *weight.shape, std=0.3)], ratio=ratio, **map_options)
    bank = Bank(weight_map, "none", dtype=dtype)
    nn.init.normal_(bank.psi)
    return RPSConv("conv", bank, dense)


def reference(layer, x):
    """The convolution of the replaced class with the weight that is written out by definition."""
    weight = definition.weight(layer.bank.psi, layer.bank.weight_map, layer.name)
    return layer._shell._conv_forward(x, weight.view(layer.weight.shape), layer.bias)


def agrees(layer, x):
    """Output and all gradients of ``layer`` are those of the definition."""
    inputs = [x, layer.bank.psi, *([] if layer.bias is None else [layer.bias])]
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_output_and_gradients_follow_the_definition(case, bias):
    shape, options, size = SHAPES[case]
    layer = layer_of(shape, options, size, bias)
    x = torch.randn(2, shape[0], *size, dtype=torch.float64, requires_grad=True)
    agrees(layer, x)
    agrees(layer, x.detach()[0].requires_grad_())  # without a batch


@pytest.mark.parametrize("options", [{"mapping": "roast"}, {"mapping": "hash"}, {"sign": "element"}, {"sign": "none"}])
def test_other_maps(options):
    shape, conv, size = SHAPES["stride"]
    agrees(
        layer_of(shape, conv, size, **options),
        torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True),
    )


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), dimensions=st.integers(1, 3),
    ratio=st.floats(0.01, 1), channels_last=st.booleans(),
)  # fmt: skip
def test_any_shape(groups, per_group, kernel, stride, padding, dilation, dimensions, ratio, channels_last):
    shape = (groups * per_group[0], groups * per_group[1], kernel)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = layer_of(shape, options, (6,) * dimensions, ratio=ratio)
    x = torch.randn(2, shape[0], *(6,) * dimensions, dtype=torch.float64)
    if channels_last and dimensions == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    agrees(layer, x.requires_grad_())


def test_matrix_and_attributes():
    """The weight is row-major, whatever order it lies in, and what model code reads of a convolution is there."""
    dense = nn.Conv2d(3, 5, (2, 4), stride=2, padding=1, dilation=(1, 2), padding_mode="reflect")
    weight = dense.weight.detach().clone()
    dense = dense.to(memory_format=torch.channels_last)
    assert not dense.weight.is_contiguous()
    candidate = Candidate("conv", dense, kind_of(dense))
    assert torch.equal(candidate.weight, weight.view(5, 24))
    holder = nn.ModuleDict({"conv": dense})
    model = nn.Module()
    model.holder = holder
    get_rps_model(model, RPSConfig(ratio=1))
    layer = model.holder["conv"]
    assert isinstance(layer, RPSConv)
    torch.testing.assert_close(layer.dense_weight(), weight)
    assert (layer.weight.shape, layer.weight.ndim) == (weight.shape, 4)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(dense, name)
    assert "kernel_size=(2, 4)" in repr(layer)
    assert "padding_mode='reflect'" in repr(layer)


def test_weights_that_are_all_zero_or_not_finite():
    conv = nn.Conv2d(4, 8, 3)
    nn.init.zeros_(conv.weight)
    assert initial_std(Candidate("conv", conv, kind_of(conv)).weight) == pytest.approx(1 / 6, rel=1e-2)
    conv.weight.data[1, 2, 0, 1] = float("inf")
    with pytest.raises(ValueError, match="'conv' holds values that are not finite"):
        check_weight(Candidate("conv", conv, kind_of(conv)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    shape, options, size = SHAPES["stride"]
    layer = layer_of(shape, options, size, dtype=torch.float32)
    x = torch.randn(2, 4, *size, requires_grad=True)
    (layer(x).square().sum()).backward()
    expected = layer.bank.psi.grad.clone(), x.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    layer.bank.zero_grad()
    x.grad = None
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    found = layer.bank.psi.grad, x.grad, layer.bias.grad
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert (value - wanted).norm() < 0.02 * wanted.norm()


def test_gradients_of_a_bfloat16_model_are_summed_in_float32():
    """256 weights on a slot: sums in bfloat16 would be off by more."""
    layer = layer_of((32, 32, 3), {}, (8, 8), dtype=torch.float32, ratio=1 / 256)
    low = copy.deepcopy(layer).bfloat16()
    low.bank.psi.data = low.bank.psi.data.bfloat16()
    assert low.bank is not layer.bank
    x = torch.randn(2, 32, 8, 8).bfloat16()
    with torch.no_grad():
        layer.bank.psi.copy_(low.bank.psi)
        layer.bias.copy_(low.bias)
    layer(x.float()).square().sum().backward()
    low(x).float().square().sum().backward()
    assert low.bank.psi.grad.dtype == torch.bfloat16
    assert (low.bank.psi.grad.float() - layer.bank.psi.grad).norm() < 0.01 * layer.bank.psi.grad.norm()


def test_the_gradient_is_one_buffer_and_not_an_array_a_run(monkeypatch):
    """The plain path would add up an array of the size of psi for each of the many runs."""
    layer = layer_of((8, 16, 3), {}, (6, 6), ratio=0.05)
    made = []
    zeros = GradientMemory.zeros
    monkeypatch.setattr(GradientMemory, "zeros", lambda self, psi: made.append(1) or zeros(self, psi))
    assert len(layer.shared.matrix.layout.runs) >= 20
    y = layer(torch.randn(1, 8, 6, 6, dtype=torch.float64))
    names = set()

    def collect(node):
        if node is not None and node.name() not in names:
            names.add(node.name())
            for parent, _ in node.next_functions:
                collect(parent)

    collect(y.grad_fn)
    assert any("SharedWeight" in name for name in names)
    assert not any("Cat" in name for name in names)
    y.sum().backward()
    assert made == [1]


def test_double_backward():
    shape, options, size = SHAPES["groups"]
    layer = layer_of(shape, options, size)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (layer, lambda x: reference(layer, x)):
        gx, gpsi = torch.autograd.grad(function(x).pow(3).sum(), (x, layer.bank.psi), create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum() + gpsi.square().sum(), (x, layer.bank.psi, layer.bias)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["stride", "reflect", "one dimension"])
def test_compile(case, backend):
    torch._dynamo.reset()
    shape, options, size = SHAPES[case]
    layer = layer_of(shape, options, size)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for function in (compiled, layer):
        y = function(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.bank.psi)
        results.append((y, gradient))
    torch.testing.assert_close(*results)


def test_a_model_that_reads_the_weight_itself():
    shape, options, size = SHAPES["plain"]
    layer = layer_of(shape, options, size)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    by_hand = nn.functional.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(by_hand, layer(x))
    (gradient,) = torch.autograd.grad(by_hand.square().sum(), layer.bank.psi)
    torch.testing.assert_close(gradient, *torch.autograd.grad(layer(x).square().sum(), layer.bank.psi))


def test_reference_is_the_plain_form():
    shape, options, size = SHAPES["plain"]
    layer = layer_of(shape, options, size)
    matrix = layer.shared.matrix.weight(layer.bank.psi)
    torch.testing.assert_close(layer.dense_weight(), matrix.view(6, 4, 3, 3), rtol=0, atol=0)
