"""The native checkpoint: save_pretrained writes the shared array once, from_pretrained builds layers on meta.

RPS registers as a quantization method of transformers, which is the library's own extension point for models whose
stored form is not their dense form. ``config.json`` then carries a ``quantization_config`` with the whole map (names,
shapes and standard deviations of the targets, n, m, a fingerprint), and every weights file carries the fingerprint and
the id of the save it belongs to. A checkpoint loads only if all of it fits together.
"""

from __future__ import annotations

import inspect
import logging
import re

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_rps.config import RPSSettings
from hf_rps.conversion import convert, find_bank, install, revert, stand_ins
from hf_rps.initial import array_dtype
from hf_rps.integrations.transformers.dtypes import apply_dtype_plan
from hf_rps.integrations.transformers.marks import is_transformers_model, mark, unmark
from hf_rps.integrations.transformers.quantization_config import FORMAT_VERSION, RPSQuantizationConfig
from hf_rps.integrations.transformers.weights_files import (
    check_files,
    check_gathered,
    check_names,
    content_id,
    count_saved,
    drop_tied,
    whole_state,
)
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import Candidate, candidate_at
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.names import bank_prefix, base_prefix, module_name, psi_key, weight_key
from hf_rps.psi.bank import Bank

logger = logging.getLogger(__name__)


class _Patterns(set):
    """A set of patterns that may also be added to a list, as transformers 5.8 does where later versions unite sets."""

    def __add__(self, other):
        return [*self, *other]


class RPSQuantizer(HfQuantizer):
    """Loads and saves compressed models inside transformers' from_pretrained and save_pretrained."""

    def __init__(self, quantization_config, **kwargs):
        if isinstance(quantization_config, RPSSettings):  # from_pretrained(..., quantization_config=RPSConfig(...))
            quantization_config = RPSQuantizationConfig(quantization_config)
        super().__init__(quantization_config, **kwargs)

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        """Build the compressed layers on the meta device. A dense checkpoint is loaded first and converted after."""
        if not self.pre_quantized:
            return
        weight_map = self.quantization_config.weight_map()
        names = check_files(checkpoint_files, self.quantization_config) if checkpoint_files is not None else None
        layers = self._compressed_layers(model, weight_map)
        bank = next(iter(layers.values())).bank
        install(model, bank, layers)
        if names is not None and _is_of_the_saved_class(model):
            check_names(model, names, sentinel_key(model))
        sentinel = re.escape(sentinel_key(model).removeprefix(base_prefix(model)))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = _Patterns([*ignored, rf"(^|\.){sentinel}$"])
        if isinstance(device_map, dict):
            _place_bank(model, device_map)

    def _compressed_layers(self, model, weight_map: WeightMap) -> dict[str, RPSLayer]:
        config, prefix = self.quantization_config, base_prefix(model)
        modules = dict(model.named_modules())
        found = {t.name: candidate_at(modules, module_name(t.name, prefix)) for t in weight_map.targets}
        missing = [name for name, found_one in found.items() if found_one is None and name not in config.unused_modules]
        if not any(found.values()) or (missing and _is_of_the_saved_class(model)):
            absent = missing or list(found)
            raise ValueError(
                f"the checkpoint shares the weights of {absent[0]!r} ({len(absent)} such in all), but "
                f"{type(model).__name__} has no such module. Load it with the class and the version of transformers "
                f"that wrote it, and leave the sizes in config.json as they were"
            )
        if missing:
            logger.warning("%s does not use %d shared weights of the checkpoint: %s",
                           type(model).__name__, len(missing), ", ".join(missing))  # fmt: skip
        config.unused_modules = [name for name, candidate in found.items() if candidate is None]
        candidates = {name: candidate for name, candidate in found.items() if candidate is not None}
        for name, candidate in candidates.items():
            _check_shape(model, candidate, weight_map.target(name))
        apply_dtype_plan(model, candidates.values())
        bank = Bank(weight_map, config.rps.grad_scaling, device="meta", dtype=array_dtype(candidates.values()))
        return stand_ins(bank, candidates)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.is_quantized = False
            compress(model, self.quantization_config.rps)
            return
        bank = find_bank(model)
        offloaded = bank.psi.is_meta and getattr(bank, "_hf_hook", None) is not None
        if not offloaded:
            if not getattr(bank.psi, "_is_hf_initialized", False):
                raise ValueError(
                    f"the checkpoint has no shared array {psi_key(model)} of {bank.weight_map.m} numbers: it "
                    f"is incomplete, or belongs to another model"
                )
            if not torch.isfinite(bank.psi).all():
                raise ValueError(
                    f"the shared array {psi_key(model)} of the checkpoint holds values that are not finite; "
                    f"training diverged or the file is damaged. Load an earlier checkpoint"
                )
        for module in model.modules():  # transformers initialises layers only by class
            bias = module.bias if isinstance(module, RPSLayer) else None
            if bias is not None and not bias.is_meta and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)
        _align(model)
        mark(model, RPSQuantizer(self.quantization_config, pre_quantized=True), bank)

    def get_state_dict_and_metadata(self, model):
        """What save_pretrained writes: all parameters, the sentinel, and in the files' metadata what they belong to."""
        bank = find_bank(model)
        if bank is None:
            return None, {}
        is_main_process, given = _arguments_of_save_pretrained()
        state = whole_state(model, is_main_process) if given is None else dict(given)
        if not is_main_process:
            return state, {}
        if given is not None and not getattr(model, "_hf_peft_config_loaded", False):
            check_gathered(state, psi_key(model), (bank.weight_map.m,))
        drop_tied(model, state)
        config = self.quantization_config
        config.save_id = content_id(state)
        state[sentinel_key(model)] = torch.empty(bank.weight_map.sentinel_shape(), dtype=bank.psi.dtype)
        saved = count_saved(model, state)
        model.config.quantization_config = config
        return state, {
            "rps_format_version": str(FORMAT_VERSION),
            "rps_fingerprint": bank.weight_map.fingerprint,
            "rps_save_id": config.save_id,
            "rps_tensors": str(saved),
        }

    def _dequantize(self, model, dtype=None):
        decompress(model)
        return model


def _arguments_of_save_pretrained() -> tuple[bool, dict[str, Tensor] | None]:
    """``is_main_process`` and ``state_dict`` of the save_pretrained call that asks the quantizer for what to write.

    transformers hands on neither, and drops the state it was given. But Trainer and accelerate gather the state of a
    sharded model beforehand and save on the main process alone, where gathering it again would wait for ever. An
    override of save_pretrained on the model would have to hold the model, a cycle that keeps its memory.
    """
    frame = inspect.currentframe().f_back.f_back
    if frame is None or frame.f_code.co_name != "save_pretrained":
        return True, None
    return frame.f_locals.get("is_main_process", True), frame.f_locals.get("state_dict")


def _is_of_the_saved_class(model: nn.Module) -> bool:
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def _check_shape(model: nn.Module, candidate: Candidate, target: Target) -> None:
    """Refuse a model in which the weight that the checkpoint records as ``target`` is of another kind or shape."""
    weight = None if candidate.kind is None else candidate.stored
    shape = None if weight is None else tuple(candidate.weight.shape)
    if shape != (target.out_features, target.in_features):
        raise ValueError(
            f"the checkpoint's shared weight {target.name!r} has shape "
            f"{(target.out_features, target.in_features)}, but in {type(model).__name__} it is "
            f"{shape or type(candidate.module).__name__}. Leave the sizes in config.json as they were"
        )


def sentinel_key(model: nn.Module) -> str:
    """Name of the empty tensor that stands in the file for one shared weight, see WeightMap.sentinel_shape.

    A reader that does not know RPS finds a size mismatch there, instead of initialising a dense weight silently.
    """
    layer = next(module for module in model.modules() if isinstance(module, RPSLayer))
    # by the map: wrappers change the modules' names
    return weight_key(layer.name, layer.parameter, base_prefix(model))


def _align(model: nn.Module) -> None:
    """Move CPU parameters that lie at odd addresses of a mapped file to memory of torch's own, one by one.

    The last bit of a CPU matrix product depends on the address it reads from, and reloaded outputs must be bit-equal.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _place_bank(model: nn.Module, device_map: dict) -> None:
    """Give the bank a place in a device map that was written for the dense model: beside its first layer."""
    name = bank_prefix(model)
    if any(key == "" or name == key or name.startswith(f"{key}.") for key in device_map):
        return
    first = sentinel_key(model)
    owners = [key for key in device_map if first.startswith(f"{key}.")]
    if owners:
        device_map[name] = device_map[max(owners, key=len)]


def compress(model: nn.Module, settings: RPSSettings) -> None:
    """Convert ``model`` in place and, if it is one of transformers', let it save itself compactly."""
    bank = convert(model, settings)
    if is_transformers_model(model):
        mark(model, RPSQuantizer(RPSQuantizationConfig(settings), pre_quantized=True), bank)


def decompress(model: nn.Module) -> None:
    """Undo :func:`compress`."""
    revert(model)
    if is_transformers_model(model):
        unmark(model)


def register() -> None:
    """Register with transformers, once per process."""
    if "rps" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("rps")(RPSQuantizationConfig)
    if "rps" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("rps")(RPSQuantizer)
