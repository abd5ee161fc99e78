"""What all layers of a compressed model have in common: a weight that is a target of the bank's map."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from hf_rps.layers.initialisers import is_initialiser
from hf_rps.layers.stand_in import FREEZE_REMEDY, WeightStandIn
from hf_rps.names import stored_name
from hf_rps.psi.bank import Bank
from hf_rps.psi.weight import SharedWeight


def refuse_data_parallel() -> NoReturn:
    """Raise where torch.nn.DataParallel asks a layer for a replica."""
    raise RuntimeError(
        "torch.nn.DataParallel can't replicate a model with shared weights (its layers read one bank). Start one "
        "process per GPU instead (accelerate launch, torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)."
    )


def _refuse(what: str, name: str) -> NoReturn:
    """Raise where something needs a parameter in the place of the shared weight of the layer ``name``."""
    raise RuntimeError(
        f"{what} the weight of {name!r}: it is made from a shared array and is no parameter. Call "
        f"hf_rps.to_dense(model) first, which makes it one"
    )


class OwnParameters(dict):
    """``_parameters`` of a layer, among which the shared weight is not: who takes it for one of them gets a message.

    torch's old weight_norm deletes it from here, spectral_norm reads it here.
    """

    def __init__(self, layer: str, shared: str):
        super().__init__()
        self.layer, self.shared = layer, shared

    def __missing__(self, key: str) -> NoReturn:
        if key == self.shared:
            _refuse("can't reparametrise", self.layer)
        raise KeyError(key)

    def __delitem__(self, key: str) -> None:
        if key == self.shared and key not in self:
            _refuse("can't reparametrise", self.layer)
        super().__delitem__(key)


class FrozenParameter(nn.Parameter):
    """A parameter of integers. ``model.requires_grad_(True)`` means the others, and does not fail at it."""

    def __new__(cls, data: Tensor, requires_grad: bool = False):
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        return self


class RPSLayer(nn.Module):
    """A layer whose weight is a slice of the shared array of ``bank``; a base class.

    Args:
        name: The target's name in ``bank.weight_map``.
        bank: Owner of the shared array. Kept unregistered: psi must be saved and sharded once, at its owner.
        dense: The layer that this one replaces. Its bias is taken over; the module itself is kept, emptied of its
            parameters, so that :meth:`to_dense` can give back the very same kind of layer.
        parameter: Name of the parameter of ``dense`` that is shared.

    Attributes:
        watched: Whether the parameters around this layer were trainable when it was put in place; that they are frozen
            is noticed then (:mod:`hf_rps.freezing`).
        stored_names: Of the parameters that hold what a learned map has stored.
        stays_trained: Whether :meth:`requires_grad_` has said that the weight is trained whatever is frozen around it.
        own_name: Of a layer that reads the target of another one (:mod:`hf_rps.tied`), what it is called itself, as
            targets are; None for all others.
    """

    weight_shape: tuple[int, ...]  # of the weight as the dense layer stores it
    watched = stays_trained = False
    stored_names: tuple[str, ...] = ()
    own_name: str | None = None

    def __init__(self, name: str, bank: Bank, dense: nn.Module, parameter: str = "weight"):
        super().__init__()
        self.name, self.parameter = name, parameter
        self.__dict__["_parameters"] = OwnParameters(name, parameter)
        self.bias = getattr(dense, "bias", None)
        self.training = dense.training
        # an emptied copy, so that the dense module itself stays whole until the whole conversion has succeeded
        shell = copy.copy(dense)
        shell._parameters = dict.fromkeys(dense._parameters)
        self.__dict__["_shell"] = shell
        self.shared = SharedWeight(name, bank)
        self._register_stored()
        self._weight_dtype = bank.array.weight_dtypes[name] = getattr(dense, parameter).dtype

    def _register_stored(self) -> None:
        """Hold what a learned map has stored of this layer's weight: as frozen parameters, which are placed, sharded
        and saved with the layer, and not in the bank, which may be on another device. Of a target that several layers
        read the first one holds them."""
        if self.name in self.bank.array.weight_dtypes:
            return
        matrix, fingerprint = self.shared.matrix, self.bank.weight_map.fingerprint
        keys = {name: stored_name(name, fingerprint) for name in matrix.stored()}
        for name, tensor in matrix.stored().items():
            self.register_parameter(keys[name], FrozenParameter(tensor))
        if keys:
            self.stored_names = tuple(keys.values())
            matrix.keep_in(self._parameters, keys)

    @property
    def bank(self) -> Bank:
        return self.shared.owner

    def as_stored(self, weight: Tensor) -> Tensor:
        """The matrix W (out_features, in_features) in the form in which the dense layer stores it."""
        return weight.view(self.weight_shape)

    def dense_weight(self) -> Tensor:
        """W as the dense layer stores it, of ``weight_shape`` and ``weight_dtype``. Differentiable."""
        return self.as_stored(self.shared.dense(self.weight_dtype))

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the dense weight has: psi's, or a narrower one where psi serves wider weights, too.

        Casts of the model or of this layer change it as they would change the dense weight's. The forward pass does
        not ask for it: it computes in the dtype of its input.
        """
        own, psi, settled = self._weight_dtype, self.bank.psi.dtype, self.bank.array.dtype
        if own == psi:
            return own
        # where psi was cast by itself, as FSDP and p.data = ... do with all parameters, weights as wide as it follow
        followed = psi != settled and own == settled
        return psi if followed or torch.promote_types(own, psi) != psi else own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Also let ``fn``, which moves or casts the parameters, say what becomes of the weight, which is none of them.

        Torch calls it for this layer before or after it does for the bank, or (a cast of a part) for this layer alone.
        """
        super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self._weight_dtype, device="cpu")).dtype
        if dtype != self._weight_dtype:
            self._weight_dtype = self.bank.array.weight_dtypes[self.name] = dtype
            self.bank.fit_dtype()
        return self

    @property
    def weight(self) -> Tensor:
        """The weight for code that reads it directly; its numbers are made only when they are used."""
        return WeightStandIn.of(
            self.dense_weight, self.weight_shape, like=self.shared.source.psi, dtype=self.weight_dtype
        )

    @weight.setter
    def weight(self, value) -> None:
        raise AttributeError(
            f"the weight of {self.name!r} is made from a shared array and can't be replaced; change the array (its "
            f"bank's psi), or call hf_rps.to_dense(model) first"
        )

    @weight.deleter
    def weight(self) -> None:
        _refuse("can't delete", self.name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            type(self).weight.fset(self, param)  # raises
        if name == f"{self.parameter}_orig":  # of torch.nn.utils.prune
            _refuse("can't reparametrise or prune", self.name)
        super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True) -> RPSLayer:
        """Freeze or unfreeze the bias. The weight follows psi, so it must be trained, or frozen, already.

        Raises:
            RuntimeError: psi is trained and the layer was to be frozen, or the other way round.
        """
        trained = self.shared.source.psi.requires_grad
        if trained and not requires_grad:
            raise RuntimeError(
                f"can't freeze {self.name!r}: its weight is a slice of the shared array, which is trained. "
                f"{FREEZE_REMEDY}"
            )
        if requires_grad and not trained:
            raise RuntimeError(
                f"can't unfreeze {self.name!r} by itself: its weight is a slice of the shared array, which is frozen. "
                f"Unfreeze the array for all layers (the psi of layer.bank, or model.requires_grad_(True))"
            )
        self.stays_trained = requires_grad
        return super().requires_grad_(requires_grad)

    def apply(self, fn: Callable[[nn.Module], None]) -> RPSLayer:
        """Call ``fn`` with this layer, as torch does, unless it is an initialiser, which would change nothing here.

        Raises:
            RuntimeError: ``fn`` is an initialiser of weights by its name or its code.
        """
        if is_initialiser(fn):
            what = getattr(fn, "__qualname__", None) or repr(fn)
            raise RuntimeError(
                f"apply({what}) would not initialise {self.name!r}, whose weight is made from a shared array; modules "
                f"before it may be initialised by now. Call hf_rps.to_dense(model), initialise, and compress again, or "
                f"draw the array itself: get_rps_model(..., RPSConfig(init_weights=False))"
            )
        return super().apply(fn)

    def reset_parameters(self) -> NoReturn:
        """Raise: a layer can't be drawn anew by itself."""
        _refuse("can't draw anew", self.name)

    def to_dense(self) -> nn.Module:
        """A layer of the replaced kind with the same weight, in memory and a dtype of its own, and the same bias."""
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

    def extra_repr(self) -> str:
        """What torch's messages print of a layer in which they miss a parameter (parametrize, weight_norm)."""
        return f"{self.parameter} shared, no parameter (hf_rps.to_dense makes it one)"

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this layer keeps beside psi and its bias."""
        kept = self.shared.matrix.kept_tensors()
        return kept + [tensor for product in self.shared.products for tensor in product.kept_tensors()]
