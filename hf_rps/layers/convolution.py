"""RPSConv: a convolution with a shared weight."""

from __future__ import annotations

from torch import Tensor, nn

from hf_rps.layers.base import RPSLayer
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

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        weight = self.as_stored(self.shared.materialise(x.device, dtype))
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._shell._conv_forward(cast_to_autocast(x, dtype), weight, bias)

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in _ATTRIBUTES]
        return ", ".join([*values, f"bias={self.bias is not None}", super().extra_repr()])
