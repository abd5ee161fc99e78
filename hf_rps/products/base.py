"""Products of inputs with shared matrices, without autograd: one class per way and device, chosen in one place.

A product belongs to one matrix. Which classes there are is the table :data:`PRODUCTS`; for each call :func:`choose`
takes the first that fits the input, and :class:`Made` fits every input and every matrix. A new device's or a new
kernel's product is one class and one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.input_fold import InputFold


class Product(ABC):
    """y = x W^T + b and its gradients for one shared matrix W (rows, cols), read from psi (m,).

    Attributes:
        input_fold: What is done to x before, once for all layers that read it; x is then (..., blocks, cols / c), and
            so is what :meth:`gradients` gives back for it. None: the product reads x itself.
    """

    input_fold: InputFold | None = None

    def __init__(self, matrix: SharedMatrix):
        self.matrix = matrix

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        """True where this kind of product can be had for ``matrix`` at all."""
        return True

    @abstractmethod
    def fits(self, x: Tensor) -> bool:
        """True where this product is the one to take for x (..., cols): by device, dtype and number of tokens."""

    @abstractmethod
    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., cols) W^T + bias (rows,): (..., rows), a new tensor and not a view of one; psi is of x's dtype."""

    def tokens(self, x: Tensor) -> Tensor:
        """x (..., cols) as (tokens, cols)."""
        return x if x.dim() == 2 else x.reshape(-1, x.size(-1))

    def by_definition(self, x: Tensor, psi: Tensor) -> Tensor:
        """x W^T by operations that autograd can follow twice."""
        return self.matrix.linear(x, psi)

    @abstractmethod
    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        """From gy (tokens, rows) and x (tokens, cols): ``into`` (m,) += R^T (gy^T x), unless it is None.

        Returns:
            gy W (tokens, cols), or None where ``needs_x`` is False.
        """

    def traced(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`linear` for inference under a compiler, by operations that it can follow and fuse."""
        return F.linear(x, self.matrix.weight(psi), bias)

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this object keeps beside its matrix's, on every device where they were used."""
        return []


class Made(Product):
    """W made for the time of one product and dropped after it; made again in the backward pass.

    Args:
        matrix: W.
        base: (rows, cols), constant; then the product is with base + W. Their sum is built in base's dtype, and the
            products run in that of x.
    """

    def __init__(self, matrix: SharedMatrix, base: Tensor | None = None):
        super().__init__(matrix)
        self.base = base

    def by_definition(self, x: Tensor, psi: Tensor) -> Tensor:
        if self.base is None:
            return super().by_definition(x, psi)
        return F.linear(x, (self.base + self.matrix.weight(psi)).to(x.dtype))

    def fits(self, x: Tensor) -> bool:
        return True

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.matrix.make(psi, self.base).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if x.dim() <= 2:
            return F.linear(x, weight, bias)
        # F.linear's output would be a view, and models that write to it (y += ...) refused by autograd
        y = F.linear(x.reshape(-1, x.size(-1)), weight, bias)  # (tokens, rows)
        return internals.reshaped(y, (*x.shape[:-1], weight.size(0)))

    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        gx = gy @ self.matrix.make(psi, self.base).to(gy.dtype) if needs_x else None  # (tokens, cols)
        if into is not None:
            self.matrix.add_adjoint(into, gy.t() @ x)
        return gx


class FewTokens(Product):
    """A product with a kernel of its own for few tokens; a base class. All else is as :class:`Made` has it.

    So is the backward pass: making W and adding up its gradient are the matrix's own.
    """

    def __init__(self, matrix: SharedMatrix):
        super().__init__(matrix)
        self._made = Made(matrix)

    def gradients(self, gy: Tensor, x: Tensor, psi: Tensor, needs_x: bool, into: Tensor | None) -> Tensor | None:
        return self._made.gradients(gy, x, psi, needs_x, into)


PRODUCTS: list[type[Product]] = []  # in order of preference; Made comes last, unasked

Choice: TypeAlias = Callable[[Sequence[Product], Tensor], Product]  # of a product for an input


def register(product: type[Product]) -> type[Product]:
    """Put a product before those there are; a class decorator. It serves matrices made from now on."""
    if product not in PRODUCTS:
        PRODUCTS.insert(0, product)
    return product


def products_of(matrix: SharedMatrix) -> tuple[Product, ...]:
    """All products that can be had for ``matrix``, in order of preference."""
    return (*(product(matrix) for product in PRODUCTS if product.accepts(matrix)), Made(matrix))


def choose(products: Sequence[Product], x: Tensor) -> Product:
    """The first of ``products`` that fits x."""
    for product in products:  # asked on every call: a generator would double its cost
        if product.fits(x):
            return product
    raise ValueError(f"no product fits an input of shape {tuple(x.shape)}, which Made always does; is it missing?")


def _named(kind: type[Product], products: Sequence[Product], x: Tensor) -> Product:
    return next((product for product in products if type(product) is kind), products[-1])


def always(kind: type[Product]) -> Choice:
    """A choice that takes ``kind`` wherever a matrix has it, whatever the input: for tests and benchmarks."""
    return partial(_named, kind)
