"""What all layers of a compressed model have in common: a weight that is a target of the bank's map."""

from __future__ import annotations

import copy
from typing import NoReturn

from torch import Tensor, nn

from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.psi.bank import Bank
from hf_rps.psi.weight import SharedWeight


def refuse_data_parallel() -> NoReturn:
    """Raise where torch.nn.DataParallel asks a layer for a replica."""
    raise RuntimeError(
        "torch.nn.DataParallel can't replicate a model with shared weights (its layers read one bank). Start one "
        "process per GPU instead (accelerate launch, torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)."
    )


class RPSLayer(nn.Module):
    """A layer whose weight is a slice of the shared array of ``bank``; a base class.

    Args:
        name: The target's name in ``bank.weight_map``.
        bank: Owner of the shared array. Kept unregistered: psi must be saved and sharded once, at its owner.
        dense: The layer that this one replaces. Its bias is taken over; the module itself is kept, emptied of its
            parameters, so that :meth:`to_dense` can give back the very same kind of layer.
        parameter: Name of the parameter of ``dense`` that is shared.
    """

    weight_shape: tuple[int, ...]  # of the weight as the dense layer stores it

    def __init__(self, name: str, bank: Bank, dense: nn.Module, parameter: str = "weight"):
        super().__init__()
        self.name, self.parameter = name, parameter
        self.bias = getattr(dense, "bias", None)
        self.training = dense.training
        # an emptied copy, so that the dense module itself stays whole until the whole conversion has succeeded
        shell = copy.copy(dense)
        shell._parameters = dict.fromkeys(dense._parameters)
        self.__dict__["_shell"] = shell
        self.shared = SharedWeight(name, bank)

    @property
    def bank(self) -> Bank:
        return self.shared.source

    def as_stored(self, weight: Tensor) -> Tensor:
        """The matrix W (out_features, in_features) in the form in which the dense layer stores it."""
        return weight.view(self.weight_shape)

    def dense_weight(self) -> Tensor:
        """W as the dense layer stores it, of ``weight_shape``. Differentiable."""
        return self.as_stored(self.shared.dense())

    @property
    def weight(self) -> Tensor:
        """The weight for code that reads it directly; its numbers are made only when they are used."""
        return WeightStandIn.of(self.dense_weight, self.weight_shape, like=self.bank.psi)

    @weight.setter
    def weight(self, value) -> None:
        raise AttributeError(
            f"the weight of {self.name!r} is made from a shared array and can't be replaced; change the array (its "
            f"bank's psi), or call hf_rps.to_dense(model) first"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            type(self).weight.fset(self, param)  # raises
        super().register_parameter(name, param)

    def to_dense(self) -> nn.Module:
        """A layer of the replaced kind with the same weight, in memory of its own, and the same bias."""
        weight = self.dense_weight().detach().contiguous()
        dense = copy.copy(self._shell)
        dense._parameters = dict(self._shell._parameters)
        dense.train(self.training)
        dense.register_parameter(self.parameter, nn.Parameter(weight, requires_grad=self.bank.psi.requires_grad))
        if "bias" in dense._parameters:
            dense.register_parameter("bias", self.bias)
        return dense

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key = prefix + self.parameter
        if key in state_dict:
            if key in unexpected:
                unexpected.remove(key)
            shape = tuple(state_dict[key].shape)
            if shape == self.bank.weight_map.sentinel_shape():
                self.bank.see_sentinel(errors)
            else:
                what = "another map of shared weights" if shape[:1] == (0,) else "a dense weight"
                errors.append(
                    f"{key} is {what} (shape {shape}), but this model is compressed with the map "
                    f"{self.bank.weight_map.fingerprint}. Load the checkpoint with from_pretrained instead."
                )

    def _replicate_for_data_parallel(self):
        refuse_data_parallel()

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this layer keeps beside psi and its bias."""
        kept = self.shared.matrix.kept_tensors()
        return kept + [tensor for product in self.shared.products for tensor in product.kept_tensors()]
