"""PEFT's methods other than LoRA on a compressed model: refused where they reach for shared layers, before it changes.

PEFT knows layers by their class. Some methods raise in the middle of their work at one that they don't know, some
replace it by a copy of their own, and ``target_modules="all-linear"`` passes shared layers by without a word.
"""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_rps.conversion import shared_layers
from hf_rps.integrations.peft import lora
from hf_rps.integrations.peft.codebooks import ADAPTER, check_saved
from hf_rps.integrations.peft.model import RPSModel
from hf_rps.internals import wrap_method
from hf_rps.layers.base import RPSLayer

_TRAIN = (
    "Train it as it is: its shared array is as small as an adapter. Or adapt the dense model, with any PEFT method or "
    "with RPSConfig(mode='delta'); hf_rps.to_dense(model) makes this one dense"
)


def register() -> None:
    """Let every tuner look at the model first, once per process. PEFT has no hook of its own for that."""
    wrap_method(BaseTuner, "inject_adapter", _looking_first)
    lora.register()


def _looking_first(inject):
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        if not isinstance(self, RPSModel):  # which refuses compressed models itself
            check(self, model, self.peft_config[adapter_name], kwargs.get("state_dict"))
        return inject(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def check(
    tuner: BaseTuner, model: nn.Module, config: PeftConfig, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Refuse ``config`` where it chooses layers of ``model`` that read a shared array, or would save copies of them.

    ``state_dict``, where it is given, chooses the layers by its keys instead. Layers of a kind for which LoRA has a
    class, of this library or of the user's (``LoraConfig._register_custom_module``), are left to it.

    Raises:
        ValueError: It does; the message names the method, the layers and what to do instead.
    """
    shared = shared_layers(model)
    if not shared:
        return
    check_saved(model, config)
    custom = lora.introduce(config, model) if isinstance(tuner, LoraModel) else ()
    shared = {name: module for name, module in shared.items() if not isinstance(module, custom)}
    if not shared:
        return
    method = getattr(config.peft_type, "value", config.peft_type)
    what = f"{len(shared)} layers of this {type(model).__name__} share one array (get_rps_model)"
    if lora.means_all_linear(config):
        raise ValueError(
            f"target_modules={config.target_modules!r} of {method} would pass by all layers that are compressed: "
            f"{what}, and PEFT finds only those that were left dense. {_remedy(shared)}. To adapt layers that were "
            f"left dense, name them"
        )
    reached = _named_by(state_dict, method, shared) if state_dict is not None else _chosen(tuner, model, config, shared)
    if reached:
        raise ValueError(
            f"{method} can't adapt {reached[0]!r}, {len(reached)} such layers in all: {what}, so they have no weights "
            f"of their own. {_remedy(shared)}"
        )


def _remedy(shared: dict[str, RPSLayer]) -> str:
    maps = [layer.bank.weight_map for layer in shared.values()]
    learned = next((weight_map.mapping for weight_map in maps if weight_map.learned is not None), None)
    if learned is None:
        return _TRAIN
    return f"Its own adapters are codebooks: {ADAPTER.format(mapping=learned)}. {_TRAIN}"


def _chosen(tuner: BaseTuner, model: nn.Module, config: PeftConfig, shared: dict[str, RPSLayer]) -> list[str]:
    """The shared layers that ``config`` would reach, by PEFT's own rules."""
    if not hasattr(config, "target_modules"):
        return []
    try:  # on a copy: it writes the method's default for this model into the config
        config = tuner._prepare_adapter_config(copy.deepcopy(config), tuner.get_model_config(model))
    except ValueError:  # PEFT will say so itself
        return []
    if not config.target_modules:
        return []
    return [name for name in shared if tuner._check_target_module_exists(config, name)]


def _named_by(state_dict: dict[str, torch.Tensor], method: str, shared: dict[str, RPSLayer]) -> list[str]:
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(method, "")
    names = {key.rsplit(f".{prefix}", 1)[0] for key in state_dict}
    return [name for name in shared if name in names]
