"""What a compressed transformers model carries, so that it saves itself compactly and is otherwise as any model."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from hf_rps.integrations.model_card import TAGS
from hf_rps.layers.base import RPSLayer

_OWN = "rps_own_attributes"  # attribute of a marked model: what it had of _RESTORED before
_CONFIG = "rps_config"  # attribute of a model that has got a config object of its own: that object
# what a marked model carries: of the first two it may have had its own, which come back
_RESTORED = ("_weight_conversions", "model_tags")
_MARKS = (*_RESTORED, "hf_quantizer", "gather_sharded_state_dict_for_save", "quantization_method", "is_quantized",
          "_keys_to_ignore_on_load_unexpected")  # fmt: skip


def is_transformers_model(model: nn.Module) -> bool:
    """True for models that save themselves by a config (a SentenceTransformer, which has both, saves its parts)."""
    return isinstance(model, PreTrainedModel)


def is_marked(model: nn.Module) -> bool:
    """True for a model that carries the marks of a compressed one, whether or not it is."""
    config = getattr(model, "config", None)
    return _OWN in model.__dict__ or any(is_recorded(c) for c in (config, *_sub_configs(config)))


def is_recorded(config) -> bool:
    """True for a transformers config that says that its model is compressed by hf_rps."""
    record = getattr(config, "quantization_config", None)
    method = record.get("quant_method") if isinstance(record, dict) else getattr(record, "quant_method", None)
    return method == "rps"


def _sub_configs(config) -> list:
    return [getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ()]


def mark(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Make ``model`` and its base save themselves compactly, and otherwise behave as any trainable model.

    ``quantizer`` does the saving; its config records the maps. The models' config is another object afterwards: the
    one that they had may be that of other models.
    """
    own_config(model)
    for owner in _owners(model):
        own = {name: owner.__dict__[name] for name in _RESTORED if name in owner.__dict__}
        owner.__dict__.setdefault(_OWN, own)
        # names in the file are the module names: reverting them to legacy names would lose tensors in Trainer's resume
        owner._weight_conversions = []
        owner.hf_quantizer = quantizer
        owner.gather_sharded_state_dict_for_save = _keep_state
        owner.quantization_method = "rps"
        owner.is_quantized = False  # nothing that transformers forbids quantized models applies here
        owner.config.quantization_config = quantizer.quantization_config
        # transformers writes them into the card of every push, where a reader can see what to import
        owner.model_tags = [*(tag for tag in owner.model_tags or () if tag not in TAGS), *TAGS]


def unmark(model: nn.Module) -> None:
    """Undo :func:`mark` on a model and on all models inside it, also on those that came from a checkpoint."""
    for owner in [module for module in model.modules() if is_transformers_model(module) and is_marked(module)]:
        own = owner.__dict__.pop(_OWN, {})
        for name in _MARKS:
            owner.__dict__.pop(name, None)
        for name, value in own.items():
            setattr(owner, name, value)
        if any(is_recorded(config) for config in (owner.config, *_sub_configs(owner.config))):
            own_config(owner)
            for name in ("quantization_config", "_is_quantized"):
                owner.config.__dict__.pop(name, None)
        owner.__dict__.pop(_CONFIG, None)


def own_config(model: nn.Module) -> None:
    """Give ``model`` a config object of its own, without what the configs inside it say of compressed parts.

    Modules inside that hold the same object, or a part of it, hold the copy's afterwards. A model around this one keeps
    the old object.
    """
    if model.__dict__.get(_CONFIG) is model.config:
        return
    copies: dict = {}
    config = copy.deepcopy(model.config, copies)
    for module in model.modules():
        held = module.__dict__.get("config")
        if held is not None and id(held) in copies:
            module.config = copies[id(held)]
    model.config = model.__dict__[_CONFIG] = config
    for part in _sub_configs(config):
        if is_recorded(part):
            del part.quantization_config


def forget_name(model: nn.Module) -> None:
    """Take from ``model``, just compressed, the name of the dense checkpoint that it came from: it is in none any more.

    Others load that name again for a copy of the model (TRL its reference model) and would get the dense one. Making
    the model dense again doesn't bring the name back, since the weights are others.
    """
    for module in model.modules():
        if is_transformers_model(module) and any(isinstance(inner, RPSLayer) for inner in module.modules()):
            module.name_or_path = module.config.name_or_path = ""


def _keep_state(model: nn.Module, state: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
    """In the place of a sharded model's own gathering, which would lose the sentinel: the quantizer has gathered."""
    return state


def _owners(model: nn.Module) -> Iterable[nn.Module]:
    """The model and its base: either may be saved by itself."""
    base = model.base_model
    return [model] if base is model or not hasattr(base, "save_pretrained") else [model, base]
