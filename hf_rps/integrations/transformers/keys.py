"""What the arrays of a model are called in its state dict and files, and where a device map puts them."""

from __future__ import annotations

from torch import nn

from hf_rps.conversion import bank_owner, bank_place, find_banks, shared_layers
from hf_rps.names import BANK_NAME, Place, weight_key
from hf_rps.psi.bank import Bank


def psi_key(model: nn.Module, bank: Bank) -> str:
    """State-dict key of the shared array of ``bank``."""
    return f"{bank_name(model, bank)}.{bank.psi_name}"


def bank_name(model: nn.Module, bank: Bank) -> str:
    owner, _ = bank_owner(model, bank)
    return f"{owner}.{BANK_NAME}" if owner else BANK_NAME


def sentinel_keys(model: nn.Module) -> list[str]:
    """For every bank, the name of the empty tensor that stands in the file for one shared weight.

    A reader that does not know RPS finds a size mismatch there, instead of initialising a dense weight silently; see
    WeightMap.sentinel_shape.
    """
    layers, keys = list(shared_layers(model).values()), []
    for bank in find_banks(model):
        layer = next(layer for layer in layers if layer.bank is bank)
        place: Place = bank_place(model, bank)
        # by the map: wrappers change the modules' names
        keys.append(weight_key(place.module_name(layer.name), layer.parameter))
    return keys


def place_banks(model: nn.Module, device_map: dict) -> None:
    """Give the banks a place in a device map that was written for the dense model: each beside its first layer."""
    for bank, first in zip(find_banks(model), sentinel_keys(model), strict=True):
        name = bank_name(model, bank)
        if any(key == "" or name == key or name.startswith(f"{key}.") for key in device_map):
            continue
        owners = [key for key in device_map if first.startswith(f"{key}.")]
        if owners:
            device_map[name] = device_map[max(owners, key=len)]
