"""Which modules of a model are shared: every attention and MLP projection, unless the config says otherwise.

In a convolutional network, whose body has no linear layer, every convolution takes their place.
"""

from __future__ import annotations

import logging
import re
from collections import Counter

import torch
from torch import nn

from hf_rps.config import RPSSettings
from hf_rps.layers.kinds import Candidate, candidates_of, kind_of, nouns, shareable_kind
from hf_rps.names import base_prefix, output_head_of
from hf_rps.tied import can_be_tied, holders_of

logger = logging.getLogger(__name__)

# Names of output heads that sit inside the base model (or whose model is its own base), over transformers' models
_HEAD_NAMES = frozenset({
    "lm_head", "lm_heads", "score", "classifier", "qa_outputs", "classification_head", "embed_out", "output_projection",
    "generation_head", "joint", "class_predictor", "class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head",
    "enc_out_class_embed", "enc_out_bbox_embed", "encoder_output_bbox_embed", "predict_state", "predict_action",
    "predict_return", "iou_prediction_head", "pred_obj_score_head", "class_labels_classifier", "bbox_predictor",
})  # fmt: skip


def _matches(patterns: list[str] | str, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _in_layers(config: RPSSettings, name: str) -> bool:
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
    if isinstance(getattr(module, "qweight", None), torch.Tensor):
        return f"is quantised ({type(module).__name__})"
    kind = kind_of(module)
    weights = [] if kind is None else [module._parameters.get(parameter) for parameter in kind.parameters]
    for weight in weights:
        if weight is not None and not (weight.dtype.is_floating_point and weight.element_size() >= 2):
            return f"has a weight of dtype {weight.dtype}"
    return None


def _read_by_torch(modules: dict[str, nn.Module]) -> set[nn.Module]:
    """Linear layers whose weights torch's own attention and transformer layers read in fused kernels."""
    owners = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return {child for owner in modules.values() if isinstance(owner, owners) for child in owner.modules()}


def _of_the_base(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of ``modules`` that are inside the base model."""
    prefix = base_prefix(model)
    return {name: module for name, module in modules.items() if name.startswith(prefix)}


def _default_names(model: nn.Module, modules: dict[str, nn.Module], adapters: bool) -> list[str]:
    """All layers that can be shared, quantised ones too, of the base model but those that are output heads.

    Kinds that have a field of the config are left out. Those that are a fallback (convolutions) come in where there
    are no others.
    """
    output = output_head_of(model)
    body = {
        name: module
        for name, module in _of_the_base(model, modules).items()
        if module is not output
        and _HEAD_NAMES.isdisjoint(name.split("."))
        and (_quantised(module) or shareable_kind(module))
    }
    kinds = {name: kind_of(module) for name, module in body.items()}
    kinds = {name: kind for name, kind in kinds.items() if kind is None or kind.field is None}
    names = [name for name, kind in kinds.items() if kind is None or not kind.fallback]
    return names or [name for name, kind in kinds.items() if kind.adapters or not adapters]


def _asked_for(config: RPSSettings, module: nn.Module) -> bool:
    """True for layers of a kind that a field of the config chooses, whatever ``target_modules`` are."""
    kind = kind_of(module)
    return kind is not None and kind.field is not None and getattr(config, kind.field)


def chosen_names(
    model: nn.Module, config: RPSSettings, modules: dict[str, nn.Module], adapters: bool = False
) -> list[str]:
    """The names that the config's fields choose, whether or not the modules can be shared."""
    if is_explicit(config):  # containers and activations have nothing to share, whatever a pattern matches
        matched = ((n, m) for n, m in modules.items() if _matches(config.target_modules, n))
        names = [name for name, module in matched if module._parameters or _quantised(module)]
    else:
        names = _default_names(model, modules, adapters or config.target_modules is not None)
    asked = (name for name, module in _of_the_base(model, modules).items() if _asked_for(config, module))
    chosen = {*names, *asked}
    names = [name for name in modules if name in chosen]
    kept_out = [rf"(^|.*\.){module}($|\..*)" for module in config.modules_to_save or ()]
    return [
        name
        for name in names
        if not (config.exclude_modules and _matches(config.exclude_modules, name))
        and not any(re.match(pattern, name) for pattern in kept_out)
        and _in_layers(config, f"{name}.")
    ]


def is_explicit(config: RPSSettings) -> bool:
    """True where ``target_modules`` names modules, False where the default choice holds."""
    return config.target_modules is not None and config.target_modules != "all-linear"


def find_targets(
    model: nn.Module, config: RPSSettings, modules: dict[str, nn.Module] | None = None, adapters: bool = False
) -> list[Candidate]:
    """The weights of ``model`` that ``config`` chooses, in the model's own order, each once.

    ``modules`` are the model's modules by name, where they are others than its ``named_modules()``: without the
    wrappers that adapters put around them. ``adapters``: leave out the kinds of layers that adapters can't take.

    Layers that can't be shared (tied to another module, read by torch's fused kernels, empty) stay dense, unless
    ``target_modules`` names them.

    Raises:
        ValueError: Nothing is chosen; a chosen module is quantised; a named one can't be shared.
    """
    modules = dict(model.named_modules()) if modules is None else modules
    holders, read_by_torch = holders_of(modules), _read_by_torch(modules)
    candidates, unfit, taken = [], [], set()
    for name in chosen_names(model, config, modules, adapters):
        module = modules[name]
        if quantised := _quantised(module):
            raise ValueError(
                f"module {name!r} {quantised}; RPS shares float weights. Load the model unquantised, or leave the "
                f"module out with exclude_modules."
            )
        problem = _problem(module, holders, read_by_torch, adapters)
        if problem is None:
            found = [candidate for candidate in candidates_of(name, module) if id(candidate.stored) not in taken]
            candidates += found
            taken.update(id(candidate.stored) for candidate in found)
            continue
        if _asked_for(config, module):
            raise ValueError(
                f"{kind_of(module).field}=True chooses {name!r}, which is {problem} and can't be shared. Name it in "
                f"exclude_modules to leave it dense."
            )
        if is_explicit(config):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name!r}, which is {problem} and can't be shared. "
                f"Leave it out of target_modules, or name it in exclude_modules."
            )
        unfit.append(f"{name} ({problem})")
    if not candidates:
        raise ValueError(_nothing_message(model, config, modules, unfit, adapters))
    _log_left_dense(modules, {c.name for c in candidates})
    return candidates


def _problem(
    module: nn.Module, holders: dict[int, list[Candidate]], read_by_torch: set[nn.Module], adapters: bool
) -> str | None:
    """Why a module can't be shared, or None. ``holders`` are by id the modules that hold each parameter."""
    kind = shareable_kind(module)
    if kind is not None and adapters and not kind.adapters:
        return f"a {type(module).__name__} (hf_rps.get_rps_model shares {kind.noun}, adapters don't)"
    if kind is None:
        names = nouns(adapters=False)
        known = " or ".join(name.removesuffix("s") for name in names)
        return f"a {type(module).__name__}, not a plain {known}"
    weights = [module._parameters[parameter] for parameter in kind.parameters]
    for weight in weights:
        others = [holder.name for holder in holders[id(weight)] if holder.module is not module]
        if others and (kind.field is None or not can_be_tied(holders[id(weight)])):
            return (
                f"tied to {others[0]!r}" if kind.field is None else f"tied to {others[0]!r}, which reads it otherwise"
            )
    if module in read_by_torch:
        return "part of a torch.nn attention or transformer layer, which reads its weight directly"
    return "empty" if any(weight.numel() == 0 for weight in weights) else None


def _nothing_message(
    model: nn.Module, config: RPSSettings, modules: dict[str, nn.Module], unfit: list[str], adapters: bool
) -> str:
    fields = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    given = ", ".join(f"{f}={getattr(config, f)!r}" for f in fields if getattr(config, f) is not None)
    found: dict[str, set[str]] = {"linear layers": set()}
    refused = set()
    for name, module in modules.items():
        kind = shareable_kind(module)
        if kind is not None and (kind.adapters or not adapters):
            found.setdefault(kind.noun, set()).add(name.rsplit(".", 1)[-1])
        elif kind is not None:
            refused.add(kind.noun)
    lists = [f"{noun} are {sorted(names) if names else '(it has none)'}" for noun, names in found.items()]
    others = (
        f" (its {', '.join(sorted(refused))} are shared by hf_rps.get_rps_model, not by adapters)" if refused else ""
    )
    return (
        f"no module of {type(model).__name__} is left to compress with {given or 'the default target_modules'}"
        f"{'; unfit are ' + ', '.join(unfit[:5]) if unfit else ''}. Its {' and its '.join(lists)}{others}; name "
        f"some of them in target_modules."
    )


def _log_left_dense(modules: dict[str, nn.Module], shared: set[str]) -> None:
    """Log the modules with weight matrices of their own that stay dense, counted by class and name."""
    left = Counter()
    for name, module in modules.items():
        if name not in shared and any(p is not None and p.ndim >= 2 for p in module._parameters.values()):
            left[f"{type(module).__name__} {re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)}"] += 1
    if left:
        logger.info("left dense: %s", ", ".join(f"{kind} ({count})" for kind, count in left.items()))
