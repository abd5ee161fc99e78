"""The native checkpoint: save_pretrained writes the shared array once, from_pretrained builds layers on meta.

RPS registers as a quantization method of transformers, which is the library's own extension point for models whose
stored form is not their dense form. ``config.json`` then carries a ``quantization_config`` with the whole map (names,
shapes and standard deviations of the targets, n, m, a fingerprint), and every weights file carries the fingerprint and
the id of the save it belongs to. A checkpoint loads only if all of it fits together.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_rps.config import RPSSettings
from hf_rps.conversion import find_banks, fit, install, reader_of_outside, revert, shared_layers, stand_ins
from hf_rps.initial import all_finite, array_dtype
from hf_rps.integrations.transformers import ties
from hf_rps.integrations.transformers.alignment import PADDING, align, padding
from hf_rps.integrations.transformers.callers import local_of
from hf_rps.integrations.transformers.dtypes import apply_dtype_plan
from hf_rps.integrations.transformers.keys import place_banks, psi_key, sentinel_keys
from hf_rps.integrations.transformers.marks import forget_name, is_marked, is_transformers_model, mark, unmark
from hf_rps.integrations.transformers.parts import parts_of
from hf_rps.integrations.transformers.quantization_config import (
    FORMAT_VERSION,
    GUARD,
    BankRecord,
    RPSQuantizationConfig,
)
from hf_rps.integrations.transformers.weights_files import (
    check_files,
    check_gathered,
    check_names,
    content_id,
    drop_tied,
    list_saved,
    whole_state,
)
from hf_rps.layers.base import FrozenParameter, RPSLayer
from hf_rps.layers.kinds import Candidate, kind_of
from hf_rps.names import BANK_NAME, LEGACY_PSI, Place, base_prefix, is_psi_key, map_name, outer_name
from hf_rps.psi.bank import Bank
from hf_rps.recorded import recorded_candidates
from hf_rps.tied import Readers

logger = logging.getLogger(__name__)

_LEAVE_SIZES = (
    "Load the checkpoint with the class and the version of transformers that wrote it, and leave the sizes in "
    "config.json as they were"
)


class _Patterns(set):
    """A set of patterns that may also be added to a list, as transformers 5.8 does where later versions unite sets."""

    def __add__(self, other):
        return [*self, *other]


class SaveArguments(NamedTuple):
    """What the running call of save_pretrained was given."""

    save_directory: str | os.PathLike | None = None
    variant: str | None = None
    is_main_process: bool = True
    state_dict: dict[str, Tensor] | None = None


class RPSQuantizer(HfQuantizer):
    """Loads and saves compressed models inside transformers' from_pretrained and save_pretrained.

    Attributes:
        saving: The arguments of the running call of save_pretrained, of which transformers tells a quantizer nothing.
    """

    def __init__(self, quantization_config, **kwargs):
        if isinstance(quantization_config, RPSSettings):  # from_pretrained(..., quantization_config=RPSConfig(...))
            quantization_config = RPSQuantizationConfig(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.saving = SaveArguments()

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, **kwargs):
        """Take back, before files are looked up, what keeps readers without hf_rps from going on; see GUARD."""
        config = local_of("get_hf_quantizer", "config")
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        """Build the compressed layers on the meta device. A dense checkpoint is loaded first and converted after."""
        if not self.pre_quantized:
            return
        config = self.quantization_config
        maps = [record.weight_map() for record in config.banks]
        names = check_files(checkpoint_files, config) if checkpoint_files is not None else None
        for record, weight_map in zip(config.banks, maps, strict=True):
            _install_recorded(model, record, weight_map, names)
        ties.forget(model)
        sentinels = sentinel_keys(model)
        if names is not None:
            check_names(model, _named_as_now(model, names, config), sentinels, _is_of_the_saved_class(model))
        patterns = [re.escape(key.removeprefix(base_prefix(model))) for key in sentinels]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = _Patterns([*ignored, *(rf"(^|\.){key}$" for key in patterns)])
        if isinstance(device_map, dict):
            place_banks(model, device_map)

    def update_weight_conversions(self, weight_conversions, model=None):
        """The renamings that loading begins with: of the array of an older format, to the name that it has here."""
        conversions = super().update_weight_conversions(weight_conversions, *([] if model is None else [model]))
        config = self.quantization_config
        if self.pre_quantized and config.format_version < FORMAT_VERSION:
            new = RPSQuantizationConfig(**(config.to_dict() | {"format_version": FORMAT_VERSION})).arrays()[0][0]
            renaming = WeightRenaming(rf"{BANK_NAME}\.{LEGACY_PSI}$", f"{BANK_NAME}.{new}")
            conversions = [*conversions, renaming]
        return conversions

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.is_quantized = False
            (record,) = self.quantization_config.banks
            compress(model, record.rps)
            return
        for bank in find_banks(model):
            _check_loaded(model, bank)
        _check_stored(model)
        for module in model.modules():  # transformers initialises layers only by class
            bias = module.bias if isinstance(module, RPSLayer) else None
            if bias is not None and not bias.is_meta and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)
        align(model)
        mark_whole(model)
        model.config.quantization_config.came_from(self.quantization_config)

    def get_state_dict_and_metadata(self, model):
        """What save_pretrained writes: all parameters, a sentinel for every array, and in the files' metadata what they
        belong to."""
        banks = find_banks(model)
        if not banks:
            return None, {}
        given = self.saving.state_dict
        state = whole_state(model, self.saving.is_main_process) if given is None else dict(given)
        if not self.saving.is_main_process:
            return state, {}
        if given is not None and not getattr(model, "_hf_peft_config_loaded", False):
            for bank in banks:
                check_gathered(state, psi_key(model, bank), (bank.weight_map.m,))
        drop_tied(model, state)
        config, save_id = self.quantization_config, content_id(state)
        config.note_save(self.saving.save_directory, self.saving.variant, save_id)
        for bank, key in zip(banks, sentinel_keys(model), strict=True):
            state[key] = torch.empty(bank.weight_map.sentinel_shape(), dtype=bank.psi.dtype)
        metadata = {
            "rps_format_version": str(FORMAT_VERSION),
            "rps_fingerprint": config.fingerprint,
            "rps_save_id": save_id,
            **list_saved(model, state),
        }
        return state, metadata | {PADDING: padding(state, metadata)}

    def _dequantize(self, model, dtype=None):
        decompress(model)
        return model


def _install_recorded(model: nn.Module, record: BankRecord, weight_map, names: set[str] | None) -> None:
    """Build the layers of a recorded array, in the part of ``model`` that they are recorded for.

    ``names`` are those of the tensors in the files, where that is known.
    """
    place = record.place.inside(base_prefix(model))
    found = recorded_candidates(model, weight_map.targets, place, _LEAVE_SIZES)
    missing = [name for name, candidate in found.items() if candidate is None and name not in record.unused_modules]
    if not any(found.values()) or (missing and _is_of_the_saved_class(model)):
        absent = missing or list(found)
        raise ValueError(
            f"the checkpoint shares the weights of {absent[0]!r} ({len(absent)} such in all), but "
            f"{type(model).__name__} has no such module. {_LEAVE_SIZES}"
        )
    if missing:
        logger.warning("%s does not use %d shared weights of the checkpoint: %s",
                       type(model).__name__, len(missing), ", ".join(missing))  # fmt: skip
    candidates: dict[str, Candidate] = {name: candidate for name, candidate in found.items() if candidate is not None}
    readers = _readers(model, record, place, candidates, names)
    apply_dtype_plan(model, [*candidates.values(), *(reader for o in readers.values() for reader in o.values())])
    dtype = array_dtype(candidates.values())
    bank = Bank(weight_map, record.rps.grad_scaling, device="meta", dtype=dtype)
    bank.settings = record.rps
    owner = None if record.is_at_the_base else model.get_submodule(place.base.removesuffix("."))
    install(model, bank, stand_ins(bank, candidates, readers), owner)


def _readers(
    model: nn.Module, record: BankRecord, place: Place, candidates: dict[str, Candidate], names: set[str] | None
) -> Readers:
    """The modules of ``model`` that read a target, too: those that the record names, and those that the class ties to
    it and that have no tensor of their own in the files, as a head on the files of a base model."""
    modules, prefix, known = dict(model.named_modules()), base_prefix(model), dict(record.tied)
    if record.is_at_the_base and names is not None:
        tables = {c.key: target for target, c in candidates.items() if c.kind.field is not None}
        for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if source in tables and key not in names:
                known[map_name(key.removesuffix(".weight"), prefix)] = tables[source]
    found: Readers = {}
    for own, target in known.items():
        name = place.module_name(own)
        if target in candidates and name in modules and modules[name] is not candidates[target].module:
            found.setdefault(target, {})[own] = Candidate(name, modules[name], kind_of(modules[name]))
    return found


def _named_as_now(model: nn.Module, names: set[str], config: RPSQuantizationConfig) -> set[str]:
    """The names of tensors in files, with that of an older format's array as it is called in ``model``."""
    if config.format_version == FORMAT_VERSION:
        return names
    return {psi_key(model, find_banks(model)[0]) if is_psi_key(name) else name for name in names}


def _check_loaded(model: nn.Module, bank: Bank) -> None:
    """Raise a ValueError unless the array has been loaded, with finite numbers. An offloaded one can't be looked at."""
    if bank.psi.is_meta and getattr(bank, "_hf_hook", None) is not None:
        return
    key = psi_key(model, bank)
    if not getattr(bank.psi, "_is_hf_initialized", False):
        given = local_of("from_pretrained", "state_dict") or {}
        others = [name.rpartition(".")[2] for name in given if is_psi_key(name)]
        raise ValueError(
            f"the checkpoint has no shared array {key} of {bank.weight_map.m} numbers, as its config records it: "
            + (bank.refusal(others[0]) if others else "it is incomplete, or belongs to another model")
        )
    if not all_finite(bank.psi):
        raise ValueError(
            f"the shared array {key} of the checkpoint holds values that are not finite; training diverged or the file "
            f"is damaged. Load an earlier checkpoint"
        )


def _check_stored(model: nn.Module) -> None:
    """Raise a ValueError unless all that learned maps have stored was loaded; work out what depends on it."""
    for name, layer in shared_layers(model).items():
        for key in layer.stored_names:
            tensor = layer._parameters[key]
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(
                    f"the checkpoint has no codes {name}.{key}, as its config records them: it is incomplete, or "
                    f"belongs to another model"
                )
            layer._parameters[key] = FrozenParameter(tensor.detach())
    for bank in find_banks(model):
        used = [layer.shared.matrix for layer in shared_layers(model).values() if layer.bank is bank]
        stored = [t for matrix in used for t in matrix.stored().values()]
        if stored and not any(tensor.is_meta for tensor in stored):
            bank.array.divisor.settle(used)


def _is_of_the_saved_class(model: nn.Module) -> bool:
    classes = getattr(model.config, "architectures", None)
    return isinstance(classes, (list, tuple)) and type(model).__name__ in classes


def mark_whole(model: nn.Module) -> None:
    """Let ``model``, one of transformers', save itself and every shared array inside it compactly."""
    mark(model, RPSQuantizer(RPSQuantizationConfig.of(model), pre_quantized=True))


def compress(model: nn.Module, settings: RPSSettings, batches: Sequence[Any] = ()) -> None:
    """Convert ``model``, or the models inside it, in place and, where they are transformers' models, let them save
    themselves compactly. All parts are fitted before the first is changed; ``batches`` calibrate a learned map."""
    parts = parts_of(model, settings)
    for fitted in [fit(part, settings, candidates, batches, model) for part, candidates in parts]:
        fitted.install()
        if is_transformers_model(fitted.model):
            mark_whole(fitted.model)
    ties.forget(model)
    forget_name(model)


def compress_as_recorded(model: nn.Module, config: RPSQuantizationConfig) -> None:
    """Convert a dense ``model`` with the maps that the ``config`` of another one records."""
    for record in config.banks:
        place = record.place.inside(base_prefix(model))
        name = "" if record.is_at_the_base else place.model.removesuffix(".")
        part = dict(model.named_modules()).get(name)
        if part is None:
            raise ValueError(
                f"this config records a shared array in {name!r}, and {type(model).__name__} has no such module: it is "
                f"the config of a model around it. Remove its quantization_config for a dense model, or use "
                f"get_rps_model(model, hf_rps.get_rps_config(compressed_model))"
            )
        fit(part, record.settings()).install()
    ties.forget(model)
    mark_whole(model)
    forget_name(model)


def decompress(model: nn.Module) -> None:
    """Undo :func:`compress`, for every part that is compressed."""
    revert(model)
    unmark(model)
    ties.remember(model)


def prepare_to_save(model: nn.Module) -> None:
    """Mark ``model`` as what it is now, whatever has been put into it or taken out of it since.

    Raises:
        ValueError: It is a part of a compressed model, whose shared array is outside.
    """
    banks, layers, outside = find_banks(model), shared_layers(model), reader_of_outside(model)
    if outside is not None:
        raise ValueError(
            f"this {type(model).__name__} can't be saved by itself: {outside!r} reads a shared array that belongs to "
            f"the model around it. Save that model; or compress this part by itself, get_rps_model(part, config), so "
            f"that it has an array of its own; or save it dense, after hf_rps.to_dense on the whole model"
        )
    for bank in banks:
        adapters = [] if bank.substitutes is None else bank.substitutes.names()
        if adapters and not getattr(model, "_hf_peft_config_loaded", False):  # else transformers saves the adapter
            raise ValueError(
                f"this {type(model).__name__} can't be saved by itself: its layers read the codebooks of the adapters "
                f"{adapters}. Save the adapters (save_pretrained of the PEFT model); or make a compressed model of one "
                f"(merge_and_unload), or the base again (unload), and save that"
            )
        if all(layer.bank is not bank for layer in layers.values()):
            head = outer_name(bank.weight_map.targets[0].name)
            raise ValueError(
                f"this {type(model).__name__} can't be saved by itself: it holds a shared array that no layer in it "
                f"reads, only {head!r} of the model that it was compressed with. Save that model, or call "
                f"hf_rps.to_dense on it first"
            )
    if banks:
        mark_whole(model)
    elif is_marked(model):
        unmark(model)


def register() -> None:
    """Register with transformers, once per process."""
    if "rps" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("rps")(RPSQuantizationConfig)
    if "rps" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("rps")(RPSQuantizer)
