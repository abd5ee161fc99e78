"""AdapterBank: the module that owns the shared arrays of all RPS adapters of a model.

PEFT saves, loads, freezes, moves and deletes adapters by walking over ``BaseTunerLayer`` modules and the containers on
them that are keyed by adapter name. The arrays' banks are in one such container, on one module at the root of the
model; layers hold no parameter of an adapter, only plain references to its bank.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_rps.psi.bank import ArrayOwner
from hf_rps.psi.passes import Reading


class RPSTunerLayer(BaseTunerLayer):
    """What the bank and the layers have in common for PEFT."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a shared weight has full rank

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: the array serves layers on any device, and its place is where it was made or loaded."""


class AdapterArray(ArrayOwner):
    """The owner of one adapter's array.

    Args:
        adapters: The :class:`AdapterBank` that it is in; kept unregistered.

    The others are those of :class:`hf_rps.psi.bank.ArrayOwner`.
    """

    def __init__(self, adapters: AdapterBank, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__["adapters"] = adapters

    def _psi_elsewhere(self) -> torch.Tensor:
        self.adapters.end_loading()
        return super()._psi_elsewhere()

    def forward(self, device: torch.device, dtype: torch.dtype) -> Reading:
        self.adapters.end_loading()  # in use, so nothing is being loaded
        return super().forward(device, dtype)


class LegacyArrays(nn.ParameterDict):
    """By adapter, the array of one in an older format, whose name in state dicts does not tell its map.

    The array is here, under its old name, while the adapter is loaded. Loaders assign what they have read: it then goes
    to its bank, under the name that it has today.
    """

    def __init__(self, banks: nn.ModuleDict):
        super().__init__({})
        self.__dict__["banks"] = banks  # unregistered: they are children of the AdapterBank

    def __setattr__(self, name: str, value) -> None:
        if name in self.__dict__.get("_parameters", ()) and isinstance(value, nn.Parameter):
            self.hand_over(name, value)
        else:
            super().__setattr__(name, value)

    def expect(self, name: str) -> None:
        """Take the array of an adapter over from its bank."""
        bank = self.banks[name]
        self[name] = bank._parameters.pop(bank.psi_name)

    def hand_over(self, name: str, psi: nn.Parameter | None = None) -> None:
        """Give the array of an adapter, or what was loaded in its place, to its bank."""
        bank, psi = self.banks[name], self._parameters[name] if psi is None else psi
        del self[name]
        bank.register_parameter(bank.psi_name, psi)


class ExpectedMaps(nn.ParameterDict):
    """By adapter, an empty tensor whose shape names the map, there only while the adapter is loaded.

    Loaders compare shapes, so the file of another map is refused where a wrong name would be logged only. An entry that
    has been loaded has done its work and is dropped, before anybody takes it for a parameter of the model.
    """

    def __setattr__(self, name: str, value) -> None:
        if name in self.__dict__.get("_parameters", ()) and isinstance(value, nn.Parameter):
            del self[name]
        else:
            super().__setattr__(name, value)


class AdapterBank(nn.Module, RPSTunerLayer):
    """Owner of the banks of all adapters, at the root of the model.

    As a module of the forward pass, which it is if the root is an ``nn.Sequential``, it is the identity.
    """

    adapter_layer_names = ("rps_banks",)
    other_param_names = ("rps_psi", "rps_map")
    in_features = out_features = None  # every tuner layer has them

    def __init__(self):
        super().__init__()
        self.rps_banks = nn.ModuleDict({})
        self.rps_psi = LegacyArrays(self.rps_banks)
        self.rps_map = ExpectedMaps({})
        self.merged_adapters: list[str] = []

    weight = property(lambda self: None)  # those of BaseTunerLayer look for a base layer
    bias = property(lambda self: None)

    def add(self, adapter_name: str, *args, **kwargs) -> AdapterArray:
        """Make the array of an adapter, uninitialised and frozen; the other arguments are those of ArrayOwner."""
        array = AdapterArray(self, *args, **kwargs).requires_grad_(False)
        self.rps_banks[adapter_name] = array
        return array

    def expect(self, adapter_name: str, shape: tuple[int, int], legacy: bool) -> None:
        """Let loaders check that what they load was made for this adapter, whose sentinel has ``shape``, and find the
        old name of the array of a ``legacy`` one."""
        self.rps_map[adapter_name] = nn.Parameter(torch.empty(shape), requires_grad=False)
        if legacy:
            self.rps_psi.expect(adapter_name)

    def end_loading(self) -> None:
        """Undo :meth:`expect` for all adapters, where loading has not."""
        self.rps_map.clear()
        for name in list(self.rps_psi):
            self.rps_psi.hand_over(name)

    def forward(self, x):
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note what the layers merge, so that PEFT finds all tuner layers in one state."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [n for n in names if n in self.rps_banks and n not in self.merged_adapters]

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        self.end_loading()
        if adapter_name in self.rps_banks:
            self.rps_banks[adapter_name].array.passes.unwatch()
        super().delete_adapter(adapter_name)

    def close(self) -> None:
        """Take the hooks of all arrays off the model."""
        for bank in self.rps_banks.values():
            bank.array.passes.unwatch()
