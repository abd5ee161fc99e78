"""Maps, arrays and the state of Triton for the tests of its kernels, on a GPU or in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import always
from hf_rps.products.triton import launch
from hf_rps.products.triton.product import TritonProduct
from hf_rps.psi.bank import Bank

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

# (rows, cols) of the matrix looked at, those of the ones before and after it, and the ratio
CASES = {
    "ratio 1": ((40, 48), (24, 48), 1.0),
    "one run": ((24, 64), (56, 64), 0.6),
    "split rows": ((70, 72), (33, 40), 0.35),
    "many runs": ((67, 48), (21, 24), 0.03),
    "rows as long as the array": ((9, 40), (3, 8), 0.105),
    "odd rows": ((37, 51), (11, 29), 0.2),
    "odd rows, many runs": ((50, 33), (7, 5), 0.06),
    "rows longer than a block": ((6, 1100), (5, 20), 0.4),
    "one row": ((1, 24), (30, 24), 0.2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def fresh():
    """No failure or setting of another test is remembered."""
    launch._failures.clear()
    launch.loaded.cache_clear()
    yield
    launch._failures.clear()
    launch.loaded.cache_clear()


@pytest.fixture(params=CASES)
def weight_map(request):
    (rows, cols), (other_rows, other_cols), ratio = CASES[request.param]
    targets = [
        Target("before", other_rows, other_cols, 0.05),
        Target("it", rows, cols, 0.03),
        Target("after", other_rows, other_cols, 0.02),
    ]
    return WeightMap(targets, ratio=ratio, seed=3, sharing="global")


def array(weight_map, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(weight_map.m, dtype=torch.float32, device=DEVICE).to(dtype)


def exact_weight(psi, weight_map):
    return definition.weight(psi.double(), weight_map, "it")


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def poison(monkeypatch):
    """Fill new tensors with NaN, so that what a kernel leaves out shows."""

    def poisoned(function):
        def make(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def layer_of(weight_map, bias=True, dtype=torch.float32):
    torch.manual_seed(2)
    target = weight_map.target("it")
    bank = Bank(weight_map, "projection", device=DEVICE, dtype=dtype)
    nn.init.normal_(bank.psi)
    dense = nn.Linear(target.in_features, target.out_features, bias=bias, device=DEVICE, dtype=dtype)
    layer = RPSLinear("it", bank, dense)
    bank.array.choose = always(TritonProduct)
    return layer


def of_the_definition(layer, x, weight_map):
    """y, and the gradients of a loss in x, psi (not divided) and bias, by the definition in float64."""
    x, psi = x.detach().double().requires_grad_(), layer.bank.psi.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = F.linear(x, definition.weight(psi, weight_map, "it"), bias)
    wanted = [x, psi] if bias is None else [x, psi, bias]
    gx, gpsi, *gbias = torch.autograd.grad(y.square().sum() / 2, wanted)
    gamma = torch.from_numpy(definition.gamma(weight_map)).to(gpsi)
    return y, gx, gpsi / gamma.masked_fill(gamma == 0, 1), *gbias
