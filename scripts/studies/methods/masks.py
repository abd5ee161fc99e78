"""Masks of pruned weights: chosen over all layers at once, put on a model, read back and folded in.

A mask is a bool tensor of a weight's shape, True where the weight stays; masks come as a dict by module name.
torch.nn.utils.prune holds them on the model: it keeps the trained values in ``weight_orig`` and sets
``weight = weight_orig * weight_mask`` before each pass, so that pruned weights stay zero while the others are trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_rps import RPSConfig
from hf_rps.conversion import find_bank
from hf_rps.targets import find_targets


def targeted_weights(model: nn.Module, config: RPSConfig | None = None) -> dict[str, Tensor]:
    """The weights that RPS would share, by module name, in the model's order and in the shapes they are stored in.

    Args:
        model: A dense model.
        config: Chooses the modules, as for RPS; its ratio is not read.

    Raises:
        ValueError: The model is compressed or pruned already, or nothing is targeted.
    """
    name = type(model).__name__
    if find_bank(model) is not None:
        raise ValueError(f"this {name} is compressed by hf_rps; call hf_rps.to_dense(model) before pruning it")
    if prune.is_pruned(model):
        raise ValueError(f"this {name} is pruned already; call remove_pruning(model) before pruning it again")
    return {candidate.name: candidate.module.weight for candidate in find_targets(model, config or RPSConfig())}


def check_kept(kept: int, n: int) -> None:
    """Raise ValueError unless ``kept`` is a whole number of weights from 1 to ``n``."""
    if isinstance(kept, bool) or not isinstance(kept, int) or not 1 <= kept <= n:
        raise ValueError(f"kept={kept!r} is not valid; expected a whole number of weights from 1 to {n:,}")


@torch.no_grad()
def keep_largest(scores: dict[str, Tensor], kept: int, within: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Masks of the ``kept`` largest scores over all modules together; of equal scores the first ones stay.

    Args:
        scores: Score of every weight, of any shape, by module name.
        kept: How many weights stay, exactly.
        within: Masks of the weights to choose from; by default all.

    Returns:
        For each module a bool tensor of its scores' shape and on their device.

    Raises:
        ValueError: ``kept`` is out of range, a score is not finite, or ``within`` is of other modules.

    >>> keep_largest({"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([3.0, 2.0])}, 2)
    {'a': tensor([[ True, False]]), 'b': tensor([ True, False])}
    """
    if within is not None and within.keys() != scores.keys():
        raise ValueError(f"within has masks of {sorted(within)}; expected those of the scored {sorted(scores)}")
    for name, score in scores.items():
        if not score.isfinite().all():
            bad = score.numel() - int(score.isfinite().sum())
            raise ValueError(
                f"{bad:,} of the {score.numel():,} scores of module {name!r} are NaN or infinite; check the batch that "
                f"they were computed on, or compute them in a wider dtype"
            )
    # kthvalue is linear in n and, unlike topk, says nothing about equal values: their order is settled below
    first = next(iter(scores.values()))
    flat = torch.cat([score.reshape(-1).to(first.device) for score in scores.values()])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if within is None:
        check_kept(kept, flat.numel())
    else:
        allowed = torch.cat([within[name].reshape(-1).to(first.device) for name in scores])
        check_kept(kept, int(allowed.sum()))
        flat = flat.masked_fill(~allowed, -torch.inf)
    smallest = flat.kthvalue(flat.numel() - kept + 1).values
    above, equal = flat > smallest, flat == smallest
    mask = above | (equal & (equal.cumsum(0) <= kept - above.sum()))
    parts = mask.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Put masks on ``model``, in place; a weight that is masked already keeps what both masks keep.

    Args:
        model: A dense or pruned model.
        masks: For each module's name a bool tensor of its weight's shape, True where the weight stays.

    Raises:
        ValueError: A name is no module with a weight, or a mask has another shape. The model is then as it was.
    """
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise ValueError(f"{type(model).__name__} has no module {name!r} with a weight; masks are of another model")
        if weight.shape != mask.shape:
            raise ValueError(
                f"the mask of module {name!r} has shape {tuple(mask.shape)} and its weight {tuple(weight.shape)}; "
                f"give a mask in the shape in which the module stores its weight"
            )
    for name, mask in masks.items():
        prune.custom_from_mask(modules[name], "weight", mask.to(modules[name].weight.device))


def _pruned_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "weight_mask") and prune.is_pruned(module)
    )


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that ``model`` carries, copies, by module name; empty for a model that is not pruned."""
    return {name: module.weight_mask.to(torch.bool, copy=True) for name, module in _pruned_modules(model)}


def remove_pruning(model: nn.Module) -> nn.Module:
    """Fold the masks into the weights, in place: a plain model again, with zeros, that save_pretrained writes as usual.

    A model that is not pruned stays as it is.
    """
    for _, module in list(_pruned_modules(model)):
        prune.remove(module, "weight")
    return model
