"""The plain definition, slot by slot: what every fast path is tested against.

    W_i[r, c] = scale_i * sign_i(r) * psi[slot(start_i + r * C_i + c)]

or, where inputs are folded, with this for Z_i, and t, b the tile and the place in it of channel c:

    W_i[r, c] = mix[block(r), t] * sign(t, b) * Z_i[r, b]

It reads slots by their formula and signs by their hash, an index per weight, and nothing of what makes the rest fast.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_rps.mappings.input_fold import InputFold
from hf_rps.mappings.weight_map import WeightMap


def weight(psi: Tensor, weight_map: WeightMap, name: str) -> Tensor:
    """W (out_features, in_features) of the target ``name`` in psi's dtype, differentiable in psi (m,)."""
    slots = torch.from_numpy(weight_map.slots(name)).to(psi.device)
    factor = torch.from_numpy(weight_map.signs(name)).to(psi.device, torch.promote_types(psi.dtype, torch.float32))
    narrow = psi[slots] * (factor * weight_map.scale(name))
    fold = weight_map.fold_of(name)
    if fold is None:
        return narrow.to(psi.dtype)
    coefficients, columns = folding(fold, weight_map.target(name).out_features)
    return (narrow[:, columns] * torch.from_numpy(coefficients).to(narrow)).to(psi.dtype)


def folding(fold: InputFold, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """For every weight of W (rows, cols) its coefficient, and for every column of W the column of Z that it reads."""
    channel, position = np.divmod(np.arange(fold.channels * fold.positions), fold.positions)
    tile, place = np.divmod(channel, fold.width)
    block = np.arange(rows) // -(-rows // min(fold.c, rows))
    return fold.mix[block][:, tile] * fold.signs[tile, place], place * fold.positions + position


def gamma(weight_map: WeightMap) -> np.ndarray:
    """Gamma_j = sum of scale**2 over the weights on slot j, float64 (m,). A slot that no weight reads has 0."""
    total = np.zeros(weight_map.m)
    for target in weight_map.targets:
        slots, fold, squares = weight_map.slots(target.name), weight_map.fold_of(target.name), None
        if fold is not None:
            coefficients, columns = folding(fold, target.out_features)
            slots, squares = slots[:, columns], np.square(coefficients).ravel()
        counts = np.bincount(slots.ravel(), weights=squares, minlength=weight_map.m)
        total += weight_map.scale(target.name) ** 2 * counts
    return total
