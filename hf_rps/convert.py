"""get_rps_model and to_dense: a dense model becomes a compressed one, and back, in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_rps.bank import Bank
from hf_rps.config import RPSConfig
from hf_rps.layers import RPSConv, RPSLayer, RPSLinear
from hf_rps.mapping import Target
from hf_rps.shared_array import SharedArray
from hf_rps.targets import Candidate, base_model_of, base_prefix, find_targets, is_convolution
from hf_rps.weight import LazyWeight

BANK_NAME = "rps"  # of the bank inside the base model; state-dict keys end in "rps.psi"
_OUTSIDE = "/"  # marks a target outside the base model in a map, whose names are otherwise relative to it


def find_bank(model: nn.Module) -> Bank | None:
    """The bank of a compressed model, or None if ``model`` is not compressed."""
    return next((module for module in model.modules() if isinstance(module, Bank)), None)


def get_rps_model(model: nn.Module, config: RPSConfig) -> nn.Module:
    """Compress ``model`` in place: all targeted weights become slices of one shared trainable array.

    Args:
        model: Any transformers model (or torch module), randomly initialised or pretrained, in memory.
        config: See :class:`hf_rps.RPSConfig`.

    Returns:
        The same object, of the same class. At ``ratio=1`` it computes what it computed before, to float rounding.

    Raises:
        ValueError: The config or the model does not fit; the message names the field or module, what was received and
            the remedy. The model is then as it was.
    """
    if not isinstance(config, RPSConfig):
        raise ValueError(f"config must be an hf_rps.RPSConfig, got {type(config).__name__}: {config!r}")
    if config.mode != "replace":
        raise ValueError(
            f"get_rps_model replaces weights, got RPSConfig(mode={config.mode!r}); add an adapter to a model with "
            f"peft.get_peft_model(model, config)"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    if find_bank(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is already compressed; call hf_rps.to_dense(model) first to compress it anew"
        )
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries PEFT adapters; merge them (merge_and_unload) before get_rps_model")
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if method is not None or getattr(model, "is_quantized", False):
        name = getattr(method, "quant_method", "an unknown method")
        raise ValueError(
            f"this {type(model).__name__} is quantised with {getattr(name, 'value', name)}; RPS shares float weights, "
            f"so load it without a quantization_config (or call model.dequantize() first)"
        )
    convert(model, config)
    return model


def convert(model: nn.Module, config: RPSConfig) -> Bank:
    """Select targets, fit the shared array, swap the layers in. ``model`` changes only once all has succeeded."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"this {type(model).__name__} is spread over {sorted(map(str, devices))} by its device_map; compress it on "
            f"one device, save it, and load the compressed checkpoint with the device_map"
        )
    candidates = find_targets(model, config)
    prefix = base_prefix(model)
    for candidate in candidates:
        check_weight(candidate)
    targets = [Target(map_name(c.name, prefix), *c.weight.shape, std=initial_std(c.weight)) for c in candidates]
    weight_map = config.weight_map(targets)
    first = candidates[0].module.weight
    bank = Bank(weight_map, config.grad_scaling, device=first.device, dtype=first.dtype)
    bank.psi.requires_grad_(any(c.module.weight.requires_grad for c in candidates))
    initialise(bank, candidates, config.init_weights)
    replacements = {c.name: shared_layer(t.name, bank, c) for c, t in zip(candidates, targets, strict=True)}
    install(model, bank, replacements)
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from hf_rps.integrations.transformers import mark_compressed

        mark_compressed(model, config, bank)
    return bank


def shared_layer(name: str, bank: Bank, candidate: Candidate) -> RPSLayer:
    """The layer that takes the place of ``candidate``, whose target in the bank's map is called ``name``."""
    if is_convolution(candidate.module):
        return RPSConv(name, bank, candidate.module)
    return RPSLinear(name, bank, candidate.module, candidate.transposed)


def map_name(name: str, prefix: str) -> str:
    """Name of a module in the map: relative to the base model, so that heads can be put on and taken off."""
    return name.removeprefix(prefix) if name.startswith(prefix) else _OUTSIDE + name


def module_name(name: str, prefix: str) -> str:
    """Inverse of :func:`map_name`: the name inside the model whose base model has ``prefix``."""
    return name.removeprefix(_OUTSIDE) if name.startswith(_OUTSIDE) else prefix + name


def install(model: nn.Module, bank: Bank, replacements: dict[str, nn.Module]) -> None:
    """Put ``bank`` on the base model and ``replacements`` (by module name) in place of the layers they replace."""
    base = base_model_of(model)
    if hasattr(base, BANK_NAME):
        raise ValueError(f"{type(base).__name__} has an attribute {BANK_NAME!r} of its own, where the bank must go")
    if isinstance(base, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"the bank can't be a child of a {type(base).__name__}, which would run it as one of its own; wrap "
            f"the container in a module of your own"
        )
    replace_modules(model, replacements)
    base.add_module(BANK_NAME, bank)
    for module in model.modules():
        if module is model or module is base or hasattr(module, "save_pretrained"):
            bank.watch(module)


def replace_modules(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    """Replace modules by name, in every parent that holds them (some models register one module twice)."""
    new = {id(model.get_submodule(name)): replacement for name, replacement in replacements.items()}
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[child_name] = new[id(child)]


def to_dense(model: nn.Module) -> nn.Module:
    """Decompress ``model`` in place: a plain model again, with the weights that the shared array stood for.

    Raises:
        ValueError: ``model`` is not compressed.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries PEFT adapters; call its merge_and_unload() for a plain model")
    bank = find_bank(model)
    if bank is None:
        raise ValueError(f"this {type(model).__name__} is not compressed by hf_rps: it has no bank")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RPSLayer)}
    dense = {name: layer.to_dense() for name, layer in layers.items()}
    bank.unwatch()
    replace_modules(model, dense)
    delattr(next(module for module in model.modules() if bank in module._modules.values()), BANK_NAME)
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from hf_rps.integrations.transformers import unmark_compressed

        unmark_compressed(model)
    return model


def check_weight(candidate: Candidate) -> None:
    """Raise a ValueError unless the weight of ``candidate`` is in memory and finite."""
    weight = candidate.module.weight
    if weight.is_meta:
        raise ValueError(
            f"the weight of {candidate.name!r} is on the meta device (offloaded or not yet loaded); load the whole "
            f"model to memory before compressing it"
        )
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        what = "is empty" if weight.numel() == 0 else "holds values that are not finite"
        raise ValueError(f"the weight of {candidate.name!r} {what}; leave it out with exclude_modules, or repair it")


def initial_std(weight: Tensor) -> float:
    """RMS of a weight, to three digits (it is written to config.json); for an all-zero weight 1 / sqrt(in_features)."""
    std = weight.detach().double().square().mean().sqrt().item()
    return float(f"{std or 1 / math.sqrt(weight.shape[1]):.3g}")


def _is_trained(weight: Tensor | LazyWeight) -> bool:
    """True for weights that come from a checkpoint, or from another adapter, rather than from random initialisation."""
    return isinstance(weight, LazyWeight) or getattr(weight, "_is_hf_initialized", False)


@torch.no_grad()
def initialise(bank: SharedArray, candidates: list[Candidate], how: bool | str) -> None:
    """Set psi from the dense weights; see ``init_weights`` of :class:`hf_rps.RPSConfig`."""
    weight_map = bank.weight_map
    if how is False:
        nn.init.normal_(bank.psi, std=weight_map.init_std)
        return
    if how is True:
        loaded = sum(c.weight.numel() for c in candidates if _is_trained(c.module.weight))
        how = "project" if 2 * loaded > weight_map.n else "rescale"
    total = torch.zeros(weight_map.m, dtype=torch.promote_types(bank.psi.dtype, torch.float32), device=bank.psi.device)
    weights = torch.zeros_like(total)  # Gamma_j, or the number of weights on slot j
    for target, candidate in zip(weight_map.targets, candidates, strict=True):
        scale = weight_map.scale(target.name)
        factor, share = (scale, scale**2) if how == "project" else (1 / scale, 1.0)
        signs = torch.from_numpy(weight_map.signs(target.name)).to(total.device)
        values = (candidate.weight.to(total) * signs * factor).flatten()
        if weight_map.mapping == "fold":
            start = 0
            for slot, length in weight_map.runs(target.name):
                total[slot : slot + length] += values[start : start + length]
                weights[slot : slot + length] += share
                start += length
        else:
            slots = torch.from_numpy(weight_map.slots(target.name)).flatten().to(total.device)
            total.index_add_(0, slots, values)
            weights.index_add_(0, slots, torch.full_like(values, share))
    weights.clamp_(min=torch.finfo(weights.dtype).tiny)  # slots that no weight reads (never with "fold") stay 0
    bank.psi.copy_(total / (weights if how == "project" else weights.sqrt()))
