"""Where the shared array starts: from the dense weights, or from fresh draws."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_rps.layers.kinds import Candidate
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.psi.array import SharedArray
from hf_rps.trained import looks_trained

logger = logging.getLogger(__name__)


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN, which both smallest and largest number would be.

    It takes a twentieth of the time of ``isfinite``, and no memory.
    """
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


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
    if weight.numel() == 0 or not all_finite(weight):
        what = "is empty" if weight.numel() == 0 else "holds values that are not finite"
        raise ValueError(f"the weight of {candidate.name!r} {what}; leave it out with exclude_modules, or repair it")


def array_dtype(candidates: Iterable[Candidate]) -> torch.dtype:
    """The narrowest dtype of a shared array that holds the weights of all ``candidates`` in theirs."""
    return functools.reduce(torch.promote_types, (candidate.stored.dtype for candidate in candidates))


def initial_std(weight: Tensor) -> float:
    """RMS of a weight, to three digits (it is written to config.json); for an all-zero weight 1 / sqrt(in_features)."""
    std = weight.detach().double().square().mean().sqrt().item()
    return float(f"{std or 1 / math.sqrt(weight.shape[1]):.3g}")


def choose_start(candidates: list[Candidate]) -> str:
    """What ``init_weights=True`` means for these weights: "project" where more than half of them look trained.

    It goes by their numbers alone (:mod:`hf_rps.trained`), so the same weights start the same, whether they were
    loaded, copied or trained here. The weight of an earlier adapter counts as trained.
    """
    total = sum(c.weight.numel() for c in candidates)
    trained = sum(
        c.weight.numel() for c in candidates if isinstance(c.stored, WeightStandIn) or looks_trained(c.weight)
    )
    how = "project" if 2 * trained > total else "rescale"
    logger.info(
        "%.0f %% of the targeted weights look trained (the others as an initialiser leaves them), so the shared array "
        "starts from init_weights=%r; set init_weights to 'project' or 'rescale' to decide it yourself",
        100 * trained / total,
        how,
    )
    return how


@torch.no_grad()
def initialise(psi: Tensor, array: SharedArray, candidates: dict[str, Candidate], how: bool | str) -> None:
    """Set psi (m,), that of ``array``, from the dense weights, by target; see ``init_weights`` of
    :class:`hf_rps.RPSConfig`.

    "project" is the least-squares fit, R^T w over Gamma; "rescale" sums sign * w / scale over the root of the number
    of weights on a slot. ``array.started`` records which it was.
    """
    weight_map = array.weight_map
    if how is True:
        how = choose_start([*candidates.values()])
    array.started = how
    if how is False:
        nn.init.normal_(psi, std=weight_map.init_std)
        return
    total = torch.zeros(weight_map.m, dtype=torch.promote_types(psi.dtype, torch.float32), device=psi.device)
    loads = torch.zeros_like(total)  # Gamma_j, or the number of weights on slot j
    for name, candidate in candidates.items():
        matrix = array.matrices[name]
        square = 1.0 if how == "project" else weight_map.scale(name) ** 2
        matrix.add_adjoint(total, candidate.weight.to(total) / square)
        matrix.add_load(loads, 1 / square)
    loads.clamp_(min=torch.finfo(loads.dtype).tiny)  # slots that no weight reads (never with "fold") stay 0
    psi.copy_(total / (loads if how == "project" else loads.sqrt()))
