"""Layers of several dtypes over one array: each computes in its input's, and keeps the dtype of its dense weight."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny_configs import tiny_config
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from ways import read

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.base import RPSLayer
from hf_rps.mappings import definition

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
ROUNDING = {HALF: 2.0**-10, BF16: 2.0**-7}


class Mixed(nn.Module):
    """Layers whose parameters have several dtypes, each of which is given an input of its own."""

    def __init__(self, low=HALF, high=FLOAT):
        super().__init__()
        self.low = nn.ModuleList([nn.Linear(12, 20), nn.Conv1d(5, 7, 3, padding=1)]).to(low)
        self.high = nn.ModuleList([Conv1D(24, 20), nn.Linear(24, 16, bias=False)]).to(high)

    def forward(self, x):
        x = self.low[1](torch.tanh(self.low[0](x)))
        return self.high[1](torch.tanh(self.high[0](x.to(self.high[0].weight.dtype))))


CONFIG = RPSConfig(ratio=0.3, target_modules=["low.0", "low.1", "high.0", "high.1"], grad_scaling="none")


def mixed(low=HALF, high=FLOAT, way="made"):
    torch.manual_seed(0)
    return read(get_rps_model(Mixed(low, high), copy.deepcopy(CONFIG)), way)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, RPSLayer)]


def dtypes_of(model):
    """Of the four weights."""
    return [layer.weight.dtype for layer in (*model.low, *model.high)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(HALF, HALF, HALF), (HALF, FLOAT, FLOAT), (BF16, FLOAT, FLOAT), (HALF, BF16, FLOAT), (BF16, DOUBLE, DOUBLE)],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_array_is_as_wide_as_its_widest_weight(low, high, expected, swapped):
    low, high = (high, low) if swapped else (low, high)
    model = mixed(low, high)
    assert find_bank(model).psi.dtype == expected
    assert dtypes_of(model) == [low, low, high, high]
    for layer in layers_of(model):
        assert layer.weight.dtype == layer.dense_weight().dtype == layer.weight_dtype
        assert layer.weight.transpose(0, 1).dtype == layer.weight_dtype
    plain = to_dense(copy.deepcopy(model))
    assert {name: p.dtype for name, p in plain.named_parameters()} == {
        name: p.dtype for name, p in Mixed(low, high).named_parameters()
    }


@pytest.mark.parametrize("low", [HALF, BF16])
@pytest.mark.parametrize("way", ["views", "made"])
def test_forward_is_that_of_the_dense_model_in_the_same_dtypes(low, way):
    model = mixed(low, way=way)
    plain = to_dense(copy.deepcopy(model))
    x, found = torch.randn(2, 5, 12).to(low), {}
    for name, net in {"compressed": model, "dense": plain}.items():
        found[name] = [net.low[0](x), net.low[1](torch.ones(2, 5, 9, dtype=low)), net(x)]
    assert [y.dtype for y in found["compressed"]] == [y.dtype for y in found["dense"]] == [low, low, FLOAT]
    for y, expected in zip(found["compressed"], found["dense"], strict=True):
        torch.testing.assert_close(y.float(), expected.float(), atol=4 * ROUNDING[low], rtol=4 * ROUNDING[low])
    wide = torch.randn(3, 24)
    torch.testing.assert_close(model.high[1](wide), plain.high[1](wide))  # to float32's rounding


@pytest.mark.parametrize("way", ["views", "made"])
def test_gradients_of_all_dtypes_reach_the_array(way):
    model = mixed(way=way)
    bank, (low, _), (_, high) = find_bank(model), model.low, model.high
    x, z = torch.randn(6, 12).half(), torch.randn(6, 24)
    bank.array.passes.watch(model)
    (low(x).float().sum() + high(z).sum()).backward()
    psi = bank.psi.detach().clone().requires_grad_()
    weights = [definition.weight(psi, bank.weight_map, layer.name) for layer in (low, high)]
    (F.linear(x.float(), weights[0]).sum() + F.linear(z, weights[1]).sum()).backward()
    assert bank.psi.grad.dtype == FLOAT
    torch.testing.assert_close(bank.psi.grad, psi.grad, rtol=1e-2, atol=1e-2 * psi.grad.abs().max().item())
    read_by_high = torch.from_numpy(bank.weight_map.slots(high.name)).unique()
    read_by_low = torch.from_numpy(bank.weight_map.slots(low.name)).unique()
    only_high = read_by_high[~torch.isin(read_by_high, read_by_low)]
    if len(only_high):  # not rounded on its way
        torch.testing.assert_close(bank.psi.grad[only_high], psi.grad[only_high])


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "float, then half": lambda model: model.float().half(),
    "a part to half": lambda model: model.high.half(),
    "a part to double": lambda model: model.low.double(),
    "a layer to float": lambda model: model.low[0].float(),
    "a layer to bfloat16": lambda model: model.high[1].to(BF16),
    "a layer there and back": lambda model: model.high[0].half().float(),
    "a part, then the model": lambda model: (model.low.double(), model.bfloat16()),
    "the model, then a part": lambda model: (model.half(), model.high.float()),
    "meta": lambda model: model.to("meta"),
    "memory anew": lambda model: model.to("meta").to_empty(device="cpu"),
    "memory anew, half": lambda model: model.to("meta").to_empty(device="cpu").half(),
    "shared memory": lambda model: model.share_memory(),
    "a copy": lambda model: copy.deepcopy(model).half(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(("low", "high"), [(HALF, HALF), (HALF, FLOAT), (FLOAT, HALF), (HALF, BF16)])
@pytest.mark.parametrize("first", ["layers", "array"])
def test_a_cast_moves_the_dtypes_as_those_of_dense_weights(cast, low, high, first):
    model, plain = mixed(low, high), Mixed(low, high)
    if first == "array":  # the order of the modules, in which torch casts them, is another in other models
        model._modules = dict(reversed(model._modules.items()))
    for net in (model, plain):
        CASTS[cast](net)
    expected = dtypes_of(plain)
    assert dtypes_of(model) == expected
    psi, widest = find_bank(model).psi, functools.reduce(torch.promote_types, expected)
    assert isinstance(psi, nn.Parameter)
    assert psi.device == plain.low[0].weight.device
    assert torch.promote_types(psi.dtype, widest) == psi.dtype
    if "part" not in cast and "layer" not in cast:  # of which psi may be the wider after a narrowing cast
        assert psi.dtype == widest


def test_a_wider_layer_makes_the_array_wider():
    model = mixed(HALF, HALF)
    bank = find_bank(model)
    psi, before = bank.psi, bank.psi.detach().clone()
    model.high[1].float()
    assert bank.psi is psi  # the optimizer's
    assert psi.dtype == FLOAT
    torch.testing.assert_close(psi.detach(), before.float(), rtol=0, atol=0)
    assert dtypes_of(model) == [HALF, HALF, HALF, FLOAT]
    with torch.no_grad():
        psi.add_(1e-6)  # what float16 could not hold
    torch.testing.assert_close(model.high[1].dense_weight(), definition.weight(psi.detach(), bank.weight_map, "high.1"))


@pytest.mark.parametrize("dtype", [HALF, BF16, DOUBLE])
@pytest.mark.parametrize("high", [HALF, FLOAT])
def test_layers_follow_an_array_that_is_cast_by_itself(dtype, high):
    """Some code casts parameter by parameter, past the modules' own casts."""
    model = mixed(HALF, high)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    narrow = HALF if high == FLOAT and dtype == DOUBLE else dtype  # can't be told from a cast of the wide layers
    assert dtypes_of(model) == [narrow, narrow, dtype, dtype]
    assert model.high[1](torch.ones(2, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("way", ["views", "made"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_an_input_that_is_not_floating_is_refused(dtype, autocast, way):
    model = mixed(FLOAT, FLOAT, way)
    shapes = [(3, 12), (2, 5, 9), (3, 20), (3, 24)]
    with torch.autocast("cpu", BF16, enabled=autocast):
        for layer, plain, shape in zip(layers_of(model), [*Mixed().float().low, *Mixed().high], shapes, strict=True):
            with pytest.raises(RuntimeError):
                plain(torch.ones(shape, dtype=dtype))
            with pytest.raises(RuntimeError, match=rf"an input of dtype {dtype}.*cast the input"):
                layer(torch.ones(shape, dtype=dtype))


def test_autocast_over_several_dtypes():
    """As with dense weights, float16 ones too are cast to autocast's dtype, and float64 is left alone."""
    model = mixed(HALF, FLOAT)
    x = torch.randn(3, 5, 12)
    with torch.autocast("cpu", BF16):
        y = model(x)
    assert y.dtype == BF16
    y.float().square().sum().backward()
    assert find_bank(model).psi.grad.isfinite().all()
    for layer in layers_of(model):
        assert layer.bias is None or layer.bias.grad.dtype == layer.bias.dtype
    double = mixed(DOUBLE, DOUBLE)
    expected = double(x.double())
    with torch.autocast("cpu", BF16):
        found, plain = double(x.double()), Mixed(DOUBLE, DOUBLE)(x.double())
    assert found.dtype == plain.dtype == DOUBLE
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_double_backward_with_a_bias_of_another_dtype():
    model = mixed(FLOAT, FLOAT)
    x = torch.randn(4, 12, dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.low[0](x).pow(3).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    weight, bias = model.low[0].dense_weight().double(), model.low[0].bias.double()
    z = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(z, weight, bias).pow(3).sum(), z, create_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_compiled(train):
    torch._dynamo.reset()
    model = mixed(HALF, FLOAT)
    compiled = torch.compile(model, backend="aot_eager")
    x, results = torch.randn(2, 5, 12).half(), []
    for net in (compiled, model):
        with torch.set_grad_enabled(train):
            y = net(x)
        results.append(y)
        if train:
            (gradient,) = torch.autograd.grad(y.square().sum(), find_bank(model).psi)
            results[-1] = (y, gradient)
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


def test_a_round_trip_at_ratio_1_keeps_each_weight_to_its_own_rounding():
    torch.manual_seed(0)
    plain = Mixed(HALF, FLOAT)
    config = RPSConfig(ratio=1.0, target_modules=CONFIG.target_modules, init_weights="project")
    again = to_dense(get_rps_model(copy.deepcopy(plain), config))
    for name, parameter in plain.named_parameters():
        tolerance = 2 * ROUNDING[HALF] if name.startswith("low") else 1e-6
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=tolerance, atol=1e-7)


def test_sizes_count_dense_weights_in_their_own_dtypes():
    model = mixed(HALF, FLOAT)
    report = size_report(model)
    assert report.dense_bytes == sum(p.numel() * p.element_size() for p in Mixed(HALF, FLOAT).parameters())
    assert report.bytes == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", [HALF, DOUBLE])
def test_a_base_that_is_cast_leaves_the_dtype_of_a_head_outside(dtype):
    model = LlamaForCausalLM(tiny_config("llama"))
    get_rps_model(model, RPSConfig(ratio=0.5, target_modules=["lm_head"]))
    before = model.lm_head.dense_weight().detach().clone()
    model.model.to(dtype)
    assert model.lm_head.weight_dtype == FLOAT
    torch.testing.assert_close(model.lm_head.dense_weight().detach(), before)
