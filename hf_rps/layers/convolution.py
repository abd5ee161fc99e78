"""RPSConv: a convolution with a shared weight."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_rps.layers.base import RPSLayer
from hf_rps.mappings.input_fold import FoldedMatrix
from hf_rps.psi.bank import Bank
from hf_rps.psi.weight import cast_to_autocast, compute_dtype

# what model code reads from a convolution
_ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class RPSConv(RPSLayer):
    """A convolution of one, two or three dimensions with a shared weight. The arguments are those of :class:`RPSLayer`.

    As a matrix the weight is (out_channels, in_channels / groups * kernel positions), row-major. It is made in every
    call, in the input's dtype, and torch's own convolution does the rest, in the backward pass too; see
    :func:`hf_rps.products.autograd.shared_weight`.

    Input (..., in_channels, *size), output (..., out_channels, *size), as of ``dense`` and of the input's dtype
    (autocast's where it is on).
    """

    def __init__(self, name: str, bank: Bank, dense: nn.Module, parameter: str = "weight"):
        super().__init__(name, bank, dense, parameter)
        self.weight_shape = (dense.out_channels, dense.in_channels // dense.groups, *dense.kernel_size)
        for attribute in _ATTRIBUTES:
            setattr(self, attribute, getattr(dense, attribute))
        if isinstance(self.shared.matrix, FoldedMatrix) and dense.groups == 1:
            # a convolution of the folded channels, in which each block of rows is a group
            self.__dict__["_narrow_shell"] = copy.copy(self._shell)
            self._narrow_shell.groups = self.shared.matrix.blocks

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        if "_narrow_shell" in self.__dict__:
            return self._folded(cast_to_autocast(x, dtype), dtype)
        weight = self.as_stored(self.shared.materialise(x.device, dtype))
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._shell._conv_forward(cast_to_autocast(x, dtype), weight, bias)

    def _folded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The convolution with folded channels: no weight of the dense size is made."""
        matrix, fold = self.shared.matrix, self.shared.matrix.input_fold
        batched = x if x.dim() == len(self.kernel_size) + 2 else x[None]
        weight = self.shared.materialise_narrow(x.device, dtype)  # (rows, narrow columns)
        missing = matrix.blocks * matrix.block_rows - matrix.rows
        weight = F.pad(weight, (0, 0, 0, missing)) if missing else weight  # groups are of one size
        weight = weight.view(-1, fold.width, *self.kernel_size)
        channels = fold.fold_channels(batched)[:, : matrix.blocks * fold.width]
        y = self._narrow_shell._conv_forward(channels, weight, None)[:, : matrix.rows]
        if self.bias is not None:
            y = y + self.bias.to(dtype).view(-1, *[1] * len(self.kernel_size))
        elif missing:
            y = y.contiguous()  # what a model writes to must be no view
        return y if batched is x else y[0]

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in _ATTRIBUTES]
        return ", ".join([*values, f"bias={self.bias is not None}", super().extra_repr()])
