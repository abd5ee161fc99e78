"""The native checkpoint: save_pretrained writes the shared array once, from_pretrained builds layers on meta.

RPS registers as a quantization method of transformers, which is the library's own extension point for models whose
stored form is not their dense form. ``config.json`` then carries a ``quantization_config`` with the whole map (names,
shapes and standard deviations of the targets, n, m, a fingerprint), and every weights file carries the fingerprint and
the id of the save it belongs to. A checkpoint loads only if all of it fits together.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterable

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rps.bank import Bank
from hf_rps.config import RPSConfig
from hf_rps.convert import BANK_NAME, convert, find_bank, install, module_name, to_dense
from hf_rps.layers import RPSLinear
from hf_rps.mapping import Target, WeightMap
from hf_rps.targets import Conv1D, base_prefix

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MODULE = re.compile(r"(.+) (\d+)x(\d+) std (\S+)")
_RPS_FIELDS = tuple(f.name for f in dataclasses.fields(RPSConfig) if f.name not in
                    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                     "inference_mode"})  # fmt: skip


class RPSQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: an :class:`RPSConfig` and the map made with it.

    Args:
        config: The RPSConfig, or None to take its fields from ``fields`` (as read from config.json).
        fields: Fields of RPSConfig and, in a checkpoint: ``format_version``, ``n``, ``m``, ``fingerprint``,
            ``save_id``, ``modules`` (["NAME ROWSxCOLS std STD", ...], in map order) and ``unused_modules`` (targets
            that the saved model class does not have, such as the pooler of a masked language model).
    """

    def __init__(self, config: RPSConfig | None = None, quant_method: str = "rps", **fields):
        self.quant_method = quant_method
        self.format_version = fields.pop("format_version", FORMAT_VERSION)
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has RPS format_version={self.format_version!r}, and this hf_rps reads "
                f"{FORMAT_VERSION}; install the version of hf_rps that wrote it"
            )
        self.n: int | None = fields.pop("n", None)
        self.m: int | None = fields.pop("m", None)
        self.fingerprint: str | None = fields.pop("fingerprint", None)
        self.save_id: str | None = fields.pop("save_id", None)
        self.modules: list[str] | None = fields.pop("modules", None)
        self.unused_modules: list[str] = fields.pop("unused_modules", None) or []
        unknown = sorted(set(fields) - set(_RPS_FIELDS))
        if unknown:
            raise ValueError(f"quantization_config has unknown fields {unknown}; known are {list(_RPS_FIELDS)}")
        self.rps = copy.deepcopy(config) if config is not None else RPSConfig(**fields)

    def to_dict(self) -> dict:
        checkpoint = {k: v for k, v in self.__dict__.items() if k not in ("rps", "modules") and v not in (None, [])}
        settings = {name: copy.deepcopy(getattr(self.rps, name)) for name in _RPS_FIELDS}
        return checkpoint | settings | ({"modules": list(self.modules)} if self.modules else {})

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def record(self, weight_map: WeightMap) -> None:
        """Write the map into the config."""
        self.n, self.m, self.fingerprint = weight_map.n, weight_map.m, weight_map.fingerprint
        self.modules = [f"{t.name} {t.out_features}x{t.in_features} std {t.std!r}" for t in weight_map.targets]

    def weight_map(self) -> WeightMap:
        """Rebuild the recorded map and check it against the recorded n, m and fingerprint.

        Raises:
            ValueError: The record is incomplete or does not agree with itself.
        """
        if not isinstance(self.modules, list) or not self.modules:
            raise ValueError(
                "config.json has a quantization_config of method 'rps' without `modules`, so it does not say which "
                "weights are shared. It was edited or not written by hf_rps; restore the config.json of the checkpoint"
            )
        targets = []
        for text in self.modules:
            match = _MODULE.fullmatch(text) if isinstance(text, str) else None
            if match is None:
                raise ValueError(
                    f"quantization_config.modules holds {text!r}, expected 'NAME ROWSxCOLS std STD'; restore the "
                    f"config.json of the checkpoint"
                )
            targets.append(Target(match[1], int(match[2]), int(match[3]), float(match[4])))
        rps = self.rps
        weight_map = WeightMap(targets, ratio=rps.ratio, seed=rps.seed, sharing=rps.sharing, mapping=rps.mapping,
                               sign=rps.sign, init_std=rps.init_std)  # fmt: skip
        for field in ("n", "m", "fingerprint"):
            recorded, found = getattr(self, field), getattr(weight_map, field)
            if recorded != found:
                raise ValueError(
                    f"the checkpoint's {field} is {recorded!r}, but its modules, ratio={rps.ratio!r}, "
                    f"seed={rps.seed!r}, sharing={rps.sharing!r}, mapping={rps.mapping!r} and sign={rps.sign!r} "
                    f"give {found!r}. Its weights would be read in the wrong places; restore its config.json"
                )
        return weight_map


class RPSQuantizer(HfQuantizer):
    """Loads and saves compressed models inside transformers' from_pretrained and save_pretrained."""

    def __init__(self, quantization_config, **kwargs):
        if isinstance(quantization_config, RPSConfig):  # from_pretrained(..., quantization_config=RPSConfig(...))
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
        if checkpoint_files is not None:
            check_files(checkpoint_files, self.quantization_config)
        layers = self._compressed_layers(model, weight_map)
        bank = next(iter(layers.values())).bank
        install(model, bank, layers)
        sentinel = re.escape(sentinel_key(model).removeprefix(base_prefix(model)))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.){sentinel}$",
        }
        if isinstance(device_map, dict):
            _place_bank(model, device_map)

    def _compressed_layers(self, model, weight_map: WeightMap) -> dict[str, RPSLinear]:
        config, prefix = self.quantization_config, base_prefix(model)
        modules = dict(model.named_modules())
        found = {t.name: modules.get(module_name(t.name, prefix)) for t in weight_map.targets}
        missing = [name for name, module in found.items() if module is None and name not in config.unused_modules]
        same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        if len(missing) == len(found) or (missing and same_class):
            raise ValueError(
                f"the checkpoint shares the weights of {missing[0]!r} ({len(missing)} such in all), but "
                f"{type(model).__name__} has no such module. Load it with the class and the version of transformers "
                f"that wrote it, and leave the sizes in config.json as they were"
            )
        if missing:
            logger.warning("%s does not use %d shared weights of the checkpoint: %s",
                           type(model).__name__, len(missing), ", ".join(missing))  # fmt: skip
        config.unused_modules = [name for name, module in found.items() if module is None]
        bank = Bank(weight_map, config.rps.grad_scaling, device="meta", dtype=_target_dtype(model))
        layers = {}
        for target in weight_map.targets:
            module = found[target.name]
            if module is None:
                continue
            transposed = isinstance(module, Conv1D)
            weight = getattr(module, "weight", None)
            shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) else None
            shape = shape[::-1] if shape and transposed else shape
            if shape != (target.out_features, target.in_features):
                raise ValueError(
                    f"the checkpoint's shared weight {target.name!r} has shape "
                    f"{(target.out_features, target.in_features)}, but in {type(model).__name__} it is "
                    f"{shape or type(module).__name__}. Leave the sizes in config.json as they were"
                )
            layers[module_name(target.name, prefix)] = RPSLinear(target.name, bank, module, transposed)
        return layers

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.is_quantized = False
            convert(model, self.quantization_config.rps)
            return
        bank = find_bank(model)
        offloaded = bank.psi.is_meta and getattr(bank, "_hf_hook", None) is not None
        if not offloaded:
            if not getattr(bank.psi, "_is_hf_initialized", False):
                raise ValueError(
                    f"the checkpoint has no shared array {bank_prefix(model)}.psi of {bank.weight_map.m} numbers: it "
                    f"is incomplete, or belongs to another model"
                )
            if not torch.isfinite(bank.psi).all():
                raise ValueError(
                    f"the shared array {bank_prefix(model)}.psi of the checkpoint holds values that are not finite; "
                    f"training diverged or the file is damaged. Load an earlier checkpoint"
                )
        for module in model.modules():  # transformers initialises linear layers only by class
            bias = module.bias if isinstance(module, RPSLinear) else None
            if bias is not None and not bias.is_meta and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)
        _align(model)
        mark_compressed(model, self.quantization_config, bank)

    def get_state_dict_and_metadata(self, model):
        """What save_pretrained writes: all parameters, the sentinel, and in the files' metadata what they belong to."""
        bank = find_bank(model)
        if bank is None:
            return None, {}
        state = model.state_dict()
        first = next(module for module in model.modules() if isinstance(module, RPSLinear))
        config = self.quantization_config
        config.save_id = _content_id(state)
        state[sentinel_key(model)] = torch.empty(first.sentinel_shape(), dtype=bank.psi.dtype)
        saved = _saved_tensors(model, state)
        model.config.quantization_config = config
        return state, {
            "rps_format_version": str(FORMAT_VERSION),
            "rps_fingerprint": bank.weight_map.fingerprint,
            "rps_save_id": config.save_id,
            "rps_tensors": str(saved),
        }

    def _dequantize(self, model, dtype=None):
        return to_dense(model)


def bank_prefix(model: nn.Module) -> str:
    """State-dict prefix of the bank, without a trailing dot."""
    return base_prefix(model) + BANK_NAME


def sentinel_key(model: nn.Module) -> str:
    """Name of the empty tensor that stands in the file for one shared weight; see RPSLinear.sentinel_shape."""
    return next(name for name, module in model.named_modules() if isinstance(module, RPSLinear)) + ".weight"


def mark_compressed(model: nn.Module, config: RPSConfig | RPSQuantizationConfig, bank: Bank) -> None:
    """Make ``model`` and its base save themselves compactly, and otherwise behave as any trainable model."""
    if isinstance(config, RPSConfig):
        config = RPSQuantizationConfig(config)
    config.record(bank.weight_map)
    for owner in _owners(model):
        if "rps_saved_conversions" not in owner.__dict__:
            owner.rps_saved_conversions = owner.__dict__.get("_weight_conversions", "unset")
        # names in the file are the module names: reverting them to legacy names would lose tensors in Trainer's resume
        owner._weight_conversions = []
        owner.hf_quantizer = RPSQuantizer(config, pre_quantized=True)
        owner.quantization_method = "rps"
        owner.is_quantized = False  # nothing that transformers forbids quantized models applies here
        owner.config.quantization_config = config


def unmark_compressed(model: nn.Module) -> None:
    """Undo :func:`mark_compressed`."""
    for owner in _owners(model):
        saved = owner.__dict__.pop("rps_saved_conversions", "unset")
        owner.__dict__.pop("_weight_conversions", None)
        if saved != "unset":
            owner._weight_conversions = saved
        for name in ("hf_quantizer", "quantization_method", "is_quantized", "_keys_to_ignore_on_load_unexpected"):
            owner.__dict__.pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            owner.config.__dict__.pop(name, None)


def _owners(model: nn.Module) -> Iterable[nn.Module]:
    """The model and its base: either may be saved by itself."""
    base = model.base_model
    return [model] if base is model or not hasattr(base, "save_pretrained") else [model, base]


def _target_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


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


def _saved_tensors(model: nn.Module, state: dict[str, torch.Tensor]) -> int:
    """How many of the tensors save_pretrained will write: all but ignored and tied ones."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return len([key for key in state if key not in ignored and key not in tied])


def _content_id(state: dict[str, torch.Tensor]) -> str:
    """Digest of all tensors, so that equal models are saved as equal files; random where they are not in memory."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if tensor.is_meta or type(tensor).__name__ == "DTensor":
            return uuid.uuid4().hex
        data = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if data.numel():
            digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def check_files(files: list[str], config: RPSQuantizationConfig) -> None:
    """Refuse weights files that are truncated, foreign, incomplete or of another save than config.json.

    Raises:
        ValueError: With the file, what is wrong with it and what to do.
    """
    remedy = "The save was interrupted or files of two saves are mixed; load another checkpoint or save it again"
    names, expected = set(), None
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; compressed checkpoints are safetensors only")
        try:
            with safe_open(file, framework="pt") as reader:
                metadata, keys = reader.metadata() or {}, list(reader.keys())
        except (SafetensorError, OSError) as error:
            size = os.path.getsize(file) if os.path.exists(file) else 0
            raise ValueError(
                f"{file} ({size} bytes) is truncated or not a safetensors file ({error}). {remedy}"
            ) from error
        if "rps_fingerprint" not in metadata:
            raise ValueError(
                f"{file} was not written by hf_rps (it has no rps_fingerprint), but config.json beside it is of a "
                f"compressed model. Put the dense checkpoint's own config.json there, or the compressed weights"
            )
        for field in ("format_version", "fingerprint", "save_id"):
            found, wanted = metadata.get(f"rps_{field}"), str(getattr(config, field))
            if found != wanted:
                raise ValueError(f"{file} has rps_{field}={found!r}, but config.json says {wanted!r}. {remedy}")
        names.update(keys)
        expected = metadata.get("rps_tensors")
    if str(len(names)) != expected:
        raise ValueError(f"the checkpoint holds {len(names)} tensors of {expected} in {len(files)} files. {remedy}")
    if not any(key == f"{BANK_NAME}.psi" or key.endswith(f".{BANK_NAME}.psi") for key in names):
        raise ValueError(f"the checkpoint has no shared array ({BANK_NAME}.psi). {remedy}")


def register() -> None:
    """Register with transformers, once per process."""
    if "rps" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("rps")(RPSQuantizationConfig)
    if "rps" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("rps")(RPSQuantizer)
