"""The plain definition, slot by slot: what every fast path is tested against.

    W_i[r, c] = scale_i * sign_i(r) * psi[slot(start_i + r * C_i + c)]

It reads slots by their formula and signs by their hash, an index per weight, and nothing of what makes the rest fast.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_rps.mappings.weight_map import WeightMap


def weight(psi: Tensor, weight_map: WeightMap, name: str) -> Tensor:
    """W (out_features, in_features) of the target ``name`` in psi's dtype, differentiable in psi (m,)."""
    slots = torch.from_numpy(weight_map.slots(name)).to(psi.device)
    factor = torch.from_numpy(weight_map.signs(name)).to(psi.device, torch.promote_types(psi.dtype, torch.float32))
    return (psi[slots] * (factor * weight_map.scale(name))).to(psi.dtype)


def gamma(weight_map: WeightMap) -> np.ndarray:
    """Gamma_j = sum of scale**2 over the weights on slot j, float64 (m,). A slot that no weight reads has 0."""
    total = np.zeros(weight_map.m)
    for target in weight_map.targets:
        counts = np.bincount(weight_map.slots(target.name).ravel(), minlength=weight_map.m)
        total += weight_map.scale(target.name) ** 2 * counts
    return total
