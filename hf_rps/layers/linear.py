"""RPSLinear: a linear layer with a shared weight."""

from __future__ import annotations

from torch import Tensor, nn

from hf_rps.layers.base import RPSLayer
from hf_rps.psi.bank import Bank
from hf_rps.psi.weight import compute_dtype


class RPSLinear(RPSLayer):
    """y = x W^T + b with a shared W. The arguments are those of :class:`RPSLayer`.

    Input (..., in_features), output (..., out_features), of the input's dtype (autocast's where it is on).
    """

    def __init__(self, name: str, bank: Bank, dense: nn.Module, parameter: str = "weight"):
        super().__init__(name, bank, dense, parameter)
        self.in_features, self.out_features = self.shared.target.in_features, self.shared.target.out_features
        self.weight_shape = (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.linear(x, self.bias, compute_dtype(x))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {super().extra_repr()}"


class RPSTransposedLinear(RPSLinear):
    """The same for a dense layer that stores its weight as (in_features, out_features), as GPT-2's Conv1D does."""

    def __init__(self, name: str, bank: Bank, dense: nn.Module, parameter: str = "weight"):
        super().__init__(name, bank, dense, parameter)
        self.weight_shape = (self.in_features, self.out_features)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.t()
