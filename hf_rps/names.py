"""Names: of modules in a map, and of the bank and its tensors in state dicts."""

from __future__ import annotations

from torch import nn

BANK_NAME = "rps"  # of the bank inside the base model; state-dict keys end in "rps.psi"
_OUTSIDE = "/"  # marks a target outside the base model in a map, whose names are otherwise relative to it


def base_model_of(model: nn.Module) -> nn.Module:
    """The body of a transformers model without its task head; the model itself for any other module."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


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


def weight_key(name: str, parameter: str, prefix: str) -> str:
    """State-dict key of the dense weight that the target ``name`` of a map stands for; ``prefix`` as above."""
    full_name = module_name(name, prefix)
    return f"{full_name}.weight" if parameter == "weight" else full_name


def bank_prefix(model: nn.Module) -> str:
    """State-dict prefix of the bank of a native model, without a trailing dot."""
    return base_prefix(model) + BANK_NAME


def psi_key(model: nn.Module) -> str:
    """State-dict key of the shared array of a native model."""
    return f"{bank_prefix(model)}.psi"


def is_psi_key(key: str) -> bool:
    """True for the key of a native model's shared array, whatever module the model is part of."""
    return f".{key}".endswith(f".{BANK_NAME}.psi")
