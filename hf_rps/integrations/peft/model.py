"""RPS as a PEFT method: ``get_peft_model(model, RPSConfig(...))``, and everything else that takes a PEFT config.

A PEFT model is converted layer by layer, by PEFT; what is decided over all layers together (which layers, the map, the
size of the array) is decided before PEFT starts, so that a bad config changes nothing, and the array is made after PEFT
has finished, so that it is frozen and thawed by PEFT's rules. The map is recorded in ``adapter_config.json``, and a
tensor beside the array in the file names it, so that an adapter never loads onto another map.
"""

from __future__ import annotations

import contextlib

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, register_peft_method
from torch import nn

from hf_rps.conversion import find_banks, shared_layers, watch_passes
from hf_rps.initial import initialise
from hf_rps.integrations.peft.adapter_files import check_tensors, learnable_biases, sentinel_shape
from hf_rps.integrations.peft.bank import AdapterArray, AdapterBank, RPSTunerLayer
from hf_rps.integrations.peft.codebooks import CodebookBank, base_bank
from hf_rps.integrations.peft.config import ADAPTER_FORMAT, RPSConfig
from hf_rps.integrations.peft.layers import AdapterLinear, DeltaLinear, ReplaceLinear
from hf_rps.integrations.peft.merging import WeightedAdapters
from hf_rps.integrations.peft.peft_type import RPS
from hf_rps.integrations.peft.targets import adapter_targets
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import Candidate
from hf_rps.names import ADAPTERS_NAME, BANK_NAME
from hf_rps.psi.weight import SharedWeight
from hf_rps.targets import is_explicit


class RPSModel(WeightedAdapters, BaseTuner):
    """The tuner: a model some of whose linear layers read RPS adapters.

    ``RPSConfig(mode="replace")`` (default) puts shared weights in the place of the dense ones, which are freed;
    ``mode="delta"`` adds shared weights to them. The two don't mix on one model. On a model that is compressed with a
    learned map an adapter has codebooks of its own, and layers stay as they are (:mod:`.codebooks`).

    Raises:
        ValueError: The config or the model does not fit; nothing is changed then.
    """

    prefix = "rps_"
    tuner_layer_cls = RPSTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # not needed: the default targets are found in the model itself

    # ---- before PEFT touches the model

    def _check_new_adapter_config(self, config: RPSConfig) -> None:
        super()._check_new_adapter_config(config)
        others = {name: c for name, c in self.peft_config.items() if c is not config}
        for name, other in others.items():
            if not isinstance(other, RPSConfig):
                raise ValueError(
                    f"this model carries the adapter {name!r} of method {other.peft_type}; RPS adapters don't mix with "
                    f"other methods on one model"
                )
            if other.mode != config.mode:
                raise ValueError(
                    f"this model carries the adapter {name!r} of mode={other.mode!r}, and the new one has "
                    f"mode={config.mode!r}; the two don't mix on one model"
                )

    def _prepare_adapter_config(self, peft_config: RPSConfig, model_config: dict) -> RPSConfig:
        return peft_config

    def _prepare_model(self, peft_config: RPSConfig, model: nn.Module) -> None:
        """Choose the targets and make their map, with all the errors that there may be."""
        self._forget()
        if peft_config.is_learned or find_banks(model):
            self.__dict__["_base"] = base_bank(model, peft_config)
            return
        if not isinstance(getattr(model, BANK_NAME, None), (AdapterBank, type(None))):
            raise ValueError(
                f"{type(model).__name__} has an attribute {BANK_NAME!r} of its own, where the bank must go"
            )
        candidates, targets = adapter_targets(model, peft_config)
        if not candidates:
            return  # PEFT has a message for that
        weight_map = peft_config.weight_map(targets)
        if not is_explicit(peft_config):
            peft_config.target_modules = [c.name for c in candidates]
        self._candidates = {c.name: c for c in candidates}
        self._weight_map = weight_map

    def _forget(self) -> None:
        """Forget what :meth:`_prepare_model` has found."""
        self._candidates: dict[str, Candidate] = {}
        self.__dict__["_base"] = None  # a Bank, unregistered: the one whose array an adapter gets a substitute of

    def _check_target_module_exists(self, peft_config: RPSConfig, key: str):
        """True for the targets chosen; else what PEFT says of modules that are not targets (excluded, or no match)."""
        module = self.model.get_submodule(key)
        if isinstance(module, RPSLayer):
            chosen = module.bank is self._base or module.bank.substitutes is not None
        elif self._candidates:  # during injection
            chosen = key in self._candidates
        else:
            names = [name for name, config in self.peft_config.items() if config is peft_config]
            chosen = isinstance(module, AdapterLinear) and not module.shared.keys().isdisjoint(names)
        if chosen or peft_config.target_modules is None:
            return chosen
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return False if found else found

    # ---- injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put the layers in place, then make the adapter's array; the arguments are :class:`BaseTuner`'s.

        ``state_dict`` is not used: an adapter's array does not tell which modules read it, its config does.
        """
        config = self.peft_config[adapter_name]
        target_modules = config.target_modules
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if self._base is not None:
                self._add_codebooks(model, adapter_name, low_cpu_mem_usage)
            elif self._candidates:
                self._add_array(model, adapter_name, low_cpu_mem_usage)
        finally:
            # the user's config stays as it is, good for other models; what it led to is recorded beside its fields
            config.target_modules = target_modules
            self._forget()

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, (AdapterLinear, RPSLayer)):  # wrapped since an earlier adapter; or compressed: it stays
            return
        if peft_config.mode == "replace":
            layer = ReplaceLinear(target)
        else:
            layer = DeltaLinear(target, **get_quantization_kwargs(self.model))
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        """Replace a module in every parent that holds it: some models register one module twice."""
        for other in list(self.model.modules()):
            for name, module in other._modules.items():
                if module is child and other is not new_module:
                    other._modules[name] = new_module
        super()._replace_module(parent, child_name, new_module, child)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        if self._base is not None and any(self.peft_config[name].bias == "rps_only" for name in self.active_adapters):
            for layer in shared_layers(model).values():
                if layer.bias is not None:
                    layer.bias.requires_grad_(True)

    def _add_codebooks(self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """Make the adapter's array, which the compressed layers read while it is active."""
        bank = getattr(model, ADAPTERS_NAME, None)
        if bank is None or bank.base is not self._base:  # that of a model that was made dense since, without adapters
            bank = CodebookBank(self._base)
            model.add_module(ADAPTERS_NAME, bank)
            bank.set_adapter(self.active_adapters)
        array = bank.add_copy(adapter_name, self.peft_config[adapter_name].grad_scaling, low_cpu_mem_usage)
        self._introduce(model, adapter_name, bank, array)

    def _introduce(self, model: nn.Module, adapter_name: str, bank: AdapterBank, array: AdapterArray) -> None:
        """What is the same for all new arrays: trained if active, read in passes, expected where it is loaded."""
        config = self.peft_config[adapter_name]
        array.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        watch_passes(model, array.array.passes)
        if config.modules is not None:
            shape = sentinel_shape(array.weight_map, config.mode, config.format_version)
            bank.expect(adapter_name, shape, legacy=config.format_version is None and self._base is None)
        config.record(array.weight_map)

    def _add_array(self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """Make the adapter's array and let the layers read it. In replace mode the dense weights go."""
        config, weight_map, candidates = self.peft_config[adapter_name], self._weight_map, [*self._candidates.values()]
        bank = getattr(model, BANK_NAME, None)
        if bank is None:
            # after PEFT's injection, which takes a tuner layer found before it for an earlier adapter's
            bank = AdapterBank()
            model.add_module(BANK_NAME, bank)
            bank.set_adapter(self.active_adapters)
        likes = [c.stored for c in candidates if c.stored is not None]
        likes = [weight for weight in likes if weight.device.type != "meta"]  # where that of a quantised layer is
        device, dtype = (likes[0].device, likes[0].dtype) if likes else _device_and_dtype(model)
        device = torch.device("meta") if low_cpu_mem_usage else device
        array = bank.add(adapter_name, weight_map, config.grad_scaling, device, dtype)
        if not low_cpu_mem_usage:
            _initialise(array, candidates, config)
        for target, candidate in zip(weight_map.targets, candidates, strict=True):
            layer = model.get_submodule(candidate.name)
            layer.shared[adapter_name] = SharedWeight(target.name, array)
            if isinstance(layer, ReplaceLinear) and layer.shared.keys() == set(bank.rps_banks):
                layer.free_base()
        self._introduce(model, adapter_name, bank, array)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        banks = {name: module for name, module in self.model._modules.items() if isinstance(module, AdapterBank)}
        for bank in banks.values():
            if isinstance(bank, CodebookBank):
                bank.settle(merge, safe_merge, adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for name, bank in banks.items():
            bank.close()
            delattr(model, name)
        return model

    # ---- forward

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs):
        """Refuse what PEFT passes over without a word where a method does not know it."""
        if adapter_names is not None:
            raise ValueError(
                f"got adapter_names={adapter_names!r}, an adapter for every sample, and a batch reads one RPS adapter; "
                f"choose it by set_adapter, and run the samples of each adapter by themselves"
            )
        yield

    # ---- state dicts

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """What PEFT saves of an adapter, and beside its array an empty tensor whose shape tells the map."""
        to_save = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        bank = _adapter_bank(model)
        if bank is not None and adapter_name in bank.rps_banks:
            array = bank.rps_banks[adapter_name]
            config.record(array.weight_map)  # again: the same config may have been used for another model since
            for key in [key for key in to_save if key.endswith(f"rps_banks.{adapter_name}.{array.psi_name}")]:
                shape = sentinel_shape(array.weight_map, config.mode)
                to_save[f"{key.partition('rps_banks')[0]}rps_map"] = torch.empty(shape)
        return to_save

    @classmethod
    def _get_learnable_bias_state_dict(cls, model, state_dict, config):
        return learnable_biases(model, state_dict, config)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Check the tensors and the map, and leave the map's tensor out.

        Raises:
            ValueError: The adapter's array was made for another map or mode than this model's, or a tensor is missing
                or left over.
        """
        bank = _adapter_bank(model)
        if bank is not None and adapter_name in bank.rps_banks:
            bank.end_loading()
            array = bank.rps_banks[adapter_name]
            state_dict = dict(state_dict)
            shapes = {sentinel_shape(array.weight_map, config.mode, v) for v in (config.format_version, ADAPTER_FORMAT)}
            for key in [key for key in state_dict if key.endswith("rps_map")]:
                shape = tuple(state_dict.pop(key).shape)
                if shape not in shapes:
                    raise ValueError(
                        f"the weights of adapter {adapter_name!r} belong to the map {shape[-1]:08x}, but the model's "
                        f"adapter has the map {array.weight_map.fingerprint} and mode={config.mode!r}, so they would "
                        f"be read in the wrong places. "
                        f"The file and adapter_config.json are of different adapters, or the model's adapter "
                        f"was made with another config; load both from one folder"
                    )
                for old in [k for k in state_dict if k.endswith(".rps_psi")]:  # of an older format; its map is right
                    state_dict[old.replace("rps_psi", f"rps_banks.{array.psi_name}")] = state_dict.pop(old)
            dtypes = {key: tensor.dtype for key, tensor in state_dict.items()}
            check_tensors(model, config, adapter_name, dtypes, translated=True)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _adapter_bank(model: nn.Module) -> AdapterBank | None:
    return next((module for module in model.modules() if isinstance(module, AdapterBank)), None)


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype


def _initialise(bank: AdapterArray, candidates: list[Candidate], config: RPSConfig) -> None:
    weight_map = bank.weight_map
    if config.mode == "delta" and config.init_weights:
        nn.init.zeros_(bank.psi)
    elif any(candidate.stored is None for candidate in candidates):  # freed; the array will be loaded
        nn.init.normal_(bank.psi, std=weight_map.init_std)
    else:
        named = dict(zip((target.name for target in weight_map.targets), candidates, strict=True))
        initialise(bank.psi, bank.array, named, config.init_weights)


def register() -> None:
    """Register with PEFT, once per process."""
    if RPS not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="rps", config_cls=RPSConfig, model_cls=RPSModel)
