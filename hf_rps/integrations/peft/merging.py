"""New adapters as weighted sums of others.

A weight is a linear function of psi, so where adapters have one map the sum of their weights is the weight of the sum
of their arrays: exact, of the same size, with no other choice to make.
"""

from __future__ import annotations

import copy
import math

import torch
from peft.utils import ModulesToSaveWrapper

from hf_rps.integrations.peft.bank import AdapterBank
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.array import Source


class WeightedAdapters:
    """What :class:`RPSModel` knows of sums of adapters; a mixin."""

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter ``adapter_name`` with psi = sum of weight times psi over ``adapters``: W is the same sum.

        Args:
            adapters: Names of adapters of one map: of one config (seed, ratio, targets and so on) on one base model.
            weights: A number for each of them, such as 1 / len(adapters) for their mean.
            adapter_name: Of the new one, which is frozen and not active; choose it by ``set_adapter``.
            combination_type: "linear". The others of PEFT's are for LoRA's factors.

        Raises:
            ValueError: The arguments don't fit, or the adapters have different maps, so that no array holds the sum of
                their weights. Nothing is added then.
        """
        self._check_sum(adapters, weights, adapter_name, combination_type)
        sources = [_source(self, name) for name in adapters]
        weight_map = _common_map(adapters, [source.array.weight_map for source in sources])
        total = sum(float(weight) * source.psi.double() for weight, source in zip(weights, sources, strict=True))
        self.peft_config[adapter_name] = _config_of(self.peft_config[adapters[0]], weight_map)
        self.inject_adapter(self.model, adapter_name)
        psi = _source(self, adapter_name).psi
        psi.copy_(total)
        for module in self.modules():  # nothing is loaded into the new adapter, whose file would name its map
            if hasattr(module, "rps_map"):
                module.rps_map.clear()

    def _check_sum(self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str) -> None:
        if combination_type != "linear":
            raise ValueError(
                f"combination_type={combination_type!r} is for LoRA's factors; a sum of RPS adapters of one map is "
                f"exact with combination_type='linear'"
            )
        if not isinstance(adapters, (list, tuple)) or not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"adapters must be a list of names and weights a number for each, got {adapters}, {weights}"
            )
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ValueError(f"there is no adapter {unknown[0]!r}; this model has {sorted(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another name, or delete it first")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite, got {list(weights)}")
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                copied = [adapter for adapter in adapters if adapter in module.modules_to_save]
                if copied:
                    raise ValueError(
                        f"the adapters {copied} have copies of {name!r} of their own (modules_to_save), which a sum of "
                        f"arrays does not have; merge_and_unload() them into models and average these"
                    )


def _source(tuner: WeightedAdapters, adapter_name: str) -> Source:
    """Where the layers of an adapter find its array."""
    bank = next(module for module in tuner.model.modules() if isinstance(module, AdapterBank))
    source = bank.rps_banks[adapter_name]
    if source.psi.is_meta:
        raise ValueError(f"the weights of adapter {adapter_name!r} have not been loaded yet; load them first")
    return source


def _common_map(adapters: list[str], maps: list[WeightMap]) -> WeightMap:
    other = next((i for i, weight_map in enumerate(maps) if weight_map.fingerprint != maps[0].fingerprint), None)
    if other is None:
        return maps[0]
    differing = [
        f"{field} {getattr(maps[0], field)!r} and {getattr(maps[other], field)!r}"
        for field in ("ratio", "seed", "sharing", "mapping", "sign", "init_std", "n", "m")
        if getattr(maps[0], field) != getattr(maps[other], field)
    ]
    raise ValueError(
        f"the adapters {adapters[0]!r} and {adapters[other]!r} have different maps "
        f"({', '.join(differing) or 'targets'}), so no shared array holds the sum of their weights. Train both with "
        f"one config; or merge each into a copy of the base model and average the copies; or, with mode='delta', "
        f"activate both: model.base_model.set_adapter({adapters!r}) adds their weights up"
    )


def _config_of(config, weight_map: WeightMap):
    """A copy of an adapter's config with the map recorded, as if read from a file: the new one gets the very same."""
    config = copy.deepcopy(config)
    config.modules = [str(target) for target in weight_map.targets]
    config.fingerprint, config.init_std = weight_map.fingerprint, weight_map.init_std
    return config
