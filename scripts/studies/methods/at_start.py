"""Pruning at initialisation: score all targeted weights of an untrained model, keep the best, train those."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_rps import RPSConfig
from studies.methods.masks import apply_masks, check_kept, keep_largest, targeted_weights
from studies.methods.scores import grasp_scores, magnitude_scores, random_scores, snip_scores, synflow_scores

SYNFLOW_ROUNDS = 100  # of the paper
NEEDS = {"random": "generator", "magnitude": None, "snip": "batches", "grasp": "batches", "synflow": "inputs"}


def prune_at_start(
    model: nn.Module,
    method: str,
    kept: int,
    *,
    config: RPSConfig | None = None,
    batches: Iterable[dict[str, Tensor]] | None = None,
    inputs: dict[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Keep ``kept`` of the targeted weights of an untrained model, in place; masks hold the others at zero.

    Args:
        model: A dense model.
        method: "random", "magnitude", "snip", "grasp" or "synflow"; see :mod:`studies.methods.scores`.
        kept: How many of all targeted weights stay, exactly.
        config: Chooses the weights, as for RPS; its ratio is not read.
        batches: For "snip" and "grasp": keyword arguments of the model's calls, with labels.
        inputs: For "synflow": keyword arguments of one call, all ones.
        generator: For "random".

    Returns:
        The masks, by module name; :func:`studies.methods.masks.remove_pruning` folds them into the weights.

    Raises:
        ValueError: An argument is not valid or what the method needs is missing. The model is then as it was.
    """
    if method not in NEEDS:
        raise ValueError(f"method={method!r} is not known; expected one of {', '.join(NEEDS)}")
    needs = NEEDS[method]
    if needs and {"batches": batches, "inputs": inputs, "generator": generator}[needs] is None:
        raise ValueError(f"method={method!r} needs {needs}, got none; give {needs}=...")
    n = sum(weight.numel() for weight in targeted_weights(model, config).values())
    check_kept(kept, n)
    if method == "synflow":
        masks = _synflow_masks(model, kept, n, inputs, config)
    elif method == "random":
        masks = keep_largest(random_scores(model, config, generator=generator), kept)
    elif method == "magnitude":
        masks = keep_largest(magnitude_scores(model, config), kept)
    else:
        scores = snip_scores if method == "snip" else grasp_scores
        masks = keep_largest(scores(model, batches, config), kept)
    apply_masks(model, masks)
    return masks


def _synflow_masks(
    model: nn.Module, kept: int, n: int, inputs: dict[str, Tensor], config: RPSConfig | None
) -> dict[str, Tensor]:
    """SynFlow's algorithm 1: after round k of 100, n · (kept / n)^(k / 100) weights are left, scored anew."""
    masks = None
    for k in range(1, SYNFLOW_ROUNDS + 1):
        scores = synflow_scores(model, inputs, config, masks=masks)
        masks = keep_largest(scores, round(n * (kept / n) ** (k / SYNFLOW_ROUNDS)), within=masks)
    return masks
