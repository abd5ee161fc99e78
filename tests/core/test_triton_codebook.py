"""The Triton kernels of codebook matrices against the definition, on a GPU or in Triton's interpreter, and without."""

import copy
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from codebook_matrices import keep, lock_behind, matrix_of, psi_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from triton_cases import DEVICE, DTYPES, EXACT, INTERPRETED, distance, poison, triton_runs

from hf_rps import RPSConfig, get_rps_model, internals
from hf_rps.conversion import find_bank
from hf_rps.mappings import codebook as codebook_mapping
from hf_rps.mappings.base import SharedMatrix, Span
from hf_rps.mappings.codebook import BITS, CodebookMatrix
from hf_rps.products.base import Made, always, products_of
from hf_rps.products.triton import codebook, launch
from hf_rps.products.triton import matrix as triton_matrix
from hf_rps.products.triton.codebook import TritonCodebookProduct, TritonCodebooks, can_serve, few_tokens

FASTER = TritonCodebooks()
pytestmark = pytest.mark.usefixtures("fresh")


def check(matrix, tokens=(1, 3), dtype=torch.float32, bias=None):
    """All kernels against the definition in float64; W is equal."""
    psi = psi_of(matrix, dtype, DEVICE)
    weight = matrix.weight(psi)
    made = FASTER.make(matrix, psi)
    assert made is not None
    assert made.equal(weight)
    if bias is not None:
        bias = torch.randn(matrix.rows, device=DEVICE).to(bias)
    for count in tokens:
        x = torch.randn(count, matrix.cols, device=DEVICE).to(dtype)
        y = few_tokens(matrix, x, psi, bias, count)
        assert y.dtype == dtype
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert distance(y, expected) < EXACT[dtype]
    gradient, into = torch.randn_like(weight), torch.randn(len(psi), device=DEVICE)
    expected, again = into.double(), into.clone()
    SharedMatrix.add_adjoint(matrix, expected, gradient.double())
    outside = [*range(matrix.start), *range(matrix.start + matrix.size, len(psi))]
    before = into[outside]
    assert FASTER.add_adjoint(matrix, into, gradient)
    assert distance(into, expected) < 1e-5
    assert before.equal(into[outside])
    assert FASTER.add_adjoint(matrix, again, gradient)
    assert again.equal(into), "the order of summation is fixed"
    assert not launch._failures


@triton_runs
@pytest.mark.parametrize("group", [None, 24, 10, 3, 1])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_equal_the_definition(bits, group, monkeypatch):
    poison(monkeypatch)
    for rows, cols in [(1, 1), (2, 7), (5, 129)]:
        check(matrix_of(rows, cols, bits, group, device=DEVICE), (1, 2, 16), bias=torch.float32)


@triton_runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_every_precision(bits, dtype):
    check(matrix_of(21, 40, bits, 16, device=DEVICE), (1, 5), dtype, bias=dtype)


@triton_runs
@pytest.mark.parametrize("bits", BITS)
def test_rows_longer_than_a_block(bits):
    check(matrix_of(3, 1100, bits, device=DEVICE), (1, 2))


@triton_runs
@given(
    st.integers(1, 20), st.integers(1, 300), st.sampled_from(BITS), st.integers(1, 310), st.integers(1, 16),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_equal_the_definition_anywhere(rows, cols, bits, group, tokens, with_bias, seed):
    matrix = matrix_of(rows, cols, bits, group, seed, DEVICE)
    check(matrix, (tokens,), bias=torch.float32 if with_bias else None)


@triton_runs
@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="locks a page of the CPU's memory by mprotect")
@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_read_beyond_the_last_codes(bits):
    matrix = matrix_of({2: 16, 3: 32, 4: 8, 8: 4}[bits], 1024, bits)  # a whole number of pages
    lock_behind(matrix)
    check(matrix, (2,))


@triton_runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_half_precision_is_rounded_once(dtype):
    matrix = matrix_of(6, 40, 3, device=DEVICE)
    into, gradient = psi_of(matrix, dtype, DEVICE), torch.randn(6, 40, device=DEVICE)
    expected = into.double()
    SharedMatrix.add_adjoint(matrix, expected, gradient.double())
    assert FASTER.add_adjoint(matrix, into, gradient)
    rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0  # the interpreter cuts instead of rounding
    torch.testing.assert_close(into, expected.to(dtype), rtol=rtol, atol=0)


@triton_runs
def test_what_is_not_finite_is_kept():
    matrix = matrix_of(4, 64, 4, device=DEVICE)
    psi, x = psi_of(matrix, device=DEVICE), torch.randn(2, 64, device=DEVICE)
    x[1, 3] = torch.nan
    y = few_tokens(matrix, x, psi, None, 2)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    gradient, into = torch.ones(4, 64, device=DEVICE), torch.zeros_like(psi)
    gradient[2, 5], gradient[1, 7] = torch.inf, torch.nan
    matrix.add_adjoint(into, gradient)
    assert matrix.books(into).isinf().sum() == matrix.books(into).isnan().sum() == 1


@triton_runs
def test_inputs_that_are_not_contiguous_or_not_aligned():
    matrix = matrix_of(6, 20, 3, 8, device=DEVICE)
    psi, product = psi_of(matrix, device=DEVICE), TritonCodebookProduct(matrix)
    flat = torch.randn(4 * 20 + 1, device=DEVICE)
    for x in (torch.randn(20, 4, device=DEVICE).t(), flat[1:].view(4, 20), flat[:20], flat[:80].view(2, 2, 20)):
        y = product.linear(x, psi, None)
        assert distance(y, x.double() @ matrix.weight(psi).double().t()) < 1e-5
        assert y.shape == (*x.shape[:-1], 6)
        assert not y._is_view()
    one, other, gradient = torch.zeros_like(psi), torch.zeros_like(psi), torch.randn(20, 6, device=DEVICE).t()
    assert FASTER.add_adjoint(matrix, one, gradient)
    SharedMatrix.add_adjoint(matrix, other, gradient)
    torch.testing.assert_close(one, other)
    codes = torch.empty(matrix.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(matrix.codes.shape)
    keep(matrix, codes.copy_(matrix.codes))
    check(matrix)


# ---- layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 24), nn.Linear(24, 12, bias=False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def results(model, x):
    """Outputs, and the gradients of inputs and parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@triton_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40), (2, 3, 40), (30, 40)], ids=str)
def test_layers_and_their_gradients(shape, dtype, monkeypatch):
    model = get_rps_model(Net().to(DEVICE), RPSConfig(mapping="codebook", bits=3, target_modules="all-linear"))
    model, x = model.to(dtype), torch.randn(shape, device=DEVICE).to(dtype)
    monkeypatch.setattr(codebook_mapping, "FASTER", [])
    expected = copy.deepcopy(model)
    find_bank(expected).array.choose = always(Made)
    expected = results(expected, x)
    done = []

    class Counted(TritonCodebooks):
        def make(self, matrix, psi):
            weight = super().make(matrix, psi)
            done.append("make" if weight is not None else "nothing")
            return weight

        def add_adjoint(self, matrix, into, gradient):
            added = super().add_adjoint(matrix, into, gradient)
            done.append("add_adjoint" if added else "nothing")
            return added

    monkeypatch.setattr(codebook_mapping, "FASTER", [Counted()])
    find_bank(model).array.choose = always(TritonCodebookProduct)
    for one, other in zip(results(model, x), expected, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < (1e-5 if dtype == torch.float32 else 3e-2)
    forward = ["make"] * 2 if x.numel() > 16 * 40 else []  # few tokens need no W
    assert done == [*forward, *["make", "add_adjoint"] * 2]
    assert not launch._failures


# ---- what is left to torch


def test_which_matrices_have_it():
    matrix = matrix_of(6, 40, 4)
    assert any(isinstance(product, TritonCodebookProduct) for product in products_of(matrix))
    assert can_serve(CodebookMatrix(Span(0, 70_000, 70_000), 4, 64, 2**33)), "more than 2^31 weights"
    assert not can_serve(CodebookMatrix(Span(0, 1, 2**24), 4, 2**24, 0)), "more columns than a grid has blocks for"
    assert not can_serve(CodebookMatrix(Span(0, 70_000, 70_000), 4, 2, 0)), "more codebooks than an int32 counts"
    assert not can_serve(CodebookMatrix(Span(0, 0, 8), 4, 8, 0))
    matrix.tile = 2
    assert not can_serve(matrix), "a code for several weights"


class Sharded(torch.Tensor):
    """As a DTensor, it has no memory of its own."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


@triton_runs
def test_what_kernels_can_not_read_is_left_to_torch():
    matrix, psi = matrix_of(6, 40, 4, device=DEVICE), psi_of(matrix_of(6, 40, 4), device=DEVICE)
    gradient = torch.randn(6, 40, device=DEVICE)
    assert FASTER.make(matrix, psi.double()) is None
    assert not FASTER.add_adjoint(matrix, psi.double(), gradient.double())
    assert FASTER.make(matrix, torch.stack([psi, psi], 1)[:, 0]) is None
    assert not FASTER.add_adjoint(matrix, psi, gradient[:, :39])
    product, x = TritonCodebookProduct(matrix), torch.randn(2, 40, device=DEVICE)
    product.linear(x, psi, torch.randn(6, device=DEVICE).double())  # by torch, which casts the bias
    with pytest.raises(RuntimeError):
        product.linear(x[:, 1:], psi, None)
    with pytest.raises(RuntimeError):
        product.linear(x, psi, torch.randn(5, device=DEVICE))
    good, wide = matrix.codes, torch.zeros(6, 2 * matrix.codes.shape[1], dtype=torch.uint8, device=DEVICE)
    nowhere = internals.empty_tensor_of(Sharded, good.shape, torch.uint8, good.device, requires_grad=False)
    for codes in (wide[:, ::2], good[:5], good.to("meta"), good.to(torch.int16), nowhere):
        keep(matrix, codes)
        assert FASTER.make(matrix, psi) is None
        assert not FASTER.add_adjoint(matrix, psi, gradient)
        assert few_tokens(matrix, x, psi, None, 2) is None
    assert not launch._failures


@triton_runs
def test_what_is_followed_is_left_to_torch():
    """Compilers, torch.func and forward-mode differentiation see no kernel; tangents are carried on."""
    matrix = matrix_of(6, 40, 4, device=DEVICE)
    psi, x, seen = psi_of(matrix, device=DEVICE), torch.randn(2, 40, device=DEVICE), []

    def look(x):
        seen.append((FASTER.make(matrix, psi) is None, FASTER.add_adjoint(matrix, psi, matrix.weight(psi)) is False))
        return x + 1

    torch.func.vmap(look)(x)
    product, tangent = TritonCodebookProduct(matrix), torch.randn_like(x)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        look(x)
        y = product.linear(torch.autograd.forward_ad.make_dual(x, tangent), psi, None)
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(found, tangent @ matrix.weight(psi).t())
    assert seen == [(True, True)] * 2
    assert triton_matrix.usable(x)
    usable = []
    torch.compile(lambda x: usable.append(triton_matrix.usable(x)) or x + 1, backend="eager")(x)
    assert usable == [False]


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_triton_torch_takes_over(caplog, monkeypatch, error):
    def import_module(name):
        raise error(f"no {name}")

    monkeypatch.setattr(triton_matrix, "INTERPRETED", True)
    monkeypatch.setattr(launch.importlib, "import_module", import_module)
    check_falls_back(caplog, warnings=1)


def test_the_environment_disables_it(caplog, monkeypatch):
    monkeypatch.setattr(triton_matrix, "INTERPRETED", True)
    monkeypatch.setenv(launch.DISABLE, "1")
    check_falls_back(caplog, warnings=0)


@triton_runs
def test_where_a_kernel_fails_torch_takes_over(caplog, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(launch.Launcher, "_launch", fails)
    check_falls_back(caplog, warnings=1)


def check_falls_back(caplog, warnings):
    matrix = matrix_of(6, 40, 4, device=DEVICE)
    psi, x = psi_of(matrix, device=DEVICE), torch.randn(2, 40, device=DEVICE)
    with caplog.at_level(logging.WARNING, "hf_rps"):
        for _ in range(2):
            y = TritonCodebookProduct(matrix).linear(x, psi, None)
            torch.testing.assert_close(y, x @ matrix.weight(psi).t())
            assert FASTER.make(matrix, psi) is None
            assert not FASTER.add_adjoint(matrix, psi, torch.randn(6, 40, device=DEVICE))
    assert len([record for record in caplog.records if launch.DISABLE in record.message]) == warnings


def test_on_a_cpu_triton_is_not_imported(monkeypatch):
    monkeypatch.setattr(triton_matrix, "INTERPRETED", False)
    monkeypatch.setattr(launch.importlib, "import_module", None)
    matrix, x = matrix_of(6, 40, 4), torch.randn(2, 40)
    psi = psi_of(matrix)
    assert not TritonCodebookProduct(matrix).fits(x)
    assert FASTER.make(matrix, psi) is None
    assert not FASTER.add_adjoint(matrix, psi, torch.randn(6, 40))
    assert not launch._failures
    assert codebook.FASTER is codebook_mapping.FASTER
