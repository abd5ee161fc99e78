"""The tensors of an adapter: all of them are found in what is loaded, and nothing else is, or loading is refused.

PEFT and transformers only mention what is missing or left over in an adapter's file. An array that is missing would
leave the adapter as it was made, and a tensor whose module the config no longer names would go to the base model.
"""

from __future__ import annotations

import hashlib
import re

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_rps.conversion import shared_layers
from hf_rps.integrations.peft.bank import AdapterBank
from hf_rps.integrations.peft.config import ADAPTER_FORMAT, RPSConfig
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.names import is_psi

_MODE_FROM = 4  # the adapter format since which the sentinel tells a delta
_IN_WRAPPERS = re.compile(r"\.(modules_to_save|original_module)\.")


def sentinel_shape(weight_map: WeightMap, mode: str, version: int | None = ADAPTER_FORMAT) -> tuple[int, int]:
    """Shape of the empty tensor beside an adapter's array: it names the map and, of a delta, the mode.

    A config whose mode was changed would add to the base weights what was to replace them, or the other way round.
    """
    if mode == "delta" and (version or 0) >= _MODE_FROM:
        digest = hashlib.blake2b(f"{weight_map.fingerprint} delta".encode(), digest_size=4)
        return 0, int(digest.hexdigest(), 16)
    return weight_map.sentinel_shape()


def plain(key: str) -> str:
    """A name in the base model, whatever wrappers are around it."""
    return re.sub(r"^base_model\.model\.|_fsdp_wrapped_module\.|_orig_mod\.", "", key)


def check_tensors(
    model: nn.Module, config: RPSConfig, name: str, found: dict[str, torch.dtype], translated: bool
) -> None:
    """Refuse tensors that are not those of the adapter ``name``, which ``model`` has.

    Args:
        found: The dtypes by name, in a file or a state dict.
        translated: Whether the names of ``modules_to_save`` are already those inside the model.

    Raises:
        ValueError: A tensor is missing, left over, or of integers in the place of floating point.
    """
    place, bank = next((n, m) for n, m in model.named_modules() if isinstance(m, AdapterBank))
    place, found = plain(f"{place}."), {plain(key): dtype for key, dtype in found.items()}
    psi = f"{place}rps_banks.{bank.rps_banks[name].psi_name}"
    if config.format_version is None and not translated:  # the only name that such files have for it
        psi = f"{place}rps_psi"
    expected = {psi, *_others(model, config, name, translated)}
    missing = sorted(expected - found.keys())
    embeddings = {id(p) for layer in _embeddings(model) for p in layer.parameters()}  # saved where they were resized
    allowed = {plain(key) for key, p in model.named_parameters(remove_duplicate=False) if id(p) in embeddings}
    state = {plain(key): tensor for key, tensor in model.state_dict().items()}
    # a bias that was trained goes where it belongs, whatever this config says of biases
    allowed |= {key for key in state if key == "bias" or key.endswith(".bias")}
    extra = found.keys() - expected - allowed - {f"{place}rps_map"}
    extra = sorted(key for key in extra if not (key.endswith(".bias") and _IN_WRAPPERS.search(key)))
    what = f"needs {missing[0]!r}, which is missing" if missing else ""
    if extra:
        what += f"{' and' if what else ''} has no use for {extra[0]!r}, which is there"
        if is_psi(extra[0].rpartition(".")[2]):
            what += " and belongs to another map (the file and adapter_config.json are of different adapters)"
    for key in () if what else sorted(expected):
        is_float = key not in state or state[key].is_floating_point()
        if is_float and not found[key].is_floating_point:
            what = f"needs {key!r} in a dtype of floating point, not {found[key]}"
    if what:
        raise ValueError(
            f"the tensors are not those of the adapter {name!r} as its adapter_config.json has it: it {what}. The file "
            f"is damaged, or the config was changed (bias, modules_to_save, format_version); load both as they were "
            f"saved"
        )


def learnable_biases(model: nn.Module, state: dict[str, torch.Tensor], config: RPSConfig) -> dict[str, torch.Tensor]:
    """Of ``state``, the biases that an adapter trains: PEFT's choice, which knows the layers that an adapter wraps, and
    with "rps_only" those of compressed layers, which read its codebooks as they are."""
    found = BaseTuner._get_learnable_bias_state_dict(model, state, config)
    if config.bias == "rps_only":
        layers = {name for name, layer in shared_layers(model).items() if layer.bank.substitutes is not None}
        keys = [f"{name.removeprefix('_fsdp_wrapped_module.')}.bias" for name in layers]
        found |= {key: state[key] for key in keys if key in state}
    return found


def _others(model: nn.Module, config: RPSConfig, name: str, translated: bool) -> set[str]:
    """The names of what an adapter trains beside its array."""
    keys = learnable_biases(model, model.state_dict(), config)
    keys = [key for key in keys if not _IN_WRAPPERS.search(key)]  # which come by the wrappers' own names
    for module_name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            names = module.adapter_state_dict_load_map(name)
            keys = [*keys, *(f"{module_name}.{key}" for key in (names.values() if translated else names))]
    return {plain(key) for key in keys}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    layers = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, get)() if hasattr(model, get) else None
        except NotImplementedError:  # of models without token embeddings
            layer = None
        layers += [] if layer is None else [layer]
    return layers
