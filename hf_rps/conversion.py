"""A dense model becomes a compressed one, and back, in place. It knows torch modules only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_rps.config import RPSSettings
from hf_rps.freezing import check_frozen, watch_freezing
from hf_rps.initial import array_dtype, check_weights, initial_std, initialise
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import Candidate
from hf_rps.learning.learned import LearnedMap
from hf_rps.mappings.base import Target
from hf_rps.names import BANK_NAME, Place, base_model_of, base_prefix, is_outside, map_name, outer_name
from hf_rps.psi.bank import Bank
from hf_rps.psi.passes import Passes
from hf_rps.recorded import candidates_of_config
from hf_rps.targets import find_targets
from hf_rps.tied import Readers, readers_of


def find_banks(model: nn.Module) -> list[Bank]:
    """The banks inside ``model``, in its order: one for each part of it that was compressed by itself."""
    return [module for module in model.modules() if isinstance(module, Bank)]


def find_bank(model: nn.Module) -> Bank | None:
    """The first bank inside ``model``, or None if nothing of it is compressed."""
    return next(iter(find_banks(model)), None)


def shared_layers(model: nn.Module) -> dict[str, RPSLayer]:
    """By name, the layers inside ``model`` whose weights are shared."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RPSLayer)}


def reader_of_outside(model: nn.Module) -> str | None:
    """The first layer inside ``model`` that reads an array outside of it, or None: then it is no part of another."""
    banks = find_banks(model)
    return next((name for name, layer in shared_layers(model).items() if layer.bank not in banks), None)


def bank_owner(model: nn.Module, bank: Bank) -> tuple[str, nn.Module]:
    """The name inside ``model`` of the module that holds ``bank``, and the module."""
    return next((name, module) for name, module in model.named_modules() if bank in module._modules.values())


def bank_place(model: nn.Module, bank: Bank) -> Place:
    """Where the part of ``model`` that was compressed onto ``bank`` is."""
    owner, module = bank_owner(model, bank)
    base = f"{owner}." if owner else ""
    if module is base_model_of(model):
        return Place(base)
    # names of targets outside the base tell where the whole part begins
    for name, layer in shared_layers(model).items():
        if layer.bank is bank and is_outside(layer.name):
            return Place(base, name.removesuffix(outer_name(layer.name).removesuffix(f".{layer.parameter}")))
    return Place(base, base)


class Fitted(NamedTuple):
    """A shared array for ``model``, and the layers (by the name of what they replace) that will read it."""

    model: nn.Module
    bank: Bank
    layers: dict[str, RPSLayer]

    def install(self) -> None:
        """Swap them in."""
        install(self.model, self.bank, self.layers)


def fit(
    model: nn.Module,
    config: RPSSettings,
    candidates: list[Candidate] | None = None,
    batches: Sequence[Any] = (),
    whole: nn.Module | None = None,
) -> Fitted:
    """Select targets and fit the shared array. ``model`` stays as it is.

    ``candidates`` are the weights to share, by default those that ``config`` records or chooses. A map that is learned
    is calibrated on ``batches``, with which ``whole`` is called, the model that ``model`` is a part of.
    """
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"this {type(model).__name__} is spread over {sorted(map(str, devices))} by its device_map; compress it on "
            f"one device, save it, and load the compressed checkpoint with the device_map"
        )
    check_room(model)
    if config.modules is not None:
        chosen, targets = candidates_of_config(model, config)
        check_weights(chosen.values())
    else:
        candidates, prefix = find_targets(model, config) if candidates is None else candidates, base_prefix(model)
        check_weights(candidates)
        chosen = {map_name(c.full_name, prefix): c for c in candidates}
        folded = config.input_fold != 1  # else a record says nothing of positions
        targets = [
            Target(name, *c.weight.shape, initial_std(c.weight), c.positions if folded else 1)
            for name, c in chosen.items()
        ]
    check_frozen([*chosen.values()])
    learned = None
    if config.is_learned:
        _check_smaller(config, targets)
        learned = LearnedMap(whole or model, chosen, config, batches)
    weight_map = config.weight_map(targets, None if learned is None else learned.digest)
    readers = readers_of(model, chosen)
    device = next(iter(chosen.values())).stored.device
    bank = Bank(weight_map, config.grad_scaling, device=device, dtype=array_dtype(chosen.values()))
    bank.settings = copy.deepcopy(config)
    bank.psi.requires_grad_(any(c.stored.requires_grad for c in chosen.values()))
    if learned is None:
        initialise(bank.psi, bank.array, chosen, config.init_weights)
    else:
        learned.write(bank)
    return Fitted(model, bank, stand_ins(bank, chosen, readers))


def _check_smaller(config: RPSSettings, targets: Sequence[Target]) -> None:
    """Raise a ValueError where codebooks alone would hold as many numbers as the weights."""
    m, n = config.weight_map(targets).m, sum(target.numel for target in targets)
    if m >= n:
        raise ValueError(
            f"bits={config.bits} and group_size={config.group_size} need {m:,} numbers of codebooks, more than the "
            f"weights have ({n:,}): a codebook has {2**config.bits} entries. Take fewer bits or a larger group_size, "
            f"or leave small layers out with exclude_modules"
        )


def stand_ins(bank: Bank, candidates: dict[str, Candidate], readers: Readers) -> dict[str, RPSLayer]:
    """By name, the layers that take the place of those with ``candidates``, which go by their names in the map, and of
    their ``readers``."""
    names: dict[str, dict[str, str]] = {}  # by module, the targets of its parameters
    for name, candidate in candidates.items():
        names.setdefault(candidate.name, {})[candidate.parameter] = name
    modules = {candidate.name: candidate for candidate in candidates.values()}
    layers = {name: c.kind.stand_in(bank, c.module, names[name]) for name, c in modules.items()}
    for target, others in readers.items():
        for own_name, reader in others.items():
            layer = reader.kind.stand_in(bank, reader.module, {reader.parameter: target})
            layer.own_name = own_name
            layers[reader.name] = layer
    return layers


def check_room(model: nn.Module) -> None:
    """Raise a ValueError where the base model can't hold a bank."""
    base = base_model_of(model)
    if hasattr(base, BANK_NAME):
        raise ValueError(f"{type(base).__name__} has an attribute {BANK_NAME!r} of its own, where the bank must go")
    if isinstance(base, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"the bank can't be a child of a {type(base).__name__}, which would run it as one of its own; wrap "
            f"the container in a module of your own"
        )


def install(model: nn.Module, bank: Bank, replacements: dict[str, nn.Module], owner: nn.Module | None = None) -> None:
    """Put ``bank`` on its owner, by default the base model, and ``replacements`` (by module name) in place of the
    layers they replace."""
    if owner is None:
        check_room(model)
    replace_modules(model, replacements)
    (base_model_of(model) if owner is None else owner).add_module(BANK_NAME, bank)
    watch_passes(model, bank.array.passes)
    watch_freezing(model, bank)


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
    """Undo :func:`fit` and its installation for every bank inside: layers of the kinds that were there, with the
    weights that the shared arrays stand for.

    Raises:
        ValueError: Nothing of ``model`` is compressed, or it is a part of a compressed model whose array is outside.
    """
    banks, layers, outside = find_banks(model), shared_layers(model), reader_of_outside(model)
    if outside is not None:
        raise ValueError(
            f"this {type(model).__name__} is a part of a compressed model: {outside!r} reads a shared array outside of "
            f"it. Call hf_rps.to_dense on the whole model"
        )
    if not banks:
        raise ValueError(f"this {type(model).__name__} is not compressed by hf_rps: it has no bank")
    for bank in banks:
        if bank.substitutes is not None and bank.substitutes.names():
            raise ValueError(
                f"the layers of this {type(model).__name__} read the codebooks of the adapters "
                f"{bank.substitutes.names()}; call the PEFT model's merge_and_unload() or unload() first"
            )
        head = _outer_target(model, bank)
        if head is not None:
            raise ValueError(
                f"this {type(model).__name__} is a part of a compressed model: its shared array is read outside of it, "
                f"too, by {head!r}. Call hf_rps.to_dense on the whole model"
            )
    dense = {name: layer.to_dense() for name, layer in layers.items()}
    tied: dict[tuple[Bank, str], nn.Parameter] = {}
    for name, layer in layers.items():
        first = tied.setdefault((layer.bank, layer.name), getattr(dense[name], layer.parameter))
        dense[name].register_parameter(layer.parameter, first)
    replace_modules(model, dense)
    for bank in banks:
        bank.array.passes.unwatch()
        delattr(bank_owner(model, bank)[1], BANK_NAME)


def _outer_target(model: nn.Module, bank: Bank) -> str | None:
    """A layer outside ``model`` that reads ``bank``, or None: a head's layer, which ``model`` lacks, of a model around
    it that is in use."""
    used = {layer.name for layer in shared_layers(model).values()}
    absent = [t.name for t in bank.weight_map.targets if is_outside(t.name) and t.name not in used]
    return outer_name(absent[0]) if absent and bank.array.passes.is_watching_outside(model) else None
