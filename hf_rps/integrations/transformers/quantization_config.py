"""The ``quantization_config`` of a compressed model's config.json: what was asked for, and the map it led to."""

from __future__ import annotations

import copy
from dataclasses import fields

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rps.config import RPSSettings
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap

FORMAT_VERSION = 2  # 1 left the default of init_std to be computed again, by another law
_ADAPTER_FIELDS = ("mode", "bias")  # those that only adapters have
_RPS_FIELDS = tuple(field.name for field in fields(RPSSettings) if field.name not in _ADAPTER_FIELDS)


class RPSQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: an :class:`RPSConfig` and the map made with it.

    Args:
        config: The RPSConfig, or None to take its fields from ``settings`` (as read from config.json).
        settings: Fields of RPSConfig and, in a checkpoint: ``format_version``, ``n``, ``m``, ``fingerprint``,
            ``save_id``, ``modules`` (["NAME ROWSxCOLS std STD", ...], in map order) and ``unused_modules`` (targets
            that the saved model class does not have, such as the pooler of a masked language model).
    """

    def __init__(self, config: RPSSettings | None = None, quant_method: str = "rps", **settings):
        self.quant_method = quant_method
        self.format_version = settings.pop("format_version", FORMAT_VERSION)
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has RPS format_version={self.format_version!r}, and this hf_rps reads "
                f"{FORMAT_VERSION}; install the version of hf_rps that wrote it"
            )
        self.n: int | None = settings.pop("n", None)
        self.m: int | None = settings.pop("m", None)
        self.fingerprint: str | None = settings.pop("fingerprint", None)
        self.save_id: str | None = settings.pop("save_id", None)
        self.modules: list[str] | None = settings.pop("modules", None)
        self.unused_modules: list[str] = settings.pop("unused_modules", None) or []
        for name in ("modules", "unused_modules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise ValueError(
                    f"quantization_config.{name} must be a list of strings, got {value!r}; restore the checkpoint's "
                    f"config.json"
                )
        unknown = sorted(set(settings) - set(_RPS_FIELDS))
        if unknown:
            raise ValueError(f"quantization_config has unknown fields {unknown}; known are {list(_RPS_FIELDS)}")
        self.rps = copy.deepcopy(config) if config is not None else RPSConfig(**settings)

    def to_dict(self) -> dict:
        checkpoint = {k: v for k, v in self.__dict__.items() if k not in ("rps", "modules") and v not in (None, [])}
        settings = {name: copy.deepcopy(getattr(self.rps, name)) for name in _RPS_FIELDS}
        return checkpoint | settings | ({"modules": list(self.modules)} if self.modules else {})

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def record(self, weight_map: WeightMap) -> None:
        """Write the map into the config, and C as a number: its default may become another, or round differently."""
        self.n, self.m, self.fingerprint = weight_map.n, weight_map.m, weight_map.fingerprint
        self.rps.init_std = weight_map.init_std
        self.modules = [str(target) for target in weight_map.targets]

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
