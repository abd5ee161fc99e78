"""RPSLinear: a linear layer (or GPT-2 Conv1D) whose weight is a slice of the bank's shared array."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_rps.bank import Bank
from hf_rps.functional import dense_weight, indexed_weight, rps_linear


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype that a matrix product on ``device`` runs in: autocast's where it is on, else ``default``."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return default


def takes_plain_path() -> bool:
    """True where the custom autograd node can't be used: under torch.compile, torch.export and torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class RPSLinear(nn.Module):
    """y = x W^T + b with W[r, c] = scale * sign(r) * psi[slot(r, c)], psi being the array of ``bank``.

    Args:
        name: The target's name in ``bank.weight_map``.
        bank: Owner of the shared array. Kept unregistered: psi must be saved and sharded once, at its owner.
        dense: The linear layer that this one replaces. Its bias is taken over; the module itself is kept, emptied of
            its parameters, so that :meth:`to_dense` can give back the very same kind of layer.
        transposed: True where ``dense`` stores its weight as (in, out), as Conv1D does.

    Input (..., in_features), output (..., out_features).
    """

    def __init__(self, name: str, bank: Bank, dense: nn.Module, transposed: bool = False):
        super().__init__()
        target = bank.weight_map.targets[bank.weight_map.index[name]]
        self.name, self.transposed = name, transposed
        self.in_features, self.out_features = target.in_features, target.out_features
        self.bias = dense.bias
        self.layout = bank.weight_map.layout(name) if bank.weight_map.is_view else None
        self.training = dense.training
        # an emptied copy, so that the dense module itself stays whole until the whole conversion has succeeded
        shell = nn.Module.__new__(type(dense))
        shell.__dict__ = dense.__dict__ | {"_parameters": dict.fromkeys(dense._parameters)}
        self.__dict__["_shell"] = shell
        self.__dict__["_bank"] = bank  # not through __setattr__, which would register it
        with torch.inference_mode(False):
            signs = torch.from_numpy(bank.weight_map.signs(name))
            self._factors = {torch.device("cpu"): signs.to(torch.float32) * bank.weight_map.scale(name)}
            # an index a weight, only for the mappings that have no views
            slots = None if self.layout is not None else torch.from_numpy(bank.weight_map.slots(name))
            self._slots = {} if slots is None else {torch.device("cpu"): slots}

    @property
    def bank(self) -> Bank:
        return self._bank

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.device, self.bank.psi.dtype)
        if x.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        if self.layout is None or takes_plain_path():
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x, self._materialise(x.device, dtype), bias)
        psi, buffer = self.bank.gated(x.device, dtype)
        return rps_linear(x, psi, self.layout, self.factor(x.device, psi.dtype).view(-1), self.bias, buffer)

    def factor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """scale * sign, (out_features, 1) or, with a sign an element, (out_features, in_features).

        Of float32, or float64 where ``dtype`` is: signs and scale must not be rounded to the compute dtype.
        """
        factor = _cached(self._factors, device)
        if dtype == torch.float64:
            factor = factor.sign().to(dtype) * self.bank.weight_map.scale(self.name)
        return factor

    def _materialise(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """W (out_features, in_features), differentiable in psi, by the plain path."""
        psi = self.bank.plain(device, dtype) if takes_plain_path() else self.bank.gated(device, dtype)[0]
        factor = self.factor(device, dtype)
        if self.layout is not None:
            return dense_weight(psi, self.layout, factor.view(-1))
        return indexed_weight(psi, _cached(self._slots, device), factor)

    def dense_weight(self) -> Tensor:
        """W as the dense layer stores it: (out_features, in_features), or transposed for Conv1D. Differentiable."""
        weight = self._materialise(self.bank.psi.device, self.bank.psi.dtype)
        return weight.t() if self.transposed else weight

    @property
    def weight(self) -> LazyWeight:
        """The weight for code that reads it directly; its numbers are made only when they are used."""
        return LazyWeight(self)

    def to_dense(self) -> nn.Module:
        """A layer of the replaced kind with the same weight, as an own parameter, and the same bias."""
        weight = self.dense_weight().detach()
        dense = self._shell
        dense.train(self.training)
        weight = nn.Parameter(weight.contiguous(), requires_grad=self.bank.psi.requires_grad)
        dense.register_parameter("weight", weight)
        dense.register_parameter("bias", self.bias)
        return dense

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key = prefix + "weight"
        if key in state_dict:
            if key in unexpected:
                unexpected.remove(key)
            shape = tuple(state_dict[key].shape)
            if shape != self.sentinel_shape():
                what = "another map of shared weights" if shape[:1] == (0,) else "a dense weight"
                errors.append(
                    f"{key} is {what} (shape {shape}), but this model is compressed with the map "
                    f"{self.bank.weight_map.fingerprint}. Load the checkpoint with from_pretrained instead."
                )

    def sentinel_shape(self) -> tuple[int, int]:
        """Shape of the empty tensor saved in place of the weight: no numbers, but it names the map.

        A reader that does not know RPS finds a size mismatch instead of silently initialising a dense weight, and a
        reader that does know it sees which map the checkpoint was made with, whichever way it was loaded.
        """
        return (0, int(self.bank.weight_map.fingerprint[:8], 16))

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "torch.nn.DataParallel can't replicate a model with shared weights (its layers read one bank). Start one "
            "process per GPU instead (accelerate launch, torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)."
        )


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
    """Stands for the weight of an :class:`RPSLinear` where a model reads ``layer.weight`` itself.

    Shape, dtype and device cost nothing. Any torch function or other tensor attribute materialises the weight
    (differentiably), so such a model is right, and as fast as its own use of dense weights allows.
    """

    def __init__(self, layer: RPSLinear):
        self._layer = layer

    dtype = property(lambda self: self._layer.bank.psi.dtype)
    device = property(lambda self: self._layer.bank.psi.device)
    requires_grad = property(lambda self: self._layer.bank.psi.requires_grad)
    ndim = 2

    @property
    def shape(self) -> torch.Size:
        rows, cols = self._layer.out_features, self._layer.in_features
        return torch.Size((cols, rows) if self._layer.transposed else (rows, cols))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        unwrap = torch.utils._pytree.tree_map_only
        args, kwargs = unwrap(cls, lambda w: w._layer.dense_weight(), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._layer.dense_weight(), name)

    def __repr__(self) -> str:
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _delegate(name: str):
    def operator(self, *args):
        args = [a._layer.dense_weight() if isinstance(a, LazyWeight) else a for a in args]
        return getattr(self._layer.dense_weight(), name)(*args)

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg", "getitem", "len"):
    setattr(LazyWeight, f"__{_name}__", _delegate(f"__{_name}__"))
