"""What a compressed transformers model carries, so that it saves itself compactly and is otherwise as any model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers.quantizers import HfQuantizer

from hf_rps.integrations.model_card import TAGS
from hf_rps.integrations.transformers.resizing import resize_token_embeddings
from hf_rps.layers.base import RPSLayer
from hf_rps.psi.bank import Bank

_OWN = "rps_own_attributes"  # attribute of a marked model: what it had of _RESTORED before
# what a marked model carries: of the first two it may have had its own, which come back
_RESTORED = ("_weight_conversions", "model_tags")
_MARKS = (*_RESTORED, "hf_quantizer", "gather_sharded_state_dict_for_save", "quantization_method", "is_quantized",
          "_keys_to_ignore_on_load_unexpected", "_resize_token_embeddings")  # fmt: skip


def is_transformers_model(model: nn.Module) -> bool:
    """True for models that save themselves by a config."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def mark(model: nn.Module, quantizer: HfQuantizer, bank: Bank) -> None:
    """Make ``model`` and its base save themselves compactly, and otherwise behave as any trainable model.

    ``quantizer`` does the saving; its config records the bank's map.
    """
    config = quantizer.quantization_config
    config.record(bank.weight_map)
    if config.save_id is None:  # it was not loaded from a compressed checkpoint, of which it has the name
        _forget_name(model)
    for owner in _owners(model):
        own = {name: owner.__dict__[name] for name in _RESTORED if name in owner.__dict__}
        owner.__dict__.setdefault(_OWN, own)
        # names in the file are the module names: reverting them to legacy names would lose tensors in Trainer's resume
        owner._weight_conversions = []
        owner.hf_quantizer = quantizer
        owner.gather_sharded_state_dict_for_save = _keep_state
        owner._resize_token_embeddings = resize_token_embeddings
        owner.quantization_method = "rps"
        owner.is_quantized = False  # nothing that transformers forbids quantized models applies here
        owner.config.quantization_config = config
        # transformers writes them into the card of every push, where a reader can see what to import
        owner.model_tags = [*(tag for tag in owner.model_tags or () if tag not in TAGS), *TAGS]


def unmark(model: nn.Module) -> None:
    """Undo :func:`mark`, also on a model that came from a compressed checkpoint."""
    for owner in _owners(model):
        own = owner.__dict__.pop(_OWN, {})
        for name in _MARKS:
            owner.__dict__.pop(name, None)
        for name, value in own.items():
            setattr(owner, name, value)
        for name in ("quantization_config", "_is_quantized"):
            owner.config.__dict__.pop(name, None)


def _forget_name(model: nn.Module) -> None:
    """Take from ``model`` the name of the dense checkpoint it came from, as models have none that are in no checkpoint.

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
