"""One weight of the shared array in use: how a layer multiplies with it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.products.autograd import (
    linear_by_definition,
    rows_by_definition,
    shared_linear,
    shared_rows,
    shared_weight,
)
from hf_rps.products.base import products_of
from hf_rps.psi.array import Source


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x runs in: autocast's where it is on, else that of x.

    Float64 stays what it is: torch's autocast leaves it alone.

    Raises:
        RuntimeError: x is not floating, which a product with dense weights refuses, too.
    """
    dtype = x.dtype
    if not dtype.is_floating_point:  # the weights would be rounded to integers
        raise RuntimeError(
            f"a layer with shared weights was given an input of dtype {dtype}; its weights are floating, so cast the "
            f"input (x.to(layer.weight.dtype))"
        )
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def cast_to_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype`` where autocast is on; elsewhere a layer takes its input as it is."""
    return x.to(dtype) if x.dtype != dtype and torch.is_autocast_enabled(x.device.type) else x


def takes_plain_path() -> bool:
    """True where custom autograd nodes can't be used: in torch.compile, torch.export, torch.func and torch.jit.trace.

    Raises:
        RuntimeError: Under the ONNX exporter that is made of torch.jit.trace, which writes every weight out in full, or
            fails at what makes it.
    """
    return torch.compiler.is_compiling() or internals.is_transformed() or _is_traced()


def _is_traced() -> bool:
    if not torch.jit.is_tracing():
        return False
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "the TorchScript exporter (torch.onnx.export(..., dynamo=False)) can't export a compressed model: it would "
            "write every weight out in full. Pass dynamo=True (it needs the package onnxscript), or export "
            "hf_rps.to_dense(model)"
        )
    return True


class SharedWeight:
    """W (out_features, in_features), a target of the map of ``owner``.

    Not a module: psi must be saved and sharded once, at its owner.

    Args:
        name: The target's name in the map.
        owner: Where psi is found, unless another array stands in for it.
    """

    def __init__(self, name: str, owner: Source):
        self.name, self.owner = name, owner
        self.target = owner.array.weight_map.target(name)
        self.matrix = owner.array.matrices[name]
        self.products = products_of(self.matrix)

    @property
    def source(self) -> Source:
        """Where psi is found now."""
        return self.owner.in_use

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x W^T + bias: (..., out_features), computed in ``dtype``.

        x (..., in_features) is of that dtype, or is cast to it where autocast is on.
        """
        source = self.source
        choose = source.array.choose
        if not takes_plain_path():
            product = choose(self.products, x)
            if product.input_fold is None:
                x = cast_to_autocast(x, dtype)
            else:
                x = source.array.passes.folded(x, product.input_fold, dtype)
            psi, buffer = source.read(x.device, dtype)
            return shared_linear(x, psi, bias, product, buffer)
        x = cast_to_autocast(x, dtype)
        psi = self._plain_psi(x.device, dtype)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return choose(self.products, x).traced(x, psi, None if bias is None else bias.to(dtype))
        # not what the product reads: the gradient of every view of psi would be an array of the size of psi
        return linear_by_definition(x, psi, bias, self.matrix)

    def added_linear(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """x (base + W)^T + bias, for a constant base (out_features, in_features) in whose dtype the sum is built."""
        source = self.source
        psi, buffer = source.read(x.device, base.dtype)
        return shared_linear(x, psi, bias, source.array.choose(self.products, x), buffer, base)

    def materialise_narrow(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Z (rows, cols / c) of a weight whose input is folded, likewise."""
        if takes_plain_path():
            return self.matrix.inner.weight(self._plain_psi(device, dtype))
        psi, buffer = self.source.read(device, dtype)
        return shared_weight(psi, self.matrix.inner, buffer)

    def materialise(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """W (out_features, in_features) on ``device`` in ``dtype``, made whole; differentiable in psi."""
        if takes_plain_path():
            return self.matrix.weight(self._plain_psi(device, dtype))
        psi, buffer = self.source.read(device, dtype)
        return shared_weight(psi, self.matrix, buffer)

    def look_up(self, ids: Tensor, dtype: torch.dtype, padding: int | None = None) -> Tensor:
        """W[ids] in ``dtype``, (..., in_features); the gradient of row ``padding`` is dropped.

        Raises:
            IndexError: An id is no row.
        """
        if takes_plain_path():
            return rows_by_definition(ids, self._plain_psi(ids.device, dtype), self.matrix, padding)
        psi, buffer = self.source.read(ids.device, dtype)
        return shared_rows(ids, psi, self.matrix, buffer, padding)

    def _plain_psi(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """psi (m,) for the plain path.

        Raises:
            RuntimeError: torch.jit.trace records a pass that is to be trained. It would lose the divisor of psi's
                gradient, without a word.
        """
        source = self.source
        psi = source.psi
        if not torch.compiler.is_compiling() and torch.jit.is_tracing():
            if torch.is_grad_enabled() and psi.requires_grad:
                raise RuntimeError(
                    "torch.jit.trace records a compressed model for inference only: trace it under torch.no_grad(). "
                    "To train it faster, use torch.compile"
                )
            psi = psi.detach()  # so that the traced module gives it no gradient either
        return source.array.plain(psi, device, dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W where psi is, in ``dtype`` or else in that of psi."""
        psi = self.source.psi
        return self.materialise(psi.device, dtype or psi.dtype)
