"""Where the shared array starts: from the dense weights, or from fresh draws."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_rps.layers.kinds import Candidate
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.psi.array import SharedArray


def check_weights(candidates: Iterable[Candidate]) -> None:
    """Raise a ValueError unless all weights are in memory and finite."""
    for candidate in candidates:
        check_weight(candidate)


def check_weight(candidate: Candidate) -> None:
    """Raise a ValueError unless the weight of ``candidate`` is in memory and finite."""
    weight = candidate.stored
    if weight.is_meta:
        raise ValueError(
            f"the weight of {candidate.name!r} is on the meta device (offloaded or not yet loaded); load the whole "
            f"model to memory before compressing it"
        )
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        what = "is empty" if weight.numel() == 0 else "holds values that are not finite"
        raise ValueError(f"the weight of {candidate.name!r} {what}; leave it out with exclude_modules, or repair it")


def initial_std(weight: Tensor) -> float:
    """RMS of a weight, to three digits (it is written to config.json); for an all-zero weight 1 / sqrt(in_features)."""
    std = weight.detach().double().square().mean().sqrt().item()
    return float(f"{std or 1 / math.sqrt(weight.shape[1]):.3g}")


def _is_trained(weight: Tensor) -> bool:
    """True for weights that come from a checkpoint, or from another adapter, rather than from random initialisation."""
    return isinstance(weight, WeightStandIn) or getattr(weight, "_is_hf_initialized", False)


@torch.no_grad()
def initialise(psi: Tensor, array: SharedArray, candidates: dict[str, Candidate], how: bool | str) -> None:
    """Set psi (m,), that of ``array``, from the dense weights, by target; see ``init_weights`` of
    :class:`hf_rps.RPSConfig`.

    "project" is the least-squares fit, R^T w over Gamma; "rescale" sums sign * w / scale over the root of the number
    of weights on a slot.
    """
    weight_map = array.weight_map
    if how is False:
        nn.init.normal_(psi, std=weight_map.init_std)
        return
    if how is True:
        loaded = sum(c.weight.numel() for c in candidates.values() if _is_trained(c.stored))
        how = "project" if 2 * loaded > weight_map.n else "rescale"
    total = torch.zeros(weight_map.m, dtype=torch.promote_types(psi.dtype, torch.float32), device=psi.device)
    loads = torch.zeros_like(total)  # Gamma_j, or the number of weights on slot j
    for name, candidate in candidates.items():
        matrix = array.matrices[name]
        square = 1.0 if how == "project" else weight_map.scale(name) ** 2
        matrix.add_adjoint(total, candidate.weight.to(total) / square)
        matrix.add_load(loads, 1 / square)
    loads.clamp_(min=torch.finfo(loads.dtype).tiny)  # slots that no weight reads (never with "fold") stay 0
    psi.copy_(total / (loads if how == "project" else loads.sqrt()))
