"""Which modules of a model are shared: every attention and MLP projection, unless the config says otherwise.

In a convolutional network, whose body has no linear layer, every convolution takes their place.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from hf_rps.config import RPSConfig

logger = logging.getLogger(__name__)

# Names of output heads that sit inside the base model (or whose model is its own base), over transformers' models
_HEAD_NAMES = frozenset({
    "lm_head", "lm_heads", "score", "classifier", "qa_outputs", "classification_head", "embed_out", "output_projection",
    "generation_head", "joint", "class_predictor", "class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head",
    "enc_out_class_embed", "enc_out_bbox_embed", "encoder_output_bbox_embed", "predict_state", "predict_action",
    "predict_return", "iou_prediction_head", "pred_obj_score_head", "class_labels_classifier", "bbox_predictor",
})  # fmt: skip


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Candidate:
    """A module that can be shared: its full name and whether it stores its weight as (in, out), like Conv1D."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        """The weight as (out_features, in_features), where a convolution has all but its output channels as one."""
        if isinstance(self.module, _CONVOLUTIONS):
            return self.module.weight.flatten(1)
        return self.module.weight.t() if self.transposed else self.module.weight


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, transformers' Conv1D, and look-alikes that compute ``F.linear(x, weight, bias)``."""
    weight = getattr(module, "weight", None)
    if isinstance(module, Conv1D):
        return True
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return False
    if set(module._parameters) - {"weight", "bias"} or module._modules:
        return False
    if not isinstance(module, nn.Linear):
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if shape != tuple(weight.shape):
            return False
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


def is_convolution(module: nn.Module) -> bool:
    """True for nn.Conv1d, nn.Conv2d, nn.Conv3d and subclasses that compute the same from weight and bias alone."""
    kind = next((kind for kind in _CONVOLUTIONS if isinstance(module, kind)), None)
    if kind is None or set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    same = type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward
    return same and isinstance(module.weight, nn.Parameter) and not is_lazy(module.weight)


@torch.no_grad()
def _computes_linear(module: nn.Module) -> bool:
    """Probe a layer with a forward of its own: does it compute the linear map of its weight and bias?"""
    weight = module.weight
    if not weight.is_floating_point() or weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(3, -1)
    try:
        y, expected = module(x), F.linear(x, weight, module.bias)
        return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)
    except Exception:  # whatever else it computes, it is not a linear layer of one input
        return False


def base_model_of(model: nn.Module) -> nn.Module:
    """The body of a transformers model without its task head; the model itself for any other module."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def base_prefix(model: nn.Module) -> str:
    """Name of the base model inside ``model`` with a trailing dot, or '' where they are the same."""
    base = base_model_of(model)
    return next((f"{name}." for name, module in model.named_modules() if module is base and name), "")


def _matches(patterns: list[str] | str, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _in_layers(config: RPSConfig, name: str) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = config.layers_pattern or r"[^.]+"  # by default the first module list on the way
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in patterns)
    return any(match and int(match["index"]) in wanted for match in found)


def _quantised(module: nn.Module) -> str | None:
    """How a layer's weight is quantised, or None for float weights and layers without one."""
    weight = getattr(module, "weight", None)
    if isinstance(getattr(module, "qweight", None), torch.Tensor):
        return f"is quantised ({type(module).__name__})"
    if not (isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and isinstance(weight, nn.Parameter)):
        return None
    whole = weight.dtype.is_floating_point and weight.element_size() >= 2
    return None if whole else f"has a weight of dtype {weight.dtype}"


def _read_by_torch(modules: dict[str, nn.Module]) -> set[nn.Module]:
    """Linear layers whose weights torch's own attention and transformer layers read in fused kernels."""
    owners = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return {child for owner in modules.values() if isinstance(owner, owners) for child in owner.modules()}


def _default_names(model: nn.Module, modules: dict[str, nn.Module], convolutions: bool) -> list[str]:
    """All linear layers, quantised ones too, of the base model but those that are output heads.

    Where there is none, all convolutions in their place, if ``convolutions`` may be chosen.
    """
    base, prefix = base_model_of(model), base_prefix(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = {
        name: module
        for name, module in modules.items()
        if (base is model or name.startswith(prefix))
        and module is not output
        and _HEAD_NAMES.isdisjoint(name.split("."))
    }
    linear = {name: module for name, module in body.items() if not isinstance(module, _CONVOLUTIONS)}
    names = [name for name, module in linear.items() if _quantised(module) or is_linear(module)]
    if names or not convolutions:
        return names
    return [name for name, module in body.items() if _quantised(module) or is_convolution(module)]


def chosen_names(
    model: nn.Module, config: RPSConfig, modules: dict[str, nn.Module], convolutions: bool = True
) -> list[str]:
    """The names that the config's fields choose, whether or not the modules can be shared."""
    names = _default_names(model, modules, convolutions and config.target_modules is None)
    if is_explicit(config):  # containers and activations have nothing to share, whatever a pattern matches
        matched = ((n, m) for n, m in modules.items() if _matches(config.target_modules, n))
        names = [name for name, module in matched if module._parameters or _quantised(module)]
    kept_out = [rf"(^|.*\.){module}($|\..*)" for module in config.modules_to_save or ()]
    return [
        name
        for name in names
        if not (config.exclude_modules and _matches(config.exclude_modules, name))
        and not any(re.match(pattern, name) for pattern in kept_out)
        and _in_layers(config, f"{name}.")
    ]


def is_explicit(config: RPSConfig) -> bool:
    """True where ``target_modules`` names modules, False where the default choice holds."""
    return config.target_modules is not None and config.target_modules != "all-linear"


def find_targets(
    model: nn.Module, config: RPSConfig, modules: dict[str, nn.Module] | None = None, convolutions: bool = True
) -> list[Candidate]:
    """The modules of ``model`` that ``config`` chooses, in the model's own order, each once.

    ``modules`` are the model's modules by name, where they are others than its ``named_modules()``: without the
    wrappers that adapters put around them. ``convolutions`` says whether the caller can share convolutions too.

    Layers that can't be shared (tied to another module, read by torch's fused kernels, empty) stay dense, unless
    ``target_modules`` names them.

    Raises:
        ValueError: Nothing is chosen; a chosen module is quantised; a named one can't be shared.
    """
    modules = dict(model.named_modules()) if modules is None else modules
    uses = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    read_by_torch = _read_by_torch(modules)
    candidates, unfit = [], []
    for name in chosen_names(model, config, modules, convolutions):
        module = modules[name]
        if quantised := _quantised(module):
            raise ValueError(
                f"module {name!r} {quantised}; RPS shares float weights. Load the model unquantised, or leave the "
                f"module out with exclude_modules."
            )
        if is_convolution(module) and not convolutions:
            problem = f"a {type(module).__name__} (hf_rps.get_rps_model shares convolutions, adapters don't)"
        elif not is_linear(module) and not is_convolution(module):
            problem = f"a {type(module).__name__}, not a plain linear layer or convolution"
        elif uses[id(module.weight)] > 1:
            problem = "tied to another module"
        elif module in read_by_torch:
            problem = "part of a torch.nn attention or transformer layer, which reads its weight directly"
        elif module.weight.numel() == 0:
            problem = "empty"
        else:
            candidates.append(Candidate(name, module, isinstance(module, Conv1D)))
            continue
        if is_explicit(config):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name!r}, which is {problem} and can't be shared. "
                f"Leave it out of target_modules, or name it in exclude_modules."
            )
        unfit.append(f"{name} ({problem})")
    if not candidates:
        raise ValueError(_nothing_message(model, config, modules, unfit, convolutions))
    left = _left_dense(modules, {c.name for c in candidates})
    if left:
        logger.info("left dense: %s", ", ".join(f"{kind} ({count})" for kind, count in left.items()))
    return candidates


def _nothing_message(model: nn.Module, config: RPSConfig, modules: dict, unfit: list[str], convolutions: bool) -> str:
    fields = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    given = ", ".join(f"{f}={getattr(config, f)!r}" for f in fields if getattr(config, f) is not None)
    linear = {name.rsplit(".", 1)[-1] for name, module in modules.items() if is_linear(module)}
    convolutional = {name.rsplit(".", 1)[-1] for name, module in modules.items() if is_convolution(module)}
    others = ""
    if convolutional and convolutions:
        others = f" and its convolutions {sorted(convolutional)}"
    elif convolutional:
        others = " (its convolutions are shared by hf_rps.get_rps_model, not by adapters)"
    return (
        f"no module of {type(model).__name__} is left to compress with {given or 'the default target_modules'}"
        f"{'; unfit are ' + ', '.join(unfit[:5]) if unfit else ''}. Its linear layers are called "
        f"{sorted(linear) if linear else '(it has none)'}{others}; name some of them in target_modules."
    )


def _left_dense(modules: dict[str, nn.Module], shared: set[str]) -> dict[str, int]:
    """Modules with weight matrices of their own that stay dense, counted by class and name."""
    left = Counter()
    for name, module in modules.items():
        if name not in shared and any(p is not None and p.ndim >= 2 for p in module._parameters.values()):
            left[f"{type(module).__name__} {re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)}"] += 1
    return dict(left)
