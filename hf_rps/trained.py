"""Is a weight trained, or as an initialiser left it? Its numbers tell, whatever way they came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 256  # rows and columns that are looked at, evenly spaced: no more than 65,536 numbers of any weight
THRESHOLD = 5.0  # normal scores; of independent numbers 3 in 10 million are above it


def looks_trained(weight: Tensor) -> bool:
    """True where the numbers of ``weight`` (rows, cols) differ by row or by column more than independent ones do.

    An initialiser draws independent numbers of one distribution, or an orthogonal or constant matrix, whose rows and
    columns are more alike still. Training makes some rows and columns large and gives them means of their own.

    >>> torch.manual_seed(0) and looks_trained(torch.randn(64, 64))
    False
    >>> looks_trained(torch.randn(64, 64) * torch.rand(64, 1).add(0.5))
    True
    """
    return score(weight) > THRESHOLD


@torch.no_grad()
def score(weight: Tensor) -> float:
    """The largest of four normal scores: of the means of w and of w squared, between rows and between columns."""
    rows, cols = (_evenly(size) for size in weight.shape)
    sample = weight.detach()[rows.to(weight.device)][:, cols.to(weight.device)].double().cpu()
    values = torch.stack([sample, sample.square()])
    return max(score for v in values for score in (_between_rows(v), _between_rows(v.t())))


def _evenly(size: int) -> Tensor:
    """Up to SIDE indices, evenly spaced."""
    kept = min(size, SIDE)
    return torch.arange(kept) * size // kept


def _between_rows(values: Tensor) -> float:
    """How much the row means of ``values`` (rows, cols) spread beyond what chance gives, as a normal score.

    One-way analysis of variance: if the numbers are exchangeable, the share of the rows in their variance, times
    their number less one, is nearly chi-squared with rows - 1 degrees of freedom, whatever their distribution (the
    kurtosis cancels). Wilson and Hilferty (1931) make a normal score of it.
    """
    rows, cols = values.shape
    degrees = rows - 1
    variance = values.var(correction=1).item() if values.numel() > 1 else 0.0
    spread = values.max().abs().item() ** 2
    if degrees == 0 or cols == 1 or variance <= 1e-20 * spread:  # nothing to compare, or one number everywhere
        return 0.0
    chi_squared = cols * degrees * values.mean(dim=1).var(correction=1).item() / variance
    width = 2 / (9 * degrees)
    return ((chi_squared / degrees) ** (1 / 3) - (1 - width)) / math.sqrt(width)
