"""RPSLinear: a linear layer (or GPT-2 Conv1D) whose weight is a slice of the bank's shared array."""

from __future__ import annotations

from torch import Tensor, nn

from hf_rps.bank import Bank
from hf_rps.weight import LazyWeight, SharedWeight, compute_dtype, refuse_data_parallel


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
        shared = SharedWeight(name, bank)
        self.name, self.transposed = name, transposed
        self.in_features, self.out_features = shared.target.in_features, shared.target.out_features
        self.bias = dense.bias
        self.training = dense.training
        # an emptied copy, so that the dense module itself stays whole until the whole conversion has succeeded
        shell = nn.Module.__new__(type(dense))
        shell.__dict__ = dense.__dict__ | {"_parameters": dict.fromkeys(dense._parameters)}
        self.__dict__["_shell"] = shell
        self.shared = shared

    @property
    def bank(self) -> Bank:
        return self.shared.array

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.linear(x, self.bias, compute_dtype(x.device, self.bank.psi.dtype))

    def dense_weight(self) -> Tensor:
        """W as the dense layer stores it: (out_features, in_features), or transposed for Conv1D. Differentiable."""
        weight = self.shared.dense()
        return weight.t() if self.transposed else weight

    @property
    def weight(self) -> LazyWeight:
        """The weight for code that reads it directly; its numbers are made only when they are used."""
        shape = (self.out_features, self.in_features)
        return LazyWeight(self.dense_weight, shape[::-1] if self.transposed else shape, like=self.bank.psi)

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
            if shape != self.bank.weight_map.sentinel_shape():
                what = "another map of shared weights" if shape[:1] == (0,) else "a dense weight"
                errors.append(
                    f"{key} is {what} (shape {shape}), but this model is compressed with the map "
                    f"{self.bank.weight_map.fingerprint}. Load the checkpoint with from_pretrained instead."
                )

    def _replicate_for_data_parallel(self):
        refuse_data_parallel()
