"""The reference: weights and gradients by the plain definition, and what is compared between a model and its twin."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_rps.conversion import find_banks, shared_layers
from hf_rps.layers.base import RPSLayer
from hf_rps.mappings import definition
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.bank import ArrayOwner, Bank

ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22, torch.float64: 2.0**-50}


class Difference(AssertionError):
    """A model that is neither equal to its twin nor ended in a clear error."""


def demand(condition: bool, text: str) -> None:
    """Raise a Difference unless ``condition`` holds."""
    if not condition:
        raise Difference(text)


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Equal to ``tolerance`` times the largest number."""
    demand(found.shape == expected.shape and found.dtype == expected.dtype,
           f"{what}: {found.dtype} {tuple(found.shape)} for {expected.dtype} {tuple(expected.shape)}")  # fmt: skip
    if found.numel() and not found.is_meta:
        found, expected = found.detach().double(), expected.detach().double()
        same = (found == expected) | (found.isnan() & expected.isnan())
        error = (found - expected).abs().masked_fill(same, 0).max().item()
        size = expected.abs().nan_to_num(0, 0, 0).max().item()
        demand(error <= tolerance * size + 1e-30, f"{what}: differs by {error:.3g}, the largest number is {size:.3g}")


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit."""
    close(found, expected, 0.0, what)


def as_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A target's matrix in the form in which the dense layer stores it."""
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight.reshape(layer.weight.shape)


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(layer, Conv1D) else weight.reshape(weight.shape[0], -1)


def adjoint(weight_map: WeightMap, matrices: dict[str, Tensor], power: int = 1) -> Tensor:
    """R^T of the matrices, by target, float64 (m,), with each scale to ``power``."""
    total = torch.zeros(weight_map.m, dtype=torch.float64)
    for name, matrix in matrices.items():
        slots, coefficients = reads(weight_map, name)
        products = matrix.double() * coefficients * weight_map.scale(name) ** power
        total.index_add_(0, slots.flatten(), products.flatten())
    return total


def reads(weight_map: WeightMap, name: str) -> tuple[Tensor, Tensor]:
    """For every weight of a target its slot, and what it multiplies that with beside its scale."""
    slots, signs = torch.from_numpy(weight_map.slots(name)), torch.from_numpy(weight_map.signs(name)).double()
    fold = weight_map.fold_of(name)
    if fold is None:
        return slots, signs.expand(slots.shape)
    coefficients, columns = definition.folding(fold, weight_map.target(name).out_features)
    return slots[:, columns], signs.expand(slots.shape)[:, columns] * torch.from_numpy(coefficients)


def divisor(weight_map: WeightMap, scaling: str) -> Tensor:
    gamma = torch.from_numpy(definition.gamma(weight_map))
    gamma[gamma == 0] = 1
    return gamma ** {"projection": 1.0, "norm": 0.5, "none": 0.0}[scaling]


def started(weight_map: WeightMap, matrices: dict[str, Tensor], how: str) -> Tensor:
    """psi as "project" or "rescale" start it."""
    if how == "project":
        return adjoint(weight_map, matrices) / divisor(weight_map, "projection")
    counts = torch.zeros(weight_map.m, dtype=torch.float64)
    for name in matrices:
        slots, coefficients = reads(weight_map, name)
        counts.index_add_(0, slots.flatten(), coefficients.square().flatten())
    return adjoint(weight_map, matrices, -1) / torch.where(counts == 0, 1.0, counts).sqrt()


def psis(model: nn.Module) -> list[Tensor]:
    return [bank.psi.detach().clone() for bank in find_banks(model)]


def parameters(model: nn.Module, without: set[str] = frozenset()) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones by each of their names, but shared arrays and ``without``."""
    owners = {f"{name}.{module.psi_name}".lstrip(".") for name, module in model.named_modules()
              if isinstance(module, ArrayOwner)}  # fmt: skip
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: p for name, p in named.items() if name not in without and name not in owners}


def targets(model: nn.Module) -> dict[str, RPSLayer]:
    """By the name of the dense weight."""
    return {f"{name}.weight": layer for name, layer in shared_layers(model).items()}


def definition_weight(layer: RPSLayer, dense: nn.Module) -> Tensor:
    """The weight that ``layer`` stands for, as the twin's layer ``dense`` stores it."""
    bank: Bank = layer.bank
    weight = definition.weight(bank.psi.detach(), bank.weight_map, layer.name)
    return as_stored(dense, weight).to(layer.weight_dtype)


def take_over_weights(model: nn.Module, twin: nn.Module) -> None:
    """Set the twin's weights to what the definition says of the model's arrays."""
    with torch.no_grad():
        for name, layer in shared_layers(model).items():
            dense = twin.get_submodule(name)
            dense.weight.copy_(definition_weight(layer, dense))


def tied(model: nn.Module, without: set[str]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters(model, without).items():
        groups.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def config_of(model: nn.Module) -> dict:
    """What the config says beside the compression."""
    config = getattr(model, "config", None)
    found = {} if config is None else json.loads(config.to_json_string(use_diff=False))
    return _without(found, ("quantization_config", "_name_or_path"))


def kept_config(model: nn.Module) -> dict | None:
    """The config without what saving writes into that of any model."""
    config = getattr(model, "config", None)
    found = {} if config is None else json.loads(config.to_json_string(use_diff=False))
    return _without(found, ("architectures", "dtype", "_name_or_path", "save_id", "unused_modules"))


_RECORD = ("quantization_config",)


def _without(found, keys: tuple[str, ...]):
    if not isinstance(found, dict):
        return found
    return {key: _without(value, keys) for key, value in found.items() if key not in keys}


def differing(one, two) -> str:
    """What two dicts or lists do not have in common."""
    if isinstance(one, dict) and isinstance(two, dict):
        return str({k: (one.get(k), two.get(k)) for k in {**one, **two} if one.get(k) != two.get(k)})
    return f"{[x for x in one if x not in two]} became {[x for x in two if x not in one]}"


def snapshot(model: nn.Module) -> dict:
    """All of a model that an operation could leave changed."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        "modules": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "trained": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "dtypes": {name: layer.weight_dtype for name, layer in shared_layers(model).items()},
        "config": kept_config(model),
    }


def unchanged(model: nn.Module, before: dict, what: str) -> None:
    """Raise a Difference unless ``model`` is as it was."""
    now = snapshot(model)
    record = (before["config"] or {}).get("quantization_config")
    if find_banks(model) and (record is None or "banks" in record or len(find_banks(model)) > 1):
        # a model of which a part is compressed says so, and its part no longer, once it was saved
        now["config"], before = (
            _without(now["config"], _RECORD),
            before | {"config": _without(before["config"], _RECORD)},
        )
    for key in ("modules", "trained", "dtypes", "config"):
        demand(now[key] == before[key], f"{what}: its {key} changed: {differing(before[key], now[key])}")
    for name, tensor in before["tensors"].items():
        same(now["tensors"][name], tensor, f"{what}: {name}")
