"""SharedWeight: one weight matrix as a slice of a shared array, and the products with it; LazyWeight, its stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps import kernels
from hf_rps.functional import dense_weight, indexed_weight, rps_linear, rps_weight
from hf_rps.shared_array import SharedArray, signed_scale


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype that a matrix product on ``device`` runs in: autocast's where it is on, else ``default``."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return default


def takes_plain_path() -> bool:
    """True where the custom autograd node can't be used: under torch.compile, torch.export and torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def refuse_data_parallel() -> NoReturn:
    """Raise where torch.nn.DataParallel asks a layer for a replica."""
    raise RuntimeError(
        "torch.nn.DataParallel can't replicate a model with shared weights (its layers read one bank). Start one "
        "process per GPU instead (accelerate launch, torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)."
    )


class SharedWeight:
    """W[r, c] = scale * sign(r) * psi[slot(r, c)], of shape (out_features, in_features), psi being that of ``array``.

    Not a module: psi must be saved and sharded once, at its owner.

    Args:
        name: The target's name in ``array.weight_map``.
        array: The shared array.
    """

    def __init__(self, name: str, array: SharedArray):
        self.name, self.array = name, array
        weight_map = array.weight_map
        self.target = weight_map.targets[weight_map.index[name]]
        self.layout = weight_map.layout(name) if weight_map.is_view else None
        # among the weights that the array makes once a pass, if it does
        self._position = weight_map.flat_targets.index(self.target) if weight_map.unfolds else None
        with torch.inference_mode(False):
            self._factors = {torch.device("cpu"): signed_scale(weight_map, name, torch.float32)}
            # an index a weight, only for the mappings that have no views
            slots = None if self.layout is not None else torch.from_numpy(weight_map.slots(name))
            self._slots = {} if slots is None else {torch.device("cpu"): slots}

    @property
    def is_view(self) -> bool:
        """True where products read views of psi, rather than a weight that was made for them."""
        return self.layout is not None and self._position is None

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x W^T + bias: (..., out_features), computed in ``dtype``.

        x (..., in_features) is of that dtype, or is cast to it where autocast is on.
        """
        if x.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        if self.is_view and not takes_plain_path():
            psi, buffer = self.array.gated(x.device, dtype)
            return rps_linear(x, psi, self.layout, self.factor(x.device, psi.dtype).view(-1), bias, buffer)
        if self.is_view and self._can_trace_views(x):
            psi = self.array.plain(x.device, dtype)
            return kernels.traced_linear(x, psi, bias, self.factor(x.device, dtype).view(-1), self.layout)
        return F.linear(x, self.materialise(x.device, dtype), None if bias is None else bias.to(dtype))

    def _can_trace_views(self, x: Tensor) -> bool:
        """True for inference under a compiler. Gradients through views would each be an array of the size of psi."""
        inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return inference and not kernels.makes_weight(x, self.layout)

    def factor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """scale * sign, (out_features, 1) or, with a sign an element, (out_features, in_features).

        Of float32, or float64 where ``dtype`` is: signs and scale must not be rounded to the compute dtype.
        """
        factor = _cached(self._factors, device)
        if dtype == torch.float64:
            factor = factor.sign().to(dtype) * self.array.weight_map.scale(self.name)
        return factor

    def materialise(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """W (out_features, in_features) on ``device`` in ``dtype``, made whole; differentiable in psi."""
        plain = takes_plain_path()
        if self._position is not None and not plain:
            return self.array.gated(device, dtype)[0][self._position]
        factor = self.factor(device, dtype)
        psi, buffer = (self.array.plain(device, dtype), None) if plain else self.array.gated(device, dtype)
        if self.layout is None:
            return indexed_weight(psi, _cached(self._slots, device), factor)
        if plain:
            return dense_weight(psi, self.layout, factor.view(-1))
        return rps_weight(psi, self.layout, factor.view(-1), buffer)

    def dense(self) -> Tensor:
        """W where psi is and in its dtype."""
        return self.materialise(self.array.psi.device, self.array.psi.dtype)


def _cached(cache: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    """The cached tensor on ``device``, copied there from the CPU once. Nothing is kept while a compiler traces."""
    if device in cache:
        return cache[device]
    if torch.compiler.is_compiling():
        return cache[torch.device("cpu")].to(device)
    with torch.inference_mode(False):  # an inference tensor would break training later
        cache[device] = cache[torch.device("cpu")].to(device)
    return cache[device]


class LazyWeight:
    """Stands for the weight of a layer where a model reads ``layer.weight`` itself.

    Shape, dtype and device cost nothing. Any torch function or other tensor attribute materialises the weight
    (differentiably), so such a model is right, and as fast as its own use of dense weights allows.

    Args:
        make: Makes the weight.
        shape: Its shape.
        like: A tensor of its dtype, device and requires_grad: the shared array.
    """

    _is_hf_initialized = True  # transformers' initialisers would make it and throw away what they drew

    def __init__(self, make: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor):
        self._make = make
        self.shape = torch.Size(shape)
        self.dtype, self.device, self.requires_grad = like.dtype, like.device, like.requires_grad

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        unwrap = torch.utils._pytree.tree_map_only
        args, kwargs = unwrap(cls, lambda w: w._make(), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._make(), name)

    def __repr__(self) -> str:
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _delegate(name: str):
    def operator(self, *args):
        args = [a._make() if isinstance(a, LazyWeight) else a for a in args]
        return getattr(self._make(), name)(*args)

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg", "getitem", "len"):
    setattr(LazyWeight, f"__{_name}__", _delegate(f"__{_name}__"))
