"""AdapterBank: the module that owns the shared arrays of all RPS adapters of a model.

PEFT saves, loads, freezes, moves and deletes adapters by walking over ``BaseTunerLayer`` modules and the containers on
them that are keyed by adapter name. The arrays are in one such container, on one module at the root of the model;
layers hold no parameter of an adapter, only plain references through which they look it up on every call.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_rps.mapping import WeightMap
from hf_rps.shared_array import Gated, SharedArray


class RPSTunerLayer(BaseTunerLayer):
    """What the bank and the layers have in common for PEFT."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a shared weight has full rank

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: the array serves layers on any device, and its place is where it was made or loaded."""


class AdapterArray(SharedArray):
    """The shared array of one adapter, whose parameter is in ``owner.rps_psi``."""

    def __init__(self, owner: AdapterBank, adapter_name: str, weight_map: WeightMap, grad_scaling: str):
        super().__init__(weight_map, grad_scaling)
        self.owner, self.adapter_name = owner, adapter_name

    @property
    def psi(self) -> nn.Parameter:
        return self.owner.rps_psi[self.adapter_name]

    def _call_gate(self, device: torch.device, dtype: torch.dtype) -> Gated:
        return self.owner(self, device, dtype)


class ExpectedMaps(nn.ParameterDict):
    """By adapter, an empty tensor whose shape names the map, there only while the adapter is loaded.

    Loaders compare shapes, so the file of another map is refused. An entry that has been loaded has done its work and
    is dropped, before anybody takes it for a parameter of the model.
    """

    def __setattr__(self, name: str, value) -> None:
        if name in self.__dict__.get("_parameters", ()) and isinstance(value, nn.Parameter):
            del self[name]
        else:
            super().__setattr__(name, value)


class AdapterBank(nn.Module, RPSTunerLayer):
    """Owner of the shared arrays of all adapters, at the root of the model.

    As a module of the forward pass, which it is if the root is an ``nn.Sequential``, it is the identity.
    """

    adapter_layer_names = ("rps_psi",)
    other_param_names = ("arrays", "rps_map")
    in_features = out_features = None  # every tuner layer has them

    def __init__(self):
        super().__init__()
        self.rps_psi = nn.ParameterDict({})
        self.rps_map = ExpectedMaps({})
        self.arrays: dict[str, AdapterArray] = {}
        self.merged_adapters: list[str] = []

    weight = property(lambda self: None)  # those of BaseTunerLayer look for a base layer
    bias = property(lambda self: None)

    def add(self, adapter_name: str, weight_map: WeightMap, grad_scaling: str, device, dtype) -> AdapterArray:
        """Make the array of an adapter, uninitialised and frozen."""
        self.rps_psi[adapter_name] = nn.Parameter(
            torch.empty(weight_map.m, device=device, dtype=dtype), requires_grad=False
        )
        array = self.arrays[adapter_name] = AdapterArray(self, adapter_name, weight_map, grad_scaling)
        return array

    def expect(self, adapter_name: str) -> None:
        """Let loaders check that what they load was made for the map of this adapter."""
        shape = self.arrays[adapter_name].weight_map.sentinel_shape()
        self.rps_map[adapter_name] = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forget(self, adapter_name: str) -> None:
        """Undo :meth:`expect`."""
        if adapter_name in self.rps_map:
            del self.rps_map[adapter_name]

    def forward(self, x, device: torch.device | None = None, dtype: torch.dtype | None = None):
        """Make a gate for an array, by way of the hooks on this module; see :meth:`SharedArray.make_gate`."""
        if not isinstance(x, AdapterArray):
            return x
        self.rps_map.clear()  # in use, so nothing is being loaded
        hook = getattr(self.rps_psi, "_hf_hook", None)  # accelerate's offloading hooks the container, never called
        if hook is None:
            return x.make_gate(device, dtype)
        hook.pre_forward(self.rps_psi)
        gate = x.make_gate(device, dtype)
        hook.post_forward(self.rps_psi, None)
        return gate

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note what the layers merge, so that PEFT finds all tuner layers in one state."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [n for n in names if n in self.rps_psi and n not in self.merged_adapters]

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.arrays:
            self.arrays[adapter_name].unwatch()
        super().delete_adapter(adapter_name)

    def close(self) -> None:
        """Take the hooks of all arrays off the model."""
        for array in self.arrays.values():
            array.unwatch()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: n={a.weight_map.n}, m={a.weight_map.m}" for name, a in self.arrays.items())
