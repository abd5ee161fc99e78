"""The layers of a compressed model: linear ones and convolutions whose weight is a slice of the bank's shared array."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_rps.bank import Bank
from hf_rps.weight import LazyWeight, SharedWeight, compute_dtype, refuse_data_parallel

# what model code reads from a convolution
_CONVOLUTION_ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class RPSLayer(nn.Module):
    """A layer with W[r, c] = scale * sign(r) * psi[slot(r, c)], psi being the array of ``bank``; a base class.

    Args:
        name: The target's name in ``bank.weight_map``.
        bank: Owner of the shared array. Kept unregistered: psi must be saved and sharded once, at its owner.
        dense: The layer that this one replaces. Its bias is taken over; the module itself is kept, emptied of its
            parameters, so that :meth:`to_dense` can give back the very same kind of layer.
    """

    weight_shape: tuple[int, ...]  # of the weight as the dense layer stores it

    def __init__(self, name: str, bank: Bank, dense: nn.Module):
        super().__init__()
        self.name = name
        self.bias = dense.bias
        self.training = dense.training
        # an emptied copy, so that the dense module itself stays whole until the whole conversion has succeeded
        shell = nn.Module.__new__(type(dense))
        shell.__dict__ = dense.__dict__ | {"_parameters": dict.fromkeys(dense._parameters)}
        self.__dict__["_shell"] = shell
        self.shared = SharedWeight(name, bank)

    @property
    def bank(self) -> Bank:
        return self.shared.array

    def dense_weight(self) -> Tensor:
        """W as the dense layer stores it, of ``weight_shape``. Differentiable."""
        return self.shared.dense().view(self.weight_shape)

    @property
    def weight(self) -> LazyWeight:
        """The weight for code that reads it directly; its numbers are made only when they are used."""
        return LazyWeight(self.dense_weight, self.weight_shape, like=self.bank.psi)

    def to_dense(self) -> nn.Module:
        """A layer of the replaced kind with the same weight, as an own parameter, and the same bias."""
        weight = self.dense_weight().detach()
        dense = self._shell
        dense.train(self.training)
        weight = nn.Parameter(weight.contiguous(), requires_grad=self.bank.psi.requires_grad)
        dense.register_parameter("weight", weight)
        dense.register_parameter("bias", self.bias)
        return dense

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key = prefix + "weight"
        if key in state_dict:
            if key in unexpected:
                unexpected.remove(key)
            shape = tuple(state_dict[key].shape)
            if shape != self.bank.weight_map.sentinel_shape():
                what = "another map of shared weights" if shape[:1] == (0,) else "a dense weight"
                errors.append(
                    f"{key} is {what} (shape {shape}), but this model is compressed with the map "
                    f"{self.bank.weight_map.fingerprint}. Load the checkpoint with from_pretrained instead."
                )

    def _replicate_for_data_parallel(self):
        refuse_data_parallel()


class RPSLinear(RPSLayer):
    """y = x W^T + b with a shared W: a linear layer (or GPT-2 Conv1D). The arguments are those of :class:`RPSLayer`.

    Args:
        transposed: True where ``dense`` stores its weight as (in, out), as Conv1D does.

    Input (..., in_features), output (..., out_features).
    """

    def __init__(self, name: str, bank: Bank, dense: nn.Module, transposed: bool = False):
        super().__init__(name, bank, dense)
        self.transposed = transposed
        self.in_features, self.out_features = self.shared.target.in_features, self.shared.target.out_features
        shape = (self.out_features, self.in_features)
        self.weight_shape = shape[::-1] if transposed else shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.linear(x, self.bias, compute_dtype(x.device, self.bank.psi.dtype))

    def dense_weight(self) -> Tensor:
        """W as the dense layer stores it: (out_features, in_features), or transposed for Conv1D. Differentiable."""
        return self.shared.dense().t() if self.transposed else super().dense_weight()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RPSConv(RPSLayer):
    """A convolution of one, two or three dimensions with a shared weight. The arguments are those of :class:`RPSLayer`.

    As a matrix the weight is (out_channels, in_channels / groups * kernel positions), row-major. It is made in every
    call, in the compute dtype, and torch's own convolution does the rest, in the backward pass too; see
    :func:`hf_rps.functional.rps_weight`.

    Input (..., in_channels, *size), output (..., out_channels, *size), as of ``dense``.
    """

    def __init__(self, name: str, bank: Bank, dense: nn.Module):
        super().__init__(name, bank, dense)
        self.weight_shape = (dense.out_channels, dense.in_channels // dense.groups, *dense.kernel_size)
        for attribute in _CONVOLUTION_ATTRIBUTES:
            setattr(self, attribute, getattr(dense, attribute))

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.device, self.bank.psi.dtype)
        if x.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        weight = self.shared.materialise(x.device, dtype).view(self.weight_shape)
        return self._shell._conv_forward(x, weight, None if self.bias is None else self.bias.to(dtype))

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in _CONVOLUTION_ATTRIBUTES]
        return ", ".join([*values, f"bias={self.bias is not None}"])
