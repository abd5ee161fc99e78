"""Which layers an adapter shares, on a model that may carry adapters already."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from hf_rps.initial import check_weight, initial_std
from hf_rps.integrations.peft.bank import AdapterBank
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.integrations.peft.layers import AdapterLinear, ReplaceLinear
from hf_rps.layers.kinds import Candidate, candidate_at, kind_of
from hf_rps.mappings.base import Target
from hf_rps.names import base_prefix, map_name, module_name
from hf_rps.targets import chosen_names, find_targets, is_explicit


def adapter_targets(model: nn.Module, config: RPSConfig) -> tuple[list[Candidate], list[Target]]:
    """The layers of a new adapter and, one each, the targets of its map.

    They are those that an adapter's config records, if it was loaded, or those that the config chooses: none if its
    ``target_modules`` match nothing. In layers that an earlier adapter replaces, a candidate's weight is what the layer
    has now, whichever adapter is active later, or None if it has none.

    Raises:
        ValueError: The config's choice can't be shared, or the recorded modules are not in the model.
    """
    modules, prefix = _without_wrappers(model, quantised=config.mode == "delta"), base_prefix(model)
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, ReplaceLinear)}
    if config.modules is not None:
        targets = [Target.parse(text) for text in config.modules]
        candidates = _recorded(model, modules, {module_name(t.name, prefix): t for t in targets})
        return _with_weights(candidates, replaced), targets
    if is_explicit(config) and not chosen_names(model, config, modules, adapters=True):
        return [], []
    candidates = _with_weights(find_targets(model, config, modules, adapters=True), replaced)
    # the standard deviations at init are those of the base model's weights, which adapters note
    stds = {name: shared.target.std for name, layer in replaced.items() for shared in layer.shared.values()}
    for candidate in candidates:
        layer = model.get_submodule(candidate.name)
        layer = layer.base_layer if isinstance(layer, AdapterLinear) else layer
        backend = _backend(model, layer)
        if backend is not None:
            stds[candidate.name] = _quantised_std(backend, layer)
            continue
        if candidate.stored is None:
            raise ValueError(
                f"the weight of {candidate.name!r} was freed (mode='replace') and no adapter that holds one is active, "
                f"so a new adapter has nothing to start from; activate one, or load the base model"
            )
        check_weight(candidate)
        stds.setdefault(candidate.name, initial_std(candidate.weight))
    return candidates, [Target(map_name(c.name, prefix), *c.weight.shape, std=stds[c.name]) for c in candidates]


def _with_weights(candidates: list[Candidate], replaced: dict[str, ReplaceLinear]) -> list[Candidate]:
    now = {name: SimpleNamespace(weight=layer.weight) for name, layer in replaced.items()}
    return [replace(c, module=now.get(c.name, c.module)) for c in candidates]


def _without_wrappers(model: nn.Module, quantised: bool) -> dict[str, nn.Module]:
    """The model's modules by name as they were before any adapter: base layers in place of the layers around them.

    A layer whose weight was freed, or is quantised where ``quantised`` allows for that, has a stand-in of its shape.
    """
    modules, hidden = {}, ()
    for name, module in model.named_modules():
        if name.startswith(hidden):
            continue
        if isinstance(module, (AdapterLinear, AdapterBank, AuxiliaryTrainingWrapper)):
            hidden += (f"{name}.",)
        if isinstance(module, (AdapterBank, AuxiliaryTrainingWrapper)):
            continue
        module = module.base_layer if isinstance(module, AdapterLinear) else module
        freed = "weight" in module._parameters and module.weight is None
        modules[name] = _stand_in(module) if freed or (quantised and _backend(model, module)) else module
    return modules


def _backend(model: nn.Module, module: nn.Module) -> QuantizationBackend | None:
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return None
    return resolve_quantization_backend(module, **get_quantization_kwargs(model))


def _stand_in(layer: nn.Module) -> nn.Module:
    """A plain layer of the same kind and shape on the meta device."""
    kind = kind_of(layer)
    return kind.blank(*kind.features(layer))


def _quantised_std(backend: QuantizationBackend, layer: nn.Module) -> float:
    try:
        return initial_std(backend.get_base_weight(layer))
    except TypeError:  # kinds that PEFT can't dequantise
        return float(f"{layer.in_features**-0.5:.3g}")


def _recorded(model: nn.Module, modules: dict[str, nn.Module], targets: dict[str, Target]) -> list[Candidate]:
    """The modules that an adapter's config records, by name."""
    candidates = []
    for name, target in targets.items():
        candidate = candidate_at(modules, name)
        kind = None if candidate is None else candidate.kind
        if kind is None or not kind.adapters or not isinstance(candidate.stored, torch.Tensor):
            raise ValueError(
                f"the adapter's config records the module {name!r}, but {type(model).__name__} has no such linear "
                f"layer. Load the adapter on the kind of model that it was made for; for a new adapter, make a new "
                f"RPSConfig"
            )
        candidates.append(candidate)
        shape = tuple(candidate.weight.shape)
        if shape != (target.out_features, target.in_features):
            raise ValueError(
                f"the adapter's config records the module {name!r} with shape "
                f"{(target.out_features, target.in_features)}, but in {type(model).__name__} it has shape {shape}. "
                f"Load the adapter on the base model that it was made for"
            )
    return candidates
