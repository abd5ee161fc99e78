"""The module that owns a shared array psi: the bank of a compressed model, or that of an adapter."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_rps.mappings.weight_map import WeightMap
from hf_rps.names import LEGACY_PSI, psi_name, psi_names
from hf_rps.psi.array import SharedArray
from hf_rps.psi.passes import Reading


class ArrayOwner(nn.Module):
    """Owner of a shared array.

    Args:
        weight_map: Which weight reads which slots of the array.
        grad_scaling: "projection", "norm" or "none"; see :class:`hf_rps.RPSConfig`.
        device, dtype: Of psi (m,), which is left uninitialised.
        like: Another array of the same map, whose matrices are used; see :class:`SharedArray`.

    Layers keep the bank in an unregistered reference, so that psi is saved and sharded once. The parameter's name in
    state dicts is ``psi_name``, which tells its map: a state dict of another map does not load.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        grad_scaling: str = "projection",
        device=None,
        dtype=None,
        like: SharedArray | None = None,
    ):
        super().__init__()
        self.array = SharedArray(weight_map, grad_scaling, like)
        self.array.passes.owner = weakref.ref(self)
        self.psi_name = psi_name(weight_map.fingerprint)
        self._sentinel_seen_in: list[str] | None = None
        self.register_parameter(self.psi_name, nn.Parameter(torch.empty(weight_map.m, device=device, dtype=dtype)))

    def __setstate__(self, state):
        super().__setstate__(state)
        self.array.passes.owner = weakref.ref(self)

    @property
    def psi(self) -> nn.Parameter:
        """The shared array (m,)."""
        psi = self._parameters.get(self.psi_name)
        return self._psi_elsewhere() if psi is None else psi

    def _psi_elsewhere(self) -> Tensor:
        """psi where it is not among the parameters: wrappers may keep it as a plain attribute."""
        return getattr(self, self.psi_name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; what is assigned to ``psi`` goes by the name that tells the map."""
        super().register_parameter(self.psi_name if name == "psi" else name, param)

    @property
    def in_use(self) -> ArrayOwner:
        """The owner of the array that layers read now."""
        return self

    @property
    def weight_map(self) -> WeightMap:
        return self.array.weight_map

    @property
    def grad_scaling(self) -> str:
        return self.array.divisor.scaling

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move psi as ``fn`` does. In which dtype it is, is decided by the layers that read it, which may be cast apart
        from the module that this one is in."""
        wanted = self.array.dtype
        if wanted is None:
            return super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.psi.dtype, device="cpu"))
        return super()._apply(fn if probe.dtype == wanted else self._moving(probe.device, wanted), recurse)

    def fit_dtype(self) -> None:
        """Make psi as wide as the widest weight that it stands for, and no wider; the same parameter, cast in place."""
        wanted = self.array.dtype
        if wanted != self.psi.dtype:
            super()._apply(self._moving(self.psi.device, wanted))

    @staticmethod
    def _moving(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        def move(tensor: Tensor) -> Tensor:
            if tensor.is_meta:
                return torch.empty_like(tensor, device=device, dtype=dtype)
            return tensor.to(device=device, dtype=dtype)

        return move

    def read(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """psi as this pass reads it."""
        return self.array.read(self.psi, device, dtype, self)

    def forward(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """Read psi anew: a call, so that the hooks on this module (offloading, FSDP) run around it."""
        return self.array.enter(self.psi, device, dtype)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own, found = prefix + self.psi_name, psi_names(state_dict, prefix)
        if own not in found and prefix + LEGACY_PSI in found and self._sentinel_seen_in is errors:
            state_dict[own] = state_dict.pop(prefix + LEGACY_PSI)
            found = [own]
        self._sentinel_seen_in = None
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        others = [key for key in found if key != own]
        if others:
            errors.append(self.refusal(others[0].removeprefix(prefix)))
            missing[:] = [key for key in missing if key != own]
            unexpected[:] = [key for key in unexpected if key not in others]

    def see_sentinel(self, errors: list[str]) -> None:
        """Note that the state dict that is being loaded has this map's sentinel, which tells of an array that is named
        as in older formats. ``errors`` is the list of the one call of load_state_dict, and so stands for it."""
        self._sentinel_seen_in = errors

    def refusal(self, name: str) -> str:
        """Why an array called ``name`` can't be this bank's, and what to do."""
        if name == LEGACY_PSI:
            return (
                f"the shared array {name!r}, written by an older version of hf_rps, does not name its map, and nothing "
                f"beside it tells whether it is this model's, {self.weight_map.fingerprint}. Load the checkpoint with "
                f"from_pretrained; or, if you know that it is, call the array {self.psi_name!r} in the state dict"
            )
        return (
            f"the shared array {name!r} belongs to the map {name.removeprefix('psi_')}, and this model has the map "
            f"{self.psi_name.removeprefix('psi_')} (the first digits of {self.weight_map.fingerprint}), so its numbers "
            f"would be read in the wrong places. The map depends on the weights that a model had when it was "
            f"compressed, not on its RPSConfig alone. Load the checkpoint with from_pretrained; or compress the model "
            f"that is to load it to the map of the saved one: get_rps_model(model, hf_rps.get_rps_config(saved_model))"
        )

    def extra_repr(self) -> str:
        return f"n={self.weight_map.n}, m={self.weight_map.m}, grad_scaling={self.grad_scaling!r}"


class Substitutes(Protocol):
    """Arrays of the map of a :class:`Bank`, one of which its layers may read in the place of its own."""

    def active(self) -> ArrayOwner | None:
        """The owner of the one that they read now; None: the bank's own."""

    def names(self) -> list[str]:
        """What they are called."""


class Bank(ArrayOwner):
    """The owner in a model that was compressed by itself, without PEFT.

    Attributes:
        settings: The RPSSettings that it was made with, for checkpoints to record.
        substitutes: The arrays that may stand in for this one, if there are any: those of adapters. Kept unregistered,
            as they are modules of their own.
    """

    settings = None
    substitutes: Substitutes | None = None

    def substitute(self, substitutes: Substitutes | None) -> None:
        """Let layers read what ``substitutes`` say from now on; None: psi itself."""
        self.__dict__["substitutes"] = substitutes

    @property
    def in_use(self) -> ArrayOwner:
        active = None if self.substitutes is None else self.substitutes.active()
        return self if active is None else active
