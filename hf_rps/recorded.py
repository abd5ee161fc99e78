"""The layers that a recorded map names: of a checkpoint, or of a config that was made from a compressed model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from hf_rps.config import RPSSettings
from hf_rps.layers.kinds import Candidate, candidate_at
from hf_rps.mappings.base import Target
from hf_rps.names import Place, base_prefix

logger = logging.getLogger(__name__)


def recorded_candidates(
    model: nn.Module, targets: Sequence[Target], place: Place, remedy: str
) -> dict[str, Candidate | None]:
    """By name in the map, the weights of ``model`` that ``targets`` stand for; None where it has no such module.

    Raises:
        ValueError: One is of another kind or shape. ``remedy`` ends the message.
    """
    modules = dict(model.named_modules())
    found = {target.name: candidate_at(modules, place.module_name(target.name)) for target in targets}
    for target in targets:
        candidate = found[target.name]
        if candidate is not None:
            _check_shape(model, candidate, target, remedy)
    return found


def _check_shape(model: nn.Module, candidate: Candidate, target: Target, remedy: str) -> None:
    weight = None if candidate.kind is None else candidate.stored
    shape = None if weight is None else tuple(candidate.weight.shape)
    if shape != (target.out_features, target.in_features):
        raise ValueError(
            f"the recorded shared weight {target.name!r} has shape {(target.out_features, target.in_features)}, but in "
            f"{type(model).__name__} it is {shape or type(candidate.module).__name__}. {remedy}"
        )


def candidates_of_config(model: nn.Module, config: RPSSettings) -> tuple[dict[str, Candidate], list[Target]]:
    """By name, the weights of ``model`` that the map recorded in ``config`` shares, and all targets of the map.

    Raises:
        ValueError: The model has none of them, or one of another shape.
    """
    targets = config.recorded_targets()
    remedy = (
        "Use the config with a model of the same class and sizes as the one that it was made from, or make a new "
        "RPSConfig"
    )
    recorded = recorded_candidates(model, targets, Place(base_prefix(model)), remedy)
    found = {name: candidate for name, candidate in recorded.items() if candidate is not None}
    if not found:
        raise ValueError(
            f"this RPSConfig records the map of a model with {targets[0].name!r} ({len(targets)} such modules in all), "
            f"and {type(model).__name__} has none of them. {remedy}"
        )
    if len(found) < len(targets):
        absent = ", ".join(name for name in recorded if name not in found)
        logger.warning("%s does not use %d shared weights of the recorded map: %s",
                       type(model).__name__, len(targets) - len(found), absent)  # fmt: skip
    return found, targets
