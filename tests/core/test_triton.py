"""The Triton kernels against the definition, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1).

The interpreter is slow, so shapes are small; they have every irregularity that large ones have.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton_cases import DEVICE, DTYPES, EXACT, INTERPRETED, array, distance, exact_weight, poison, triton_runs

from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.triton import launch
from hf_rps.products.triton.matrix import KernelMatrix
from hf_rps.products.triton.product import TritonProduct

pytestmark = pytest.mark.usefixtures("fresh")


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
