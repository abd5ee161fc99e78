"""The Triton kernels against the definition, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1).

The interpreter is slow, so shapes are small; they have every irregularity that large ones have.
"""

import copy
import logging
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import Made, always, choose, products_of
from hf_rps.products.triton import launch
from hf_rps.products.triton.matrix import KernelMatrix
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


@pytest.fixture(autouse=True)
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


def test_the_rotations_are_the_formula_of_the_slots(weight_map):
    matrix = weight_map.matrix("it")
    m, base, start, shifts = matrix.rotations
    t = start + torch.arange(matrix.rows * matrix.cols)
    slots = base + (t % m + torch.tensor(shifts)[t // m]) % m
    assert slots.tolist() == weight_map.slots("it").ravel().tolist()


@triton_runs
@pytest.mark.parametrize("bias", [None, torch.float32, "dtype of x"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_few_tokens(weight_map, tokens, dtype, bias, monkeypatch):
    poison(monkeypatch)
    psi, matrix = array(weight_map, dtype), weight_map.matrix("it")
    x = torch.randn(tokens, matrix.cols, device=DEVICE).to(dtype)
    if bias is not None:
        bias = torch.randn(matrix.rows, device=DEVICE).to(dtype if isinstance(bias, str) else bias)
    y = KernelMatrix(matrix).few(x, psi, bias, tokens)
    assert not launch._failures
    assert y.dtype == dtype
    expected = F.linear(x.double(), exact_weight(psi, weight_map), None if bias is None else bias.double())
    assert distance(y, expected) < EXACT[dtype]


@triton_runs
@pytest.mark.parametrize("base", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_weight(weight_map, dtype, base, monkeypatch):
    poison(monkeypatch)
    psi, matrix = array(weight_map, dtype), weight_map.matrix("it")
    if base is not None:
        base = torch.randn(matrix.rows, matrix.cols, device=DEVICE).to(base)
    weight = KernelMatrix(matrix).make(psi, base)
    assert not launch._failures
    expected = exact_weight(psi, weight_map)
    if base is None:
        rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0  # the interpreter cuts instead of rounding
        torch.testing.assert_close(weight, definition.weight(psi, weight_map, "it"), rtol=rtol, atol=0)
    else:
        assert weight.dtype == base.dtype
        assert distance(weight, base.double() + expected) < EXACT[base.dtype]


@triton_runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_adjoint(weight_map, dtype):
    psi, matrix = array(weight_map).double().requires_grad_(), weight_map.matrix("it")
    gradient = torch.randn(matrix.rows, matrix.cols, device=DEVICE).to(dtype)
    into = torch.randn(weight_map.m, device=DEVICE)
    (expected,) = torch.autograd.grad(definition.weight(psi, weight_map, "it"), psi, gradient.double())
    expected += into
    untouched = expected == into
    before, again = into.clone(), into.clone()
    KernelMatrix(matrix).add_adjoint(into, gradient)
    assert not launch._failures
    assert distance(into, expected) < 1e-4
    assert torch.equal(into[untouched], before[untouched])
    KernelMatrix(matrix).add_adjoint(again, gradient)
    assert torch.equal(into, again), "the order of summation is fixed"


@triton_runs
def test_segments_of_the_array():
    """sharing="module": the matrix's slots begin inside the array."""
    targets = [Target("before", 12, 24, 0.1), Target("it", 20, 24, 0.1)]
    weight_map = WeightMap(targets, ratio=0.3, sharing="module")
    psi, matrix = array(weight_map), KernelMatrix(weight_map.matrix("it"))
    assert weight_map.matrix("it").rotations.base > 0
    torch.testing.assert_close(matrix.make(psi), definition.weight(psi, weight_map, "it"), rtol=0, atol=0)
    into, gradient = torch.zeros_like(psi), torch.randn(20, 24, device=DEVICE)
    expected = torch.zeros_like(psi)
    weight_map.matrix("it").add_adjoint(expected, gradient)
    matrix.add_adjoint(into, gradient)
    torch.testing.assert_close(into, expected)


@triton_runs
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed):
    random = np.random.default_rng(seed)
    rows, cols = int(random.integers(1, 80)), int(random.integers(1, 10)) * int(random.choice([1, 2, 4, 8]))
    others = [Target(f"{i}", int(random.integers(1, 40)), int(random.integers(1, 60)), 0.1) for i in range(3)]
    targets = [*others[: seed % 4], Target("it", rows, cols, 0.1), *others[seed % 4 :]]
    n = sum(target.numel for target in targets)
    weight_map = WeightMap(targets, ratio=max(min(1.0, 10 ** random.uniform(-2, 0)), (cols + 8) / n), seed=seed)
    matrix, psi = weight_map.matrix("it"), array(weight_map)
    assert TritonProduct.accepts(matrix)
    kernel, exact = KernelMatrix(matrix), exact_weight(psi, weight_map)
    torch.testing.assert_close(kernel.make(psi).double(), exact, rtol=1e-6, atol=0)
    tokens = int(random.integers(1, 17))
    x, bias = torch.randn(tokens, cols, device=DEVICE), torch.randn(rows, device=DEVICE)
    assert distance(kernel.few(x, psi, bias, tokens), F.linear(x.double(), exact, bias.double())) < 1e-4
    into, gradient = torch.zeros_like(psi), torch.randn(rows, cols, device=DEVICE)
    expected = torch.zeros_like(psi, dtype=torch.float64)
    matrix.add_adjoint(expected, gradient.double())
    kernel.add_adjoint(into, gradient)
    assert distance(into, expected) < 1e-5
    assert not launch._failures


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


def fails(*args, **kwargs):
    raise RuntimeError("no compiler here")


def check_falls_back(weight_map, caplog, warnings):
    layer = layer_of(weight_map)
    with caplog.at_level(logging.WARNING, "hf_rps"):
        for tokens in (1, 3, 20):
            x = torch.randn(tokens, layer.in_features, device=DEVICE, requires_grad=True)
            y = layer(x)
            (y.square().sum() / 2).backward()
            expected = of_the_definition(layer, x, weight_map)
            for one, other in zip([y, x.grad, layer.bank.psi.grad, layer.bias.grad], expected, strict=True):
                assert distance(one, other) < 1e-4
            layer.zero_grad()
            layer.bank.zero_grad()
        assert isinstance(choose([TritonProduct(weight_map.matrix("it")), Made(weight_map.matrix("it"))], x), Made)
    assert len(caplog.records) == warnings


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_triton_torch_takes_over(weight_map, caplog, monkeypatch, error):
    def import_module(name):
        raise error(f"no {name}")

    monkeypatch.setattr(launch.importlib, "import_module", import_module)
    check_falls_back(weight_map, caplog, warnings=1)


def test_without_the_package_the_import_fails(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_rps.products.triton.kernels", raising=False)
    with caplog.at_level(logging.WARNING, "hf_rps"):
        assert launch.loaded() is None
        assert launch.loaded() is None
    assert len(caplog.records) == 1
    assert launch.DISABLE in caplog.records[0].message


@triton_runs
def test_where_a_kernel_fails_torch_takes_over(weight_map, caplog, monkeypatch):
    monkeypatch.setattr(launch.Launcher, "_launch", fails)
    check_falls_back(weight_map, caplog, warnings=1)


def test_the_environment_disables_it(weight_map, caplog, monkeypatch):
    monkeypatch.setenv(launch.DISABLE, "1")
    check_falls_back(weight_map, caplog, warnings=0)


def test_which_matrices_have_it():
    targets = [Target("a", 40, 16, 0.1), Target("b", 4, 400, 0.1)]
    folded = WeightMap(targets, ratio=0.1)
    assert isinstance(products_of(folded.matrix("a"))[0], TritonProduct)
    assert not TritonProduct.accepts(folded.matrix("b")), "a row longer than the array"
    assert not TritonProduct.accepts(WeightMap(targets, ratio=0.1, mapping="hash").matrix("a"))
    assert not TritonProduct.accepts(WeightMap(targets, ratio=0.1, sign="element").matrix("a"))
    huge = WeightMap([Target("a", 50_000, 50_000, 0.1)], ratio=0.001)
    assert not TritonProduct.accepts(huge.matrix("a")), "offsets beyond int32"


def test_a_cpu_does_not_choose_it():
    matrix = WeightMap([Target("a", 40, 16, 0.1)], ratio=0.1).matrix("a")
    assert not isinstance(choose(products_of(matrix), torch.randn(3, 16)), TritonProduct)
