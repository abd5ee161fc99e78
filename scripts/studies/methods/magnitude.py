"""Magnitude pruning of the weights that RPS would share: the smallest become zero, and stay zero in training.

Sources: 'Learning both weights and connections for efficient neural networks' (Han et al., NeurIPS 2015), global over
all layers as in 'The lottery ticket hypothesis' (ICLR 2019).
"""

from __future__ import annotations

import math

from torch import nn

from hf_rps import RPSConfig
from studies.methods.masks import apply_masks, keep_largest, remove_pruning, targeted_weights
from studies.methods.scores import magnitude_scores

__all__ = ["most_kept", "prune_by_magnitude", "remove_pruning", "sparse_bytes"]

_INDEX_BYTES = 4


def sparse_bytes(kept: int, n: int, value_bytes: int = 4) -> int:
    """Bytes that ``kept`` of ``n`` weights take: their values and where they are, or all n where that is smaller.

    Where they are is told by one bit per weight or by an index of four bytes per kept weight, whichever is smaller.

    >>> sparse_bytes(100, 1000), sparse_bytes(10, 1000), sparse_bytes(1000, 1000)
    (525, 80, 4000)
    """
    return min(kept * value_bytes + min(math.ceil(n / 8), kept * _INDEX_BYTES), n * value_bytes)


def most_kept(stored_ratio: float, n: int, value_bytes: int = 4) -> int:
    """How many of ``n`` weights fit into ``stored_ratio`` of their dense bytes; see :func:`sparse_bytes`.

    >>> most_kept(0.5, 1000), most_kept(0.02, 1000), most_kept(1, 1000)
    (468, 10, 1000)
    """
    budget = round(stored_ratio * n * value_bytes, 6)
    if budget >= n * value_bytes:
        return n
    with_mask = (budget - math.ceil(n / 8)) // value_bytes
    return max(0, int(with_mask), int(budget // (value_bytes + _INDEX_BYTES)))


def prune_by_magnitude(model: nn.Module, stored_ratio: float, config: RPSConfig | None = None) -> int:
    """Set the weights of the smallest magnitude to zero, in place, among all that ``config`` targets.

    A mask holds them at zero while the others are trained; :func:`remove_pruning` folds it into the weights.

    Args:
        model: A dense model.
        stored_ratio: Bytes of a sparse checkpoint of the targeted weights over their dense bytes, in (0, 1]. It pays
            for the kept values and for where they are (:func:`sparse_bytes`), so fewer than this share are kept.
        config: Chooses the weights, as for RPS; its ratio is not read.

    Returns:
        How many weights are kept.

    Raises:
        ValueError: ``stored_ratio`` is out of range or can't hold one weight, or the model is compressed or pruned.
    """
    if not 0 < stored_ratio <= 1:
        raise ValueError(
            f"stored_ratio={stored_ratio!r} is not valid; expected a number in (0, 1], the share of the bytes to store"
        )
    weights = list(targeted_weights(model, config).values())
    n = sum(weight.numel() for weight in weights)
    kept = most_kept(stored_ratio, n, weights[0].element_size())
    if kept == 0:
        raise ValueError(
            f"stored_ratio={stored_ratio!r} of the {n:,} targeted weights of this {type(model).__name__} can't hold "
            f"one weight and its index; raise it"
        )
    apply_masks(model, keep_largest(magnitude_scores(model, config), kept))
    return kept
