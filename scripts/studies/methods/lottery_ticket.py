"""Lottery tickets: train, prune the smallest weights, go back to an early state, train what is left, and again.

The pure pieces of a training script. Sources: 'Linear mode connectivity and the lottery ticket hypothesis' (Frankle,
Dziugaite, Roy, Carbin, ICML 2020) and 'Stabilizing the lottery ticket hypothesis' (2019), which rewind to a state of
early training instead of the initial one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_rps import RPSConfig
from studies.methods.masks import apply_masks, keep_largest, masks_of, remove_pruning, targeted_weights


def densities(compressions: Iterable[float], rate: float = 0.2) -> list[float]:
    """The shares of the weights that are left in each round after the dense one, falling, every wanted one among them.

    Each round removes the share ``rate`` of what is left, or less where that would jump over a wanted density.

    Args:
        compressions: Weights of the dense model over kept ones, at least 1; the rounds end at the largest.
        rate: In (0, 1); 0.2 in the papers.

    Returns:
        Numbers below 1, strictly falling; 1 / c for every compression c above 1 is one of them.

    Raises:
        ValueError: A compression is below 1 or infinite, there is none, or ``rate`` is out of range.

    >>> densities([2, 4], rate=0.4)
    [0.6, 0.5, 0.3, 0.25]
    """
    compressions = list(compressions)
    if not compressions or not all(1 <= c < float("inf") for c in compressions):
        raise ValueError(f"compressions={compressions!r} is not valid; expected finite numbers, 1 or more")
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate!r} is not valid; expected the share that a round removes, in (0, 1)")
    falling, density = [], 1.0
    for wanted in sorted({1 / c for c in compressions}, reverse=True):
        while density > wanted:
            following = (1 - rate) * density
            # rounding must not add a round that removes next to nothing
            density = following if following > wanted * (1 + 1e-9) else wanted
            falling.append(density)
    return falling


def global_magnitude_masks(
    model: nn.Module, kept: int, *, config: RPSConfig | None = None, within: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks of the ``kept`` largest trained weights, over all layers together, among those that are still kept.

    Args:
        model: A trained model, dense or pruned.
        kept: How many weights stay, exactly.
        config: Chooses the weights of a model that is not pruned and comes without ``within``.
        within: Masks of the weights that are still kept; by default those that the model carries, or all targeted ones.

    Raises:
        ValueError: ``kept`` is more than what is still kept, or a weight is not finite.
    """
    within = masks_of(model) if within is None else within
    if not within:
        within = {name: torch.ones_like(w, dtype=torch.bool) for name, w in targeted_weights(model, config).items()}
    modules = {name: model.get_submodule(name) for name in within}
    # of a pruned module, weight is as of the last pass, before the last optimizer step; weight_orig is what was trained
    scores = {name: getattr(m, "weight_orig", m.weight).detach().abs() for name, m in modules.items()}
    return keep_largest(scores, kept, within)


def rewind(model: nn.Module, state: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Set ``model`` back to an early state and put ``masks`` on it, in place; masks it carries come off.

    Args:
        model: A model, dense or pruned. Its parameters stay the same objects.
        state: A copy of the whole state dict of the dense model, ``copy.deepcopy(model.state_dict())``: parameters that
            are never pruned and BatchNorm's statistics go back too.
        masks: For each module's name a bool tensor of its weight's shape, True where the weight stays.

    Raises:
        ValueError: ``state`` is of another or of a pruned model, or shares memory with this one. The state's check
            comes after the masks that the model carried are off.
    """
    current = remove_pruning(model).state_dict()
    if differing := sorted(current.keys() ^ state.keys()):
        raise ValueError(
            f"state differs from the state dict of this {type(model).__name__} in {len(differing)} keys, such as "
            f"{differing[0]!r}; take it from the dense model, before it is pruned"
        )
    aliases = (name for name, value in state.items() if value.numel() and value.data_ptr() == current[name].data_ptr())
    if alias := next(aliases, None):
        raise ValueError(
            f"state[{alias!r}] is the model's own tensor, which training has changed; keep a copy, "
            f"copy.deepcopy(model.state_dict())"
        )
    model.load_state_dict(state)
    apply_masks(model, masks)
