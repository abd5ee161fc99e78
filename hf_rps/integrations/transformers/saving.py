"""Every save_pretrained passes here first, models that are made from the config of a compressed one, and a resize of
the embeddings.

A compressed model may be put into a model that knows nothing of it (an encoder under a head of one's own, in an
EncoderDecoderModel, in a Llava), and transformers asks only the outermost one's quantizer what to write. There is no
hook for that, so methods of PreTrainedModel are wrapped when hf_rps is imported.
"""

from __future__ import annotations

import inspect

from huggingface_hub import ModelHubMixin
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from hf_rps.conversion import find_banks, shared_layers
from hf_rps.integrations.transformers import adapters, resizing, ties
from hf_rps.integrations.transformers.marks import is_recorded
from hf_rps.integrations.transformers.quantization_config import RPSQuantizationConfig
from hf_rps.integrations.transformers.quantizer import (
    RPSQuantizer,
    SaveArguments,
    compress_as_recorded,
    prepare_to_save,
)
from hf_rps.internals import wrap_method


def _saving(original):
    """save_pretrained of a transformers model: it writes every shared array inside, or refuses."""
    signature = inspect.signature(original)

    def save_pretrained(self, *args, **kwargs):
        prepare_to_save(self)
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, RPSQuantizer):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        quantizer.quantization_config.is_being_saved = True
        quantizer.saving = SaveArguments(**{name: given[name] for name in SaveArguments._fields if name in given})
        try:
            return original(self, *args, **kwargs)
        finally:
            quantizer.saving = SaveArguments()
            quantizer.quantization_config.is_being_saved = False

    return save_pretrained


def _saving_elsewhere(original):
    """save_pretrained of huggingface_hub's mixin, which saves a state dict that its own from_pretrained fills up with
    random weights."""

    def save_pretrained(self, *args, **kwargs):
        if isinstance(self, nn.Module) and not isinstance(self, PreTrainedModel) and shared_layers(self):
            raise ValueError(
                f"this {type(self).__name__} holds weights that are compressed by hf_rps, and the from_pretrained of "
                f"{ModelHubMixin.__name__} would build it dense and fill them with random numbers. Save its "
                f"transformers models by themselves (model.part.save_pretrained); or save the state dict, and the map "
                f"beside it (hf_rps.get_rps_config(model).save_pretrained); or call hf_rps.to_dense(model) first"
            )
        return original(self, *args, **kwargs)

    return save_pretrained


def _from_config(original):
    """A model made from the config of a compressed one is compressed, with the same map and a fresh array."""

    def from_config(cls, config, **kwargs):
        model = original(cls, config, **kwargs)
        on_meta = any(parameter.is_meta for parameter in model.parameters())  # inside from_pretrained, for one
        if not on_meta and is_recorded(model.config) and not find_banks(model):
            record = model.config.quantization_config
            record = RPSQuantizationConfig.from_dict(record) if isinstance(record, dict) else record
            compress_as_recorded(model, record)
        return model

    return from_config


def register() -> None:
    """Wrap the methods, once per process."""
    wrap_method(PreTrainedModel, "save_pretrained", _saving)
    wrap_method(PreTrainedModel, "_from_config", _from_config)
    wrap_method(PeftAdapterMixin, "load_adapter", adapters.checking)
    wrap_method(PreTrainedModel, "get_expanded_tied_weights_keys", ties.of_parameters)
    wrap_method(PreTrainedModel, "tie_weights", ties.looking_first)
    wrap_method(PreTrainedModel, "resize_token_embeddings", resizing.looking_first)
    wrap_method(ModelHubMixin, "save_pretrained", _saving_elsewhere)
