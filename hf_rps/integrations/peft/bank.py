"""AdapterBank: the module that owns the shared arrays of all RPS adapters of a model.

PEFT saves, loads, freezes, moves and deletes adapters by walking over ``BaseTunerLayer`` modules and the containers on
them that are keyed by adapter name. The arrays are in one such container, on one module at the root of the model;
layers hold no parameter of an adapter, only plain references through which they look it up on every call.
"""

from __future__ import annotations

from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.array import SharedArray
from hf_rps.psi.passes import Reading


class RPSTunerLayer(BaseTunerLayer):
    """What the bank and the layers have in common for PEFT."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a shared weight has full rank

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: the array serves layers on any device, and its place is where it was made or loaded."""


class AdapterSource:
    """Where the layers of one adapter find its shared array: at ``bank``, under the adapter's name."""

    def __init__(self, bank: AdapterBank, adapter_name: str):
        self.bank, self.adapter_name = bank, adapter_name
        self.array = bank.arrays[adapter_name]

    @property
    def psi(self) -> nn.Parameter:
        return self.bank.rps_psi[self.adapter_name]

    def read(self, device: torch.device, dtype: torch.dtype) -> Reading:
        return self.array.read(self.psi, device, dtype, partial(self.bank, self.adapter_name))


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
        self.arrays: dict[str, SharedArray] = {}
        self.merged_adapters: list[str] = []

    weight = property(lambda self: None)  # those of BaseTunerLayer look for a base layer
    bias = property(lambda self: None)

    def add(self, adapter_name: str, weight_map: WeightMap, grad_scaling: str, device, dtype) -> AdapterSource:
        """Make the array of an adapter, uninitialised and frozen."""
        self.rps_psi[adapter_name] = nn.Parameter(
            torch.empty(weight_map.m, device=device, dtype=dtype), requires_grad=False
        )
        self.arrays[adapter_name] = SharedArray(weight_map, grad_scaling)
        return AdapterSource(self, adapter_name)

    def expect(self, adapter_name: str) -> None:
        """Let loaders check that what they load was made for the map of this adapter."""
        shape = self.arrays[adapter_name].weight_map.sentinel_shape()
        self.rps_map[adapter_name] = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forget(self, adapter_name: str) -> None:
        """Undo :meth:`expect`."""
        if adapter_name in self.rps_map:
            del self.rps_map[adapter_name]

    def forward(self, x, device: torch.device | None = None, dtype: torch.dtype | None = None):
        """Read anew the array of the adapter named ``x``: a call, so that the hooks on this module run around it."""
        if not isinstance(x, str):
            return x
        self.rps_map.clear()  # in use, so nothing is being loaded
        hook = getattr(self.rps_psi, "_hf_hook", None)  # accelerate's offloading hooks the container, never called
        if hook is None:
            return self.arrays[x].enter(self.rps_psi[x], device, dtype)
        hook.pre_forward(self.rps_psi)
        reading = self.arrays[x].enter(self.rps_psi[x], device, dtype)
        hook.post_forward(self.rps_psi, None)
        return reading

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note what the layers merge, so that PEFT finds all tuner layers in one state."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [n for n in names if n in self.rps_psi and n not in self.merged_adapters]

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.arrays:
            self.arrays[adapter_name].passes.unwatch()
        super().delete_adapter(adapter_name)

    def close(self) -> None:
        """Take the hooks of all arrays off the model."""
        for array in self.arrays.values():
            array.passes.unwatch()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: n={a.weight_map.n}, m={a.weight_map.m}" for name, a in self.arrays.items())
