"""Numba's products with codebook matrices against the definition, alone, with many threads, and in forked children."""

import os
import sys
import threading

import pytest
import torch
from codebook_matrices import BEFORE, keep, lock_behind, matrix_of, psi_of, vectors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.codebook import BITS, CodebookMatrix, CodedMatrix
from hf_rps.products.autograd import linear_by_definition, shared_linear, shared_weight
from hf_rps.products.base import Made, choose, products_of
from hf_rps.products.numba import threads
from hf_rps.products.numba.loading import loaded
from hf_rps.products.numba.matrix import NumbaKernels
from hf_rps.products.numba.product import NumbaProduct

FASTER = NumbaKernels()


class Buffer:
    def __init__(self):
        self.sum = None

    def get(self, psi: Tensor) -> Tensor:
        self.sum = torch.zeros_like(psi) if self.sum is None else self.sum
        return self.sum


def check(matrix: CodedMatrix, tokens: int, with_bias: bool) -> None:
    """All three kernels."""
    psi, x = psi_of(matrix), torch.randn(tokens, matrix.cols)
    bias = torch.randn(matrix.rows) if with_bias else None
    weight = matrix.weight(psi)
    made = FASTER.make(matrix, psi)
    assert made is not None
    assert made.equal(weight)
    product = choose(products_of(matrix), x)
    assert isinstance(product, NumbaProduct if tokens <= loaded().FEW_TOKENS else Made)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product.linear(x, psi, bias).double(), expected, atol=1e-4, rtol=1e-4)
    into, gradient = torch.randn_like(psi), torch.randn_like(weight)
    expected = into.double()
    SharedMatrix.add_adjoint(matrix, expected, gradient.double())
    assert FASTER.add_adjoint(matrix, into, gradient)
    torch.testing.assert_close(into.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group", [None, 64, 24, 10, 3, 1])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_equal_the_definition(bits, group):
    for i, (rows, cols) in enumerate([(1, 1), (1, 16), (2, 7), (3, 64), (5, 129), (17, 200)]):
        check(matrix_of(rows, cols, bits, group), tokens=(1, 2, 5, 32)[i % 4], with_bias=bool(i % 2))


@given(
    st.integers(1, 9), st.integers(1, 150), st.sampled_from(BITS), st.integers(1, 160), st.integers(1, 34),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_kernels_equal_the_definition_anywhere(rows, cols, bits, group, tokens, with_bias, seed):
    check(matrix_of(rows, cols, bits, group, seed), tokens, with_bias)


@pytest.mark.parametrize("tile", [2, 3, 4, 8])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_of_vectors_equal_the_definition(bits, tile):
    for i, (rows, cols) in enumerate([(1, 1), (1, 16), (2, 7), (3, 64), (5, 129), (17, 200)]):
        check(vectors_of(rows, cols, bits, tile, (None, 8)[i % 2]), tokens=(1, 2, 5, 32)[i % 4], with_bias=bool(i % 2))


@given(
    st.integers(1, 9), st.integers(1, 150), st.sampled_from(BITS), st.integers(2, 9), st.integers(1, 40),
    st.integers(1, 34), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_kernels_of_vectors_equal_the_definition_anywhere(rows, cols, bits, tile, group, tokens, with_bias, seed):
    check(vectors_of(rows, cols, bits, tile, group, seed), tokens, with_bias)


def test_the_adjoint_of_vectors_is_the_same_each_time(monkeypatch):
    """Rows of all threads add to the same books."""
    monkeypatch.setattr(threads, "_LEAST", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    matrix, gradient = vectors_of(64, 48, 8, 4), torch.randn(64, 48)
    found = []
    for _ in range(20):
        found.append(torch.zeros(BEFORE + matrix.size))
        assert FASTER.add_adjoint(matrix, found[-1], gradient)
    expected = torch.zeros(BEFORE + matrix.size, dtype=torch.float64)
    SharedMatrix.add_adjoint(matrix, expected, gradient.double())
    torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.skipif(sys.platform != "linux", reason="the page behind the codes is locked by Linux's mprotect")
@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_read_beyond_the_last_codes(bits):
    """Here what comes after them is a page that nobody may read: the process would end."""
    matrix = matrix_of(32, 1024, bits)
    lock_behind(matrix)
    check(matrix, 2, with_bias=False)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 3, 20), (1, 1, 1, 20)])
def test_shapes_of_inputs(shape):
    matrix, x = matrix_of(6, 20, 4), torch.randn(shape)
    psi, bias = psi_of(matrix), torch.randn(6)
    y = NumbaProduct(matrix).linear(x, psi, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, matrix.weight(psi), bias))
    assert not y._is_view()


def test_what_is_not_contiguous():
    matrix = matrix_of(6, 20, 3, 8)
    psi, x, gradient = psi_of(matrix), torch.randn(20, 4).t(), torch.randn(20, 6).t()
    torch.testing.assert_close(NumbaProduct(matrix).linear(x, psi, None), x @ matrix.weight(psi).t())
    one, other = torch.zeros_like(psi), torch.zeros_like(psi)
    matrix.add_adjoint(one, gradient)
    SharedMatrix.add_adjoint(matrix, other, gradient)
    torch.testing.assert_close(one, other)
    wide = torch.zeros(6, 2 * matrix.codes.shape[1], dtype=torch.uint8)[:, ::2]
    keep(matrix, wide)
    assert FASTER.make(matrix, psi) is None
    assert matrix.make(psi).equal(matrix.weight(psi))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    matrix = matrix_of(6, 40, 4)
    psi, x, bias = psi_of(matrix, dtype), torch.randn(3, 40).to(dtype), torch.randn(6).to(dtype)
    y = NumbaProduct(matrix).linear(x, psi, bias)
    assert y.dtype == dtype
    expected = torch.nn.functional.linear(x.double(), matrix.weight(psi).double(), bias.double())
    torch.testing.assert_close(y, expected.to(dtype))
    assert FASTER.make(matrix, psi).equal(matrix.weight(psi))
    into, gradient = torch.randn_like(psi), torch.randn(6, 40)
    expected = into.double()
    SharedMatrix.add_adjoint(matrix, expected, gradient.double())
    assert FASTER.add_adjoint(matrix, into, gradient)
    torch.testing.assert_close(into, expected.to(dtype))


def test_what_is_left_to_torch():
    matrix = matrix_of(6, 40, 4)
    products = products_of(matrix)
    for x in (torch.randn(33, 40), torch.randn(2, 40).double(), torch.randn(2, 40, device="meta"), torch.randn(0, 40)):
        assert isinstance(choose(products, x), Made)
    psi = psi_of(matrix, torch.float64)
    assert FASTER.make(matrix, psi) is None
    assert not FASTER.add_adjoint(matrix, psi, torch.randn(6, 40).double())
    seen = []
    torch.compile(lambda x: seen.append(products[0].fits(x)) or x + 1, backend="eager")(torch.randn(2, 40))
    torch.func.vmap(lambda x: seen.append(products[0].fits(x)) or x)(torch.randn(2, 40))
    with torch.autograd.forward_ad.dual_level():
        seen.append(products[0].fits(torch.randn(2, 40)))
    assert not any(seen)
    assert seen


@pytest.mark.parametrize("tokens", [2, 40])
def test_gradients(tokens):
    matrix, buffer = matrix_of(12, 40, 3, 16), Buffer()
    psi, x, bias = psi_of(matrix).requires_grad_(), torch.randn(tokens, 40, requires_grad=True), torch.randn(12)
    bias.requires_grad_()
    y = shared_linear(x, psi, bias, choose(products_of(matrix), x), buffer)
    found = torch.autograd.grad(y.square().sum(), (x, bias))
    expected = torch.autograd.grad(linear_by_definition(x, psi, bias, matrix).square().sum(), (x, bias, psi))
    for one, other in zip((*found, buffer.sum), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_weight_made_whole_uses_the_kernels(monkeypatch):
    """Convolutions and to_dense make it; also the base and delta of an adapter."""
    matrix, buffer, made = matrix_of(12, 40, 4), Buffer(), []
    psi = psi_of(matrix).requires_grad_()
    make = loaded().make
    monkeypatch.setattr(loaded(), "make", lambda *args: made.append(1) or make(*args))
    weight = shared_weight(psi, matrix, buffer)
    assert made
    weight.square().sum().backward()
    (expected,) = torch.autograd.grad(matrix.weight(psi).square().sum(), psi)
    torch.testing.assert_close(buffer.sum, expected)
    base = torch.randn(12, 40)
    assert matrix.make(psi.detach(), base).equal(base + matrix.weight(psi))


def test_what_is_not_finite_is_kept():
    matrix = matrix_of(4, 64, 4)
    psi, x = psi_of(matrix), torch.randn(1, 64)
    x[0, 3] = torch.nan
    assert NumbaProduct(matrix).linear(x, psi, None).isnan().all()
    gradient, into = torch.ones(4, 64), torch.zeros_like(psi)
    gradient[2, 5], gradient[1, 7] = torch.inf, torch.nan
    matrix.add_adjoint(into, gradient)
    books = matrix.books(into)
    assert books.isinf().sum() == books.isnan().sum() == 1


@pytest.fixture
def shared(monkeypatch):
    """Small work is shared out, too; torch's threads are set back after the test."""
    monkeypatch.setattr(threads, "_LEAST", 1)
    before = torch.get_num_threads()
    yield matrix_of(37, 64, 4)
    torch.set_num_threads(before)


def all_three(matrix: CodebookMatrix, psi: Tensor, x: Tensor) -> list[Tensor]:
    into = torch.zeros_like(psi)
    matrix.add_adjoint(into, x.expand(matrix.rows, -1))
    return [NumbaProduct(matrix).linear(x, psi, None), matrix.make(psi), into]


def test_results_do_not_depend_on_threads(shared):
    psi, x = psi_of(shared), torch.randn(1, 64)
    results = []
    for number in (1, 2, 5, 3, 1):
        torch.set_num_threads(number)
        results.append(all_three(shared, psi, x))
    for result in results[1:]:
        assert all(one.equal(other) for one, other in zip(result, results[0], strict=True))


def test_several_callers_at_once(shared):
    psi, x, wrong = psi_of(shared), torch.randn(1, 64), []
    torch.set_num_threads(3)
    expected = all_three(shared, psi, x)

    def call():
        torch.set_num_threads(3)
        for _ in range(50):
            found = all_three(shared, psi, x)
            wrong.extend(1 for one, other in zip(found, expected, strict=True) if not one.equal(other))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child(shared):
    psi, x = psi_of(shared), torch.randn(1, 64)
    torch.set_num_threads(3)
    expected = all_three(shared, psi, x)
    child = os.fork()
    if child == 0:
        found = all_three(shared, psi, x)
        os._exit(0 if all(one.equal(other) for one, other in zip(found, expected, strict=True)) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_where_no_thread_can_be_had(shared, monkeypatch):
    def refuse(self, task):
        raise RuntimeError("can't start new thread")

    psi, x = psi_of(shared), torch.randn(1, 64)
    expected = all_three(shared, psi, x)
    torch.set_num_threads(3)
    monkeypatch.setattr(threads.ThreadPoolExecutor, "submit", refuse)
    assert all(one.equal(other) for one, other in zip(all_three(shared, psi, x), expected, strict=True))
