"""A dense model becomes a compressed one, and back, in place. It knows torch modules only."""

from __future__ import annotations

from torch import nn

from hf_rps.config import RPSSettings
from hf_rps.initial import array_dtype, check_weight, initial_std, initialise
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import Candidate
from hf_rps.mappings.base import Target
from hf_rps.names import BANK_NAME, base_model_of, base_prefix, map_name
from hf_rps.psi.bank import Bank
from hf_rps.psi.passes import Passes
from hf_rps.targets import find_targets


def find_bank(model: nn.Module) -> Bank | None:
    """The bank of a compressed model, or None if ``model`` is not compressed."""
    return next((module for module in model.modules() if isinstance(module, Bank)), None)


def convert(model: nn.Module, config: RPSSettings) -> Bank:
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
    targets = [Target(map_name(c.full_name, prefix), *c.weight.shape, std=initial_std(c.weight)) for c in candidates]
    weight_map = config.weight_map(targets)
    device = candidates[0].stored.device
    bank = Bank(weight_map, config.grad_scaling, device=device, dtype=array_dtype(candidates))
    bank.psi.requires_grad_(any(c.stored.requires_grad for c in candidates))
    initialise(bank.psi, bank.array, candidates, config.init_weights)
    install(model, bank, stand_ins(bank, dict(zip([t.name for t in targets], candidates, strict=True))))
    return bank


def stand_ins(bank: Bank, candidates: dict[str, Candidate]) -> dict[str, RPSLayer]:
    """By name, the layers that take the place of those with ``candidates``, which go by their names in the map."""
    names: dict[str, dict[str, str]] = {}  # by module, the targets of its parameters
    for name, candidate in candidates.items():
        names.setdefault(candidate.name, {})[candidate.parameter] = name
    modules = {candidate.name: candidate for candidate in candidates.values()}
    return {name: c.kind.stand_in(bank, c.module, names[name]) for name, c in modules.items()}


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
    watch_passes(model, bank.array.passes)


def watch_passes(model: nn.Module, passes: Passes) -> None:
    """Make a forward call of ``model``, of its base, and of every model inside that can be used by itself, a pass."""
    base = base_model_of(model)
    for module in model.modules():
        if module is model or module is base or hasattr(module, "save_pretrained"):
            passes.watch(module)


def replace_modules(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    """Replace modules by name, in every parent that holds them (some models register one module twice)."""
    new = {id(model.get_submodule(name)): replacement for name, replacement in replacements.items()}
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[child_name] = new[id(child)]


def revert(model: nn.Module) -> None:
    """Undo :func:`convert`: layers of the kinds that were there, with the weights that the shared array stands for.

    Raises:
        ValueError: ``model`` is not compressed.
    """
    bank = find_bank(model)
    if bank is None:
        raise ValueError(f"this {type(model).__name__} is not compressed by hf_rps: it has no bank")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RPSLayer)}
    dense = {name: layer.to_dense() for name, layer in layers.items()}
    bank.array.passes.unwatch()
    replace_modules(model, dense)
    delattr(next(module for module in model.modules() if bank in module._modules.values()), BANK_NAME)
