"""The ``quantization_config`` of a compressed model's config.json: what was asked for, and the maps it led to."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rps.config import OPTIONS, RPSSettings
from hf_rps.conversion import bank_place, find_banks, shared_layers
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.integrations.transformers.callers import local_of
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.names import LEGACY_PSI, Place, base_prefix, psi_name
from hf_rps.psi.bank import Bank

# 1 left the default of init_std to be computed again, by another law; 2 called every shared array "psi"
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
LISTED_FROM = 3  # since then every weights file carries a digest of the list of tensors
# The name of weights that do not exist, for config.json's transformers_weights: readers without hf_rps, which would go
# on with random weights where ignore_mismatched_sizes=True defeats the sentinel, stop with an error that says this name
GUARD = "import-hf_rps-before-loading.safetensors"
_OTHERS = ("mode", "bias", "modules", "fingerprint")  # those that only adapters have, and the record's own
# what is not written where it is this, as it is with most maps: versions that lack the field read them, too
_LEFT_OUT = OPTIONS | {"learned": None, "share_embeddings": False}
_RPS_FIELDS = tuple(field.name for field in fields(RPSSettings) if field.name not in _OTHERS)
_AT_THE_BASE = Place("", "/")  # of the model that is saved: where nearly every bank is


class BankRecord:
    """One shared array in a checkpoint: an :class:`RPSConfig`, the map made with it, and where it is.

    Args:
        config: The RPSConfig, or None to take its fields from ``settings`` (as read from config.json).
        settings: Fields of RPSConfig and, in a checkpoint: ``n``, ``m``, ``fingerprint``, ``modules`` (["NAME ROWSxCOLS
            std STD", ...], in map order), ``unused_modules`` (targets that the saved model class does not have, such as
            the pooler of a masked language model), ``tied`` (by name, modules that read the weight of a target, as an
            output head may that of the embedding) and, unless the array is that of the saved model's base model,
            ``base`` and ``model``: the prefixes of a :class:`hf_rps.names.Place`, relative to that base model.
    """

    def __init__(self, config: RPSSettings | None = None, **settings):
        self.n: int | None = settings.pop("n", None)
        self.m: int | None = settings.pop("m", None)
        self.fingerprint: str | None = settings.pop("fingerprint", None)
        self.modules: list[str] | None = settings.pop("modules", None)
        self.unused_modules: list[str] = settings.pop("unused_modules", None) or []
        self.tied: dict[str, str] = settings.pop("tied", None) or {}
        if not (isinstance(self.tied, dict) and all(isinstance(v, str) for v in self.tied.values())):
            raise ValueError(
                f"quantization_config.tied must be names by name, got {self.tied!r}; restore the checkpoint's "
                f"config.json"
            )
        for name in ("modules", "unused_modules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise ValueError(
                    f"quantization_config.{name} must be a list of strings, got {value!r}; restore the checkpoint's "
                    f"config.json"
                )
        self.place = Place(settings.pop("base", _AT_THE_BASE.base), settings.pop("model", _AT_THE_BASE.model))
        if not (isinstance(self.place.base, str) and isinstance(self.place.model, str)):
            raise ValueError(f"quantization_config has {self.place}; restore the checkpoint's config.json")
        unknown = sorted(set(settings) - set(_RPS_FIELDS))
        if unknown:
            raise ValueError(f"quantization_config has unknown fields {unknown}; known are {list(_RPS_FIELDS)}")
        self.rps = copy.deepcopy(config) if config is not None else RPSConfig(**settings)

    @property
    def is_at_the_base(self) -> bool:
        """True for the array of the saved model's own base model."""
        return self.place.base == "" and self.place.model in ("", "/")

    def to_dict(self) -> dict:
        found = {name: getattr(self, name) for name in ("n", "m", "fingerprint", "unused_modules", "tied")}
        found = {name: value for name, value in found.items() if value not in (None, [], {})}
        if not self.is_at_the_base:
            found |= {"base": self.place.base, "model": self.place.model}
        settings = {name: copy.deepcopy(getattr(self.rps, name)) for name in _RPS_FIELDS}
        settings = {
            name: value for name, value in settings.items() if name not in _LEFT_OUT or value != _LEFT_OUT[name]
        }
        return found | settings | ({"modules": list(self.modules)} if self.modules else {})

    def record(self, weight_map: WeightMap) -> None:
        """Write the map into the record, and C as a number: its default may become another, or round differently."""
        self.n, self.m, self.fingerprint = weight_map.n, weight_map.m, weight_map.fingerprint
        self.rps.init_std, self.rps.learned = weight_map.init_std, weight_map.learned
        self.modules = [str(target) for target in weight_map.targets]

    def settings(self) -> RPSSettings:
        """The RPSConfig with which a dense model is compressed to the recorded map."""
        if not self.modules:
            return self.rps
        return replace(self.rps, modules=list(self.modules), fingerprint=self.fingerprint)

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
        try:
            targets = [Target.parse(text) for text in self.modules]
        except ValueError as error:
            raise ValueError(f"quantization_config.modules: {error}; restore the checkpoint's config.json") from None
        rps = self.rps
        weight_map = rps.weight_map(targets)
        for field in ("n", "m", "fingerprint"):
            recorded, found = getattr(self, field), getattr(weight_map, field)
            if recorded != found:
                raise ValueError(
                    f"the checkpoint's {field} is {recorded!r}, but its modules, ratio={rps.ratio!r}, "
                    f"seed={rps.seed!r}, sharing={rps.sharing!r}, mapping={rps.mapping!r} and sign={rps.sign!r} "
                    f"give {found!r}. Its weights would be read in the wrong places; restore its config.json"
                )
        return weight_map


class RPSQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: a :class:`BankRecord` for every shared array in it.

    In config.json the fields of the record are those of the config itself where there is one array, in the saved
    model's base model, as nearly always; else they are in a list, ``banks``.

    Args:
        config: The RPSConfig of a model that is to be compressed when it has been loaded.
        settings: What config.json says: ``format_version``, ``save_id``, ``variants`` (the same by the variant of
            weights files beside the others, such as "fp16"), and the fields of one :class:`BankRecord`, or ``banks``
            with those of several.

    Attributes:
        is_being_saved: Whether save_pretrained of the model is running.
    """

    is_being_saved = False

    def __init__(self, config: RPSSettings | None = None, quant_method: str = "rps", **settings):
        self.quant_method = quant_method
        self.format_version = settings.pop("format_version", FORMAT_VERSION)
        if self.format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"this checkpoint has RPS format_version={self.format_version!r}, and this hf_rps reads "
                f"{READABLE_VERSIONS}; install the version of hf_rps that wrote it"
            )
        self.save_id: str | None = settings.pop("save_id", None)
        self.variants: dict[str, str] = settings.pop("variants", None) or {}
        if not (isinstance(self.variants, dict) and all(isinstance(v, str) for v in self.variants.values())):
            raise ValueError(
                f"quantization_config.variants must be ids by name, got {self.variants!r}; restore the checkpoint's "
                f"config.json"
            )
        banks = settings.pop("banks", None)
        if banks is None:
            self.banks = [BankRecord(config, **settings)]
        elif isinstance(banks, list) and banks and all(isinstance(bank, dict) for bank in banks) and not settings:
            self.banks = [BankRecord(**copy.deepcopy(bank)) for bank in banks]
        else:
            raise ValueError(
                f"quantization_config.banks must be a list of records, with nothing beside it, got {banks!r} and "
                f"{sorted(settings)}; restore the checkpoint's config.json"
            )

    @classmethod
    def of(cls, model: nn.Module) -> RPSQuantizationConfig:
        """The record of every shared array inside ``model``."""
        config, layers = cls(), shared_layers(model)
        config.banks = []
        for bank in find_banks(model):
            record = record_of(bank)
            read = [layer for layer in layers.values() if layer.bank is bank]
            used = {layer.name for layer in read}
            record.tied = {layer.own_name: layer.name for layer in read if layer.own_name is not None}
            record.unused_modules = [t.name for t in bank.weight_map.targets if t.name not in used]
            record.place = bank_place(model, bank).relative_to(base_prefix(model))
            config.banks.append(record)
        return config

    @property
    def fingerprint(self) -> str:
        """That of the map, or of all maps."""
        return ",".join(str(record.fingerprint) for record in self.banks)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Of what config.json says.

        Raises:
            ValueError: from_pretrained of a compressed checkpoint was given a quantization config, too.
        """
        given = local_of("merge_quantization_configs", "quantization_config_from_args")
        if given is not None:
            raise ValueError(
                f"this checkpoint is compressed already, and from_pretrained got a {type(given).__name__} for it. Load "
                f"it without quantization_config; to compress or quantise it anew, load it, call "
                f"hf_rps.to_dense(model), and save the dense model first"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def get(self, name: str, default=None):
        """A field as config.json has it: transformers asks the config of a model in memory as it asks a dictionary."""
        return self.to_dict().get(name, default)

    def came_from(self, checkpoint: RPSQuantizationConfig) -> None:
        """Note which checkpoint this describes the model of: its files load with this config, too."""
        self.format_version, self.save_id = checkpoint.format_version, checkpoint.save_id
        self.variants = checkpoint.variants

    def note_save(self, folder: str | os.PathLike | None, variant: str | None, save_id: str) -> None:
        """Take note of a save into ``folder``, and of the variants that are there already for the same maps."""
        there = _config_in(folder)
        if there is not None and there.fingerprint == self.fingerprint:
            self.save_id, self.variants = there.save_id, there.variants
        if variant is None:
            self.save_id = save_id
        else:
            self.variants = self.variants | {variant: save_id}

    def save_id_of(self, file: str) -> str | None:
        """The id of the save that a weights file should belong to, by its name."""
        match = re.fullmatch(r"model\.(.+?)(-\d+-of-\d+)?\.safetensors", os.path.basename(file))
        return self.save_id if match is None else self.variants.get(match[1])

    def arrays(self) -> list[tuple[str, int]]:
        """Name (without its module's) and length of every shared array in the weights files, in order."""
        legacy = self.format_version < 3
        return sorted((LEGACY_PSI if legacy else psi_name(r.fingerprint), r.m) for r in self.banks)

    def to_dict(self) -> dict:
        head = {"quant_method": self.quant_method, "format_version": self.format_version}
        head |= {name: value for name in ("save_id", "variants") if (value := getattr(self, name))}
        if self.is_being_saved:
            # save_pretrained of a config drops the attribute, so it goes into the dictionary that is being made
            whole = local_of("to_dict", "output")
            if isinstance(whole, dict):
                whole["transformers_weights"] = GUARD
        if len(self.banks) == 1 and self.banks[0].is_at_the_base:
            return head | self.banks[0].to_dict()
        return head | {"banks": [record.to_dict() for record in self.banks]}

    def to_diff_dict(self) -> dict:
        return self.to_dict()


def _config_in(folder: str | os.PathLike | None) -> RPSQuantizationConfig | None:
    """What the config.json in a folder says, or None where there is none that can be read."""
    try:
        text = (Path(folder) / "config.json").read_text(encoding="utf-8")
        return RPSQuantizationConfig(**json.loads(text)["quantization_config"])
    except (OSError, TypeError, KeyError, ValueError):
        return None


def record_of(bank: Bank) -> BankRecord:
    """What there is to record of a shared array, wherever it is."""
    record = BankRecord(bank.settings)
    record.record(bank.weight_map)
    return record
