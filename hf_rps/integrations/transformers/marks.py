"""What a compressed transformers model carries, so that it saves itself compactly and is otherwise as any model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers.quantizers import HfQuantizer

from hf_rps.integrations.model_card import TAGS
from hf_rps.psi.bank import Bank

_SAVED = "rps_saved"  # attribute of a marked model: the attributes that it had of its own before
_ABSENT = "absent"


def is_transformers_model(model: nn.Module) -> bool:
    """True for models that save themselves by a config."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def mark(model: nn.Module, quantizer: HfQuantizer, bank: Bank) -> None:
    """Make ``model`` and its base save themselves compactly, and otherwise behave as any trainable model.

    ``quantizer`` does the saving; its config records the bank's map.
    """
    config = quantizer.quantization_config
    config.record(bank.weight_map)
    for owner in _owners(model):
        tags = [*(tag for tag in owner.model_tags or () if tag not in TAGS), *TAGS]
        marks = {
            # names in the file are the module names: reverting them to legacy names would lose tensors in Trainer's
            # resume
            "_weight_conversions": [],
            "hf_quantizer": quantizer,
            "gather_sharded_state_dict_for_save": _keep_state,
            "quantization_method": "rps",
            "is_quantized": False,  # nothing that transformers forbids quantized models applies here
            # transformers writes them into the card of every push, where a reader can see what to import
            "model_tags": tags,
        }
        owner.__dict__.setdefault(_SAVED, {name: owner.__dict__.get(name, _ABSENT) for name in marks})
        for name, value in marks.items():
            setattr(owner, name, value)
        owner.config.quantization_config = config


def unmark(model: nn.Module) -> None:
    """Undo :func:`mark`."""
    for owner in _owners(model):
        for name, value in owner.__dict__.pop(_SAVED, {}).items():
            owner.__dict__.pop(name, None)
            if value is not _ABSENT:
                setattr(owner, name, value)
        owner.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)  # loading a checkpoint put it there
        for name in ("quantization_config", "_is_quantized"):
            owner.config.__dict__.pop(name, None)


def _keep_state(model: nn.Module, state: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
    """In the place of a sharded model's own gathering, which would lose the sentinel: the quantizer has gathered."""
    return state


def _owners(model: nn.Module) -> Iterable[nn.Module]:
    """The model and its base: either may be saved by itself."""
    base = model.base_model
    return [model] if base is model or not hasattr(base, "save_pretrained") else [model, base]
