"""Low-rank factorised training of the weights that RPS would share: every one becomes a product of two thin ones.

Sources: 'Initialization and regularization of factorized neural layers' (Khodak et al., ICLR 2021) for training the
factors from their spectral initialization, but without its Frobenius decay, so that every method has the same recipe;
'Convolutional neural networks with low-rank regularization' (Tai et al., ICLR 2016) for low-rank convolutions, here as
a full kernel with r channels and a 1 x 1 one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_rps import RPSConfig
from hf_rps.conversion import find_bank, replace_modules
from hf_rps.initial import check_weight
from hf_rps.layers.kinds import Candidate, TransposedLinear
from hf_rps.targets import find_targets
from studies.methods import BudgetError


def spectral_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) and V (rank, in), whose product is the matrix of this rank nearest to ``weight`` (out, in).

    The singular values are split evenly: with W = P diag(s) Q, U = P sqrt(s) and V = sqrt(s) Q, cut to ``rank``. They
    are computed in float32 at least, and are of the weight's dtype.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank={rank} is not valid for a weight of shape {tuple(weight.shape)}; expected 1 to {min(weight.shape)}"
        )
    precise = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(precise, full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


class _LowRank(nn.Module):
    """A layer with W = U V: ``v`` holds V and runs first, ``u`` holds U and the dense layer's own bias.

    Both come without numbers (on the meta device), so that torch's generator is not used.
    """

    def __init__(self, dense: nn.Module, weight: Tensor, v: nn.Module, u: nn.Module, rank: int):
        super().__init__()
        left, right = spectral_factors(weight.flatten(1), rank)
        for layer, factor in ((v, right), (u, left)):
            factor = factor.contiguous().view(layer.weight.shape)
            layer.weight = nn.Parameter(factor, requires_grad=weight.requires_grad)
        u.bias = dense.bias
        self.v, self.u = v, u
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))

    @property
    def numbers(self) -> int:
        """How many numbers U and V have."""
        return self.u.weight.numel() + self.v.weight.numel()

    @property
    def weight(self) -> Tensor:
        """U V in the shape of the replaced weight, for code that reads it directly; made anew at every access."""
        u, v = self.u.weight, self.v.weight
        return (u.flatten(1) @ v.flatten(1)).view(u.shape[0], *v.shape[1:])

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense layer's bias, for code that reads it directly."""
        return self.u.bias


class LowRankLinear(_LowRank):
    """y = (x V^T) U^T + b, with U (out_features, rank) and V (rank, in_features).

    Args:
        dense: The linear layer that this one replaces; its bias is taken over.
        rank: From 1 to min(out_features, in_features), at which it computes what ``dense`` does.
        transposed: True where ``dense`` stores its weight as (in, out), as Conv1D does. The factors have the same
            shapes then, and :attr:`weight` is transposed.

    Input (..., in_features), output (..., out_features).
    """

    def __init__(self, dense: nn.Module, rank: int, transposed: bool = False):
        weight = dense.weight.t() if transposed else dense.weight
        out_features, in_features = weight.shape
        v = nn.Linear(in_features, rank, bias=False, device="meta")
        u = nn.Linear(rank, out_features, bias=False, device="meta")
        super().__init__(dense, weight, v, u, rank)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed

    @property
    def weight(self) -> Tensor:
        return super().weight.t() if self.transposed else super().weight


class LowRankConv2d(_LowRank):
    """A convolution V with ``rank`` output channels and the geometry of ``dense``, then a 1 x 1 convolution U and b.

    V is (rank, in_channels, kh, kw), U is (out_channels, rank, 1, 1): as matrices, the factors of the dense weight as
    (out_channels, in_channels * kh * kw).

    Args:
        dense: The convolution that this one replaces; its bias is taken over. With ``groups=1``: the groups of a
            grouped one share no input, so a factor V for all of them would be larger than the weight itself.
        rank: From 1 to min(out_channels, in_channels * kh * kw), at which it computes what ``dense`` does.

    Input (batch, in_channels, H, W), output (batch, out_channels, H', W') as of ``dense``.
    """

    def __init__(self, dense: nn.Conv2d, rank: int):
        if dense.groups != 1:
            raise ValueError(f"{dense} has groups={dense.groups}; low-rank factors are for convolutions of one group")
        geometry = {
            key: getattr(dense, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        v = nn.Conv2d(dense.in_channels, rank, **geometry, bias=False, device="meta")
        u = nn.Conv2d(rank, dense.out_channels, 1, bias=False, device="meta")
        super().__init__(dense, dense.weight, v, u, rank)


def choose_ranks(shapes: list[tuple[int, int]], ratio: float) -> list[int]:
    """Ranks with which factors of weights of ``shapes`` (out, in) have at most round(ratio * n) numbers together.

    A weight's share is the rank ratio * out * in / (out + in), with which its factors have ``ratio`` of its numbers.
    Each gets its share rounded down, and at least 1 (or 1 where that is too much together). Then the one furthest
    below its share, the first among equals, gets one rank more, as long as any has one left that fits.

    >>> choose_ranks([(64, 64), (256, 64)], 0.1)
    [3, 5]

    Raises:
        BudgetError: Rank 1 for all is too much; the message says the smallest ratio that can be reached.
    """
    n = sum(out * into for out, into in shapes)
    budget, costs = round(ratio * n), [out + into for out, into in shapes]
    if sum(costs) > budget:
        least = math.ceil(sum(costs) / n * 1e6) / 1e6
        raise BudgetError(
            f"ratio={ratio!r} of the {n:,} targeted weights is {budget:,} numbers, but low-rank factors of rank 1 are "
            f"{sum(costs):,} already; the smallest ratio that can be reached is {least:g}"
        )
    shares = [ratio * out * into / (out + into) for out, into in shapes]
    ranks = [max(1, math.floor(share)) for share in shares]
    room = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if room < 0:
        ranks, room = [1] * len(shapes), budget - sum(costs)
    while fitting := [i for i, shape in enumerate(shapes) if costs[i] <= room and ranks[i] < min(shape)]:
        chosen = max(fitting, key=lambda i: shares[i] - ranks[i])
        ranks[chosen] += 1
        room -= costs[chosen]
    return ranks


def low_rank_numbers(model: nn.Module) -> int:
    """How many numbers the factors of ``model`` have: those stored for its targeted weights. 0 for a dense model."""
    return sum(module.numbers for module in model.modules() if isinstance(module, _LowRank))


def get_low_rank_model(model: nn.Module, ratio: float, config: RPSConfig | None = None) -> nn.Module:
    """Replace every weight that ``config`` targets by two trainable factors, W = U V, in place.

    The factors start at the weight's best approximation (:func:`spectral_factors`), so this serves randomly
    initialised and pretrained models alike; those of a frozen weight stay frozen. The ranks depend on the shapes and
    the ratio alone (:func:`choose_ranks`): a state dict loads into a model made anew by the same call.

    Args:
        model: A dense model in memory.
        ratio: Numbers of the factors over targeted weights, in (0, 1]: as near to it as ranks allow, never above
            (:func:`low_rank_numbers` counts). Ratio 1 is not the dense model: two factors of n numbers can't have
            full rank.
        config: Chooses the weights, as for RPS; its ratio is not read.

    Returns:
        The same object, of the same class.

    Raises:
        BudgetError: ``ratio`` is too small for rank 1.
        ValueError: ``ratio`` is out of range; a target is a grouped or not a two-dimensional
            convolution; the model is compressed, pruned or factorised. The model is then as it was.
    """
    name = type(model).__name__
    if not 0 < ratio <= 1:
        raise ValueError(
            f"ratio={ratio!r} is not valid; expected a number in (0, 1], the share of the targeted weights to store"
        )
    if find_bank(model) is not None:
        raise ValueError(f"this {name} is compressed by hf_rps; call hf_rps.to_dense(model) before factorising it")
    if prune.is_pruned(model):
        raise ValueError(f"this {name} is pruned; call remove_pruning(model) before factorising it")
    if low_rank_numbers(model):
        raise ValueError(f"this {name} has low-rank factors already; build the dense model anew to change their ratio")
    candidates = find_targets(model, config or RPSConfig())
    for candidate in candidates:
        check_weight(candidate)
        _check_kind(candidate)
    ranks = choose_ranks([tuple(candidate.weight.shape) for candidate in candidates], ratio)
    replace_modules(model, {c.name: _factorised(c, rank) for c, rank in zip(candidates, ranks, strict=True)})
    return model


def _check_kind(candidate: Candidate) -> None:
    module = candidate.module
    if module.weight.ndim != 2 and not (isinstance(module, nn.Conv2d) and module.groups == 1):
        raise ValueError(
            f"target {candidate.name!r} is {module}, which has no low-rank form here; expected a linear layer or an "
            f"nn.Conv2d with groups=1. Leave it out with exclude_modules."
        )


def _factorised(candidate: Candidate, rank: int) -> nn.Module:
    if isinstance(candidate.module, nn.Conv2d):
        return LowRankConv2d(candidate.module, rank)
    return LowRankLinear(candidate.module, rank, isinstance(candidate.kind, TransposedLinear))
