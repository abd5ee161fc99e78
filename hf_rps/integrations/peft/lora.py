"""LoRA on a compressed model: its shared arrays are frozen, and low-rank matrices of PEFT's own class learn beside it.

That is QLoRA with another base: codes and codebooks (or a drawn map) instead of NF4. PEFT knows layers by their class;
``LoraConfig._register_custom_module`` is its way to tell it of others, for as long as a config is in memory.
"""

from __future__ import annotations

import warnings

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from hf_rps.internals import wrap_method
from hf_rps.layers.linear import RPSLinear
from hf_rps.names import output_head_of

# what can be drawn without a change of the base's weights; PEFT's other ways take out of them what they put in
_INITS = (True, False, "gaussian", "orthogonal", "eva")


class RPSLoraLinear(Linear):
    """PEFT's LoRA layer around a layer with a shared weight, into which nothing can be merged."""

    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():  # PEFT warns of classes that it does not know
            warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)
            super().__init__(*args, **kwargs)


def introduce(config: LoraConfig, model: nn.Module) -> tuple[type, ...]:
    """Tell LoRA of linear layers with shared weights, unless the user has given it a class for them.

    "all-linear" becomes the names of all linear layers, shared ones too, as PEFT itself would write them.

    Returns:
        The classes of layers that ``config`` has a class for.

    Raises:
        ValueError: ``init_lora_weights`` would change the base's weights, which are not stored.
    """
    known = tuple(config._custom_modules or ())
    if not any(issubclass(RPSLinear, kind) for kind in known):
        if config.init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weights of the base, and those of a "
                f"compressed model are made from a shared array; leave it out, or take one of {list(_INITS[2:])}"
            )
        config._register_custom_module({RPSLinear: RPSLoraLinear})
    if means_all_linear(config):
        heads = {getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES} | {output_head_of(model)}
        shared = {n for n, m in model.named_modules() if isinstance(m, RPSLinear) and m not in heads}
        config.target_modules = shared | set(_maybe_include_all_linear_layers(config, model).target_modules)
    return tuple(config._custom_modules)


def means_all_linear(config: PeftConfig) -> bool:
    """True where ``target_modules`` is PEFT's word for all linear layers, however it is spelled."""
    chosen = getattr(config, "target_modules", None)
    return isinstance(chosen, str) and chosen.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def register() -> None:
    """Let LoRA look before it merges, once per process."""
    wrap_method(LoraModel, "_check_merge_allowed", _looking_before_merging)


def _looking_before_merging(check):
    def _check_merge_allowed(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, RPSLoraLinear):
                raise ValueError(
                    f"LoRA can't be merged into {name!r}, whose weight is made from a shared array that other layers "
                    f"read, too. Keep the adapter beside its base (unload() takes it off); or save it, load it on "
                    f"hf_rps.to_dense(base), and merge it there"
                )
        check(self)

    return _check_merge_allowed
