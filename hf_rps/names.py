"""Names: of modules in a map, and of the bank and its tensors in state dicts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

BANK_NAME = "rps"  # of the bank inside the base model; state-dict keys end in "rps.psi_<digits of a fingerprint>"
# of the adapters' bank in a model that is compressed itself; PEFT passes by modules whose names begin with "rps_"
ADAPTERS_NAME = "adapters_rps"
LEGACY_PSI = "psi"  # what the array was called up to format 2, whatever its map
_OUTSIDE = "/"  # marks a target outside the base model in a map, whose names are otherwise relative to it


def base_model_of(model: nn.Module) -> nn.Module:
    """The body of a transformers model without its task head; the model itself for any other module."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def output_head_of(model: nn.Module) -> nn.Module | None:
    """The output head of a transformers model that has one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def base_prefix(model: nn.Module) -> str:
    """Name of the base model inside ``model`` with a trailing dot, or '' where they are the same."""
    base = base_model_of(model)
    if base is model:
        return ""
    name = getattr(model, "base_model_prefix", "")
    if model._modules.get(name) is base:  # as in transformers' models
        return f"{name}."
    return next((f"{name}." for name, module in model.named_modules() if module is base and name), "")


def map_name(name: str, prefix: str) -> str:
    """Name of a module in the map: relative to the base model, so that heads can be put on and taken off."""
    return name.removeprefix(prefix) if name.startswith(prefix) else _OUTSIDE + name


def module_name(name: str, prefix: str) -> str:
    """Inverse of :func:`map_name`: the name inside the model whose base model has ``prefix``."""
    return name.removeprefix(_OUTSIDE) if name.startswith(_OUTSIDE) else prefix + name


def is_outside(name: str) -> bool:
    """True for the name in a map of a target outside the base model."""
    return name.startswith(_OUTSIDE)


def outer_name(name: str) -> str:
    """The name, relative to the whole model, of a target outside the base model."""
    return name.removeprefix(_OUTSIDE)


def weight_key(full_name: str, parameter: str) -> str:
    """State-dict key of the dense weight of a target, by its name inside the model."""
    return f"{full_name}.weight" if parameter == "weight" else full_name


@dataclass(frozen=True)
class Place:
    """Where a compressed model is inside the model that it is saved with, as prefixes of names with a trailing dot.

    Attributes:
        base: Of its base model, which holds the bank.
        model: Of the whole of it, to which the names of targets outside the base model are relative.
    """

    base: str
    model: str = ""

    def module_name(self, name: str) -> str:
        """The name, inside the outer model, of a target's module."""
        return self.model + name.removeprefix(_OUTSIDE) if name.startswith(_OUTSIDE) else self.base + name

    def relative_to(self, prefix: str) -> Place:
        """The same as seen from a base model with ``prefix``, so that a head can be put on and taken off."""
        return Place(map_name(self.base, prefix), map_name(self.model, prefix))

    def inside(self, prefix: str) -> Place:
        """Inverse of :meth:`relative_to`."""
        return Place(module_name(self.base, prefix), module_name(self.model, prefix))


def psi_name(fingerprint: str) -> str:
    """Name of the parameter that holds the shared array of the map with this fingerprint.

    The array means nothing without its map, and a name passes through everything that carries a state dict.
    """
    return f"psi_{fingerprint[:12]}"


def stored_name(name: str, fingerprint: str) -> str:
    """Name of a layer's parameter that holds what the learned map with this fingerprint has stored as ``name``."""
    return f"{name}_{fingerprint[:12]}"


def psi_names(state_dict, prefix: str) -> list[str]:
    """The keys of shared arrays of any map, or of none that is known, directly under ``prefix`` in a state dict."""
    return [key for key in state_dict if key.startswith(prefix) and _PSI.fullmatch(key.removeprefix(prefix))]


def is_psi(name: str) -> bool:
    """True for the name of a shared array's parameter, without its module's."""
    return _PSI.fullmatch(name) is not None


def is_psi_key(key: str) -> bool:
    """True for the key of a native model's shared array, whatever module the model is part of."""
    owner, _, name = key.rpartition(".")
    return f".{owner}".endswith(f".{BANK_NAME}") and _PSI.fullmatch(name) is not None


_PSI = re.compile(r"psi(_[0-9a-f]{12})?")
