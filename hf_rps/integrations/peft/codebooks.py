"""Adapters of a model that is compressed with a learned map: codebooks of their own, read with the model's codes.

The model's layers stay as they are and its array is frozen; while an adapter is active they read its array in the place
of the model's. So the codes are there once, whatever the number of adapters, and what is stored of a task is a copy of
the codebooks.
"""

from __future__ import annotations

import copy
import re

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hf_rps.conversion import bank_owner, find_banks, reader_of_outside, shared_layers
from hf_rps.initial import all_finite
from hf_rps.integrations.peft.bank import AdapterArray, AdapterBank
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.layers.base import RPSLayer
from hf_rps.mappings.table import MAPPINGS
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.names import ADAPTERS_NAME
from hf_rps.psi.bank import Bank
from hf_rps.targets import chosen_names, is_explicit

ADAPTER = "peft.get_peft_model(model, RPSConfig(mapping={mapping!r}))"  # how to make one
_CHOICES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class CodebookBank(AdapterBank):
    """Owner of the arrays of adapters of a compressed model: substitutes for the array of ``base``.

    Args:
        base: The model's own bank; kept unregistered.
    """

    def __init__(self, base: Bank):
        super().__init__()
        self.__dict__["base"] = base
        self._unmerged: Tensor | None = None  # the base's array while another one is merged into it
        base.substitute(self)

    def active(self) -> AdapterArray | None:
        """The active adapter's array; None where the base's is read.

        Raises:
            ValueError: Several adapters are active.
        """
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.rps_banks]
        if len(names) > 1:
            raise ValueError(
                f"layers read the codebooks of one adapter at a time, got {names}; choose one by set_adapter, or make "
                f"one of them: add_weighted_adapter({names}, weights, name)"
            )
        return self.rps_banks[names[0]] if names else None

    def names(self) -> list[str]:
        return list(self.rps_banks)

    def add_copy(self, adapter_name: str, grad_scaling: str, on_meta: bool) -> AdapterArray:
        """Make the array of an adapter, a frozen copy of the base's; without numbers where they will be loaded."""
        psi = self.base.psi
        device = torch.device("meta") if on_meta else psi.device
        if psi.is_meta and not on_meta:  # offloaded, and so the adapter's own will be loaded
            device = torch.device("cpu")
        array = self.add(adapter_name, self.base.weight_map, grad_scaling, device, psi.dtype, self.base.array)
        if not (on_meta or psi.is_meta):
            with torch.no_grad():
                array.psi.copy_(psi)
            array.array.started = self.base.array.started
        return array

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:  # what is left then is the base as it was
            self.unmerge()
        super().enable_adapters(enabled)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the adapter's codebooks the base's.

        Raises:
            ValueError: Several adapters are to be merged, the base is offloaded or, with ``safe_merge``, codebooks hold
                values that are not finite in the base's dtype. Nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rps_banks]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(
                f"the base can have the codebooks of one adapter, got {[*self.merged_adapters, *names]}; merge one, or "
                f"make one of them first: add_weighted_adapter(names, weights, name)"
            )
        own, psi = self.base.psi, self.rps_banks[names[0]].psi
        if own.is_meta:
            raise ValueError("the base's codebooks are offloaded; load the whole model to memory before merging")
        if safe_merge and not all_finite(psi.to(own.dtype)):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._unmerged = own.detach().clone()
        own.copy_(psi)
        self.merged_adapters.append(names[0])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base its own codebooks back, bit for bit."""
        if self._unmerged is not None:
            self.base.psi.copy_(self._unmerged)
            self._unmerged = None
        super().unmerge()

    def settle(self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the base with the adapter's codebooks for good (``merge``), or with its own."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if not merge:
            self.unmerge()
        elif not self.merged or set(wanted) - set(self.merged_adapters):
            self.merge(safe_merge, adapter_names)

    def close(self) -> None:
        super().close()
        self.base.substitute(None)


def base_bank(model: nn.Module, config: RPSConfig) -> Bank:
    """The bank of ``model`` for whose array an adapter with ``config`` is to have a substitute.

    Raises:
        ValueError: ``model`` is no base for such an adapter, or ``config`` is not for this base.
    """
    banks, what = find_banks(model), f"this {type(model).__name__}"
    if not banks:
        raise ValueError(_no_base(what, config))
    learned = next((bank.weight_map.mapping for bank in banks if bank.weight_map.learned is not None), None)
    if learned is None:
        raise ValueError(
            f"{what} is compressed already (get_rps_model) with mapping={banks[0].weight_map.mapping!r}; train it as "
            f"it is, or call hf_rps.to_dense(model) first"
        )
    if not config.is_learned:
        raise ValueError(
            f"{what} is compressed already (get_rps_model) with mapping={learned!r}, and RPSConfig(mode="
            f"{config.mode!r}, mapping={config.mapping!r}) is for dense weights. An adapter of this model is codebooks "
            f"of its own, and so any change of the model's: {ADAPTER.format(mapping=learned)}"
        )
    if len(banks) > 1:
        parts = [bank_owner(model, bank)[0] for bank in banks]
        raise ValueError(f"{what} holds {len(banks)} shared arrays, in {parts}; put an adapter on each part by itself")
    (bank,) = banks
    outside = reader_of_outside(model)
    if outside is not None:
        raise ValueError(
            f"{what} is a part of a compressed model: {outside!r} reads a shared array outside of it. Put the adapter "
            f"on the whole model"
        )
    found = getattr(model, ADAPTERS_NAME, None)
    if not isinstance(found, (CodebookBank, type(None))):
        raise ValueError(f"{what} has an attribute {ADAPTERS_NAME!r} of its own, where the adapters must go")
    others = bank.substitutes
    if others is not None and others is not found and others.names():
        raise ValueError(
            f"{what} reads the codebooks of the adapters {others.names()} of a model around it; add further ones there"
        )
    _check_map(what, config, bank.weight_map)
    layers = {name: layer for name, layer in shared_layers(model).items() if layer.bank is bank}
    check_saved(model, config)
    _check_choice(model, config, layers)
    if bank.psi.is_meta and config.modules is None:
        raise ValueError(
            "the base's codebooks are not in memory (offloaded), and a new adapter starts as a copy of them; load the "
            "whole model to memory"
        )
    return bank


def _no_base(what: str, config: RPSConfig) -> str:
    if config.fingerprint is not None:
        return (
            f"the adapter's config records the learned map {config.fingerprint}, and {what} is dense, so it has no "
            f"codes for the codebooks. Load the compressed model that the adapter was made on "
            f"({config.base_model_name_or_path or 'its folder'})"
        )
    return (
        f"{what} is dense, and an adapter with mapping={config.mapping!r} is the codebooks alone, over a stored base "
        f"whose codes it reads. Make the base first, once for all adapters: hf_rps.get_rps_model(model, "
        f"RPSConfig(mapping={config.mapping!r}), calibration=...).save_pretrained(folder); load it, and call "
        f"get_peft_model then"
    )


def _check_map(what: str, config: RPSConfig, base: WeightMap) -> None:
    """Raise a ValueError where ``config`` records another map than ``base``, or asks for one."""
    if config.fingerprint not in (None, base.fingerprint):
        raise ValueError(
            f"the adapter's codebooks belong to the codes of the map {config.fingerprint}, and {what} has the map "
            f"{base.fingerprint}, so they would stand for other weights. Load the adapter on the compressed model that "
            f"it was made on ({config.base_model_name_or_path or 'its folder'})"
        )
    given = {"mapping": (config.mapping, base.mapping), "seed": (config.seed, base.seed)}
    given["init_std"] = (config.init_std, base.init_std)
    given |= {name: (getattr(config, name), base.options.get(name)) for name in MAPPINGS[config.mapping].options}
    for name, (value, found) in given.items():
        if value != found and not config.is_left_out(name):
            raise ValueError(
                f"RPSConfig({name}={value!r}) for {what}, whose map has {name}={found!r}: an adapter reads the codes "
                f"of its base, and has its map. Leave {name} out"
            )


def _check_choice(model: nn.Module, config: RPSConfig, layers: dict[str, RPSLayer]) -> None:
    """Raise a ValueError where a new ``config`` chooses other layers than the compressed ones, ``layers``."""
    if config.modules is not None:
        return
    layers = {name: layer for name, layer in layers.items() if layer.own_name is None}  # others follow these
    everything = copy.copy(config)
    if not is_explicit(config):
        everything.target_modules = "|".join(map(re.escape, layers))
    chosen = set(chosen_names(model, everything, dict(model.named_modules())))
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in _CHOICES if getattr(config, name) is not None)
    for name in sorted(chosen ^ layers.keys()):
        why = "is left out" if name in layers else "is not compressed (modules_to_save trains such modules)"
        raise ValueError(
            f"an adapter has codebooks for all {len(layers)} compressed layers of its base, and with {given} {name!r} "
            f"{why}; leave {' and '.join(n for n in _CHOICES if getattr(config, n) is not None)} out"
        )


def check_saved(model: nn.Module, config: PeftConfig) -> None:
    """Raise a ValueError where ``modules_to_save`` would copy compressed layers of ``model``: the copies would read a
    copy of the shared array that nobody saves."""
    saved = getattr(config, "modules_to_save", None) or ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(name.endswith(wanted) for wanted in saved):  # as PEFT matches them
            continue
        inner = next((m for m in module.modules() if isinstance(m, RPSLayer)), None)
        if inner is not None:
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r} matches {name!r}, where {inner.name!r} is compressed and "
                f"has no weight of its own that could be copied. Name modules that are dense"
            )
