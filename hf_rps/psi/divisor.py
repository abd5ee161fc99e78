"""What the gradient of the shared array is divided by, slot by slot."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection

import torch
from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.base import SharedMatrix

SCALINGS = ("projection", "norm", "none")
_SHORT_PIECE = 4096  # mean piece of Gamma (slots) below which one array of divisors is cheaper than a pass per piece
_FEW_PIECES = 256  # up to which each is filled by itself: for many, a compiled graph searches their ends slot by slot


class Divisor:
    """Gamma_j, the sum of squared scales of the weights on slot j ("projection"), its root ("norm"), or 1 ("none").

    Args:
        matrices: All those that read the array, whose Gamma it is.
        m: Its slots.
        scaling: One of SCALINGS; see ``grad_scaling`` of :class:`hf_rps.RPSConfig`.
    """

    def __init__(self, matrices: Collection[SharedMatrix], m: int, scaling: str):
        self.m, self.scaling = m, scaling
        self._matrices = list(matrices)
        self._pieces: list[tuple[int, float]] = []
        self._gamma: Tensor | None = None
        if not any(matrix.stored() for matrix in matrices):
            self.settle()
        self._kept: dict[tuple, Tensor | tuple[list[int], list[float]]] = {}

    def __getstate__(self):
        return self.__dict__ | {"_kept": {}}

    def settle(self, matrices: Collection[SharedMatrix] | None = None) -> None:
        """Work Gamma out, in pieces or, for mappings where it has none, slot by slot.

        It is done when all that the matrices have stored is there, for compilers can't trace it.

        Args:
            matrices: Those that are in use, where others have nothing stored (of a head that the model lacks).
        """
        if matrices is not None:
            self._matrices = list(matrices)
        self._pieces = _load_pieces(self._matrices, self.m)
        self._gamma = None if self._pieces else load(self._matrices, self.m)

    def of_scaling(self, scaling: str) -> Divisor:
        """The divisor of another array of the same map: this one, or one of the same Gamma."""
        if scaling == self.scaling:
            return self
        other = copy.copy(self)
        other.scaling = scaling
        return other

    def _powered(self) -> list[tuple[int, float]]:
        """(length, divisor) pieces over the m slots."""
        exponent = {"projection": 1.0, "norm": 0.5}[self.scaling]
        return [(length, value**exponent) for length, value in self._pieces]

    def tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The divisor (m,), or None for 1."""
        if self.scaling == "none":
            return None
        if not self._pieces and self._gamma is None:
            self.settle()
        if self._pieces:
            if len(self._pieces) <= _FEW_PIECES:
                return torch.cat([torch.full((n,), v, dtype=dtype, device=device) for n, v in self._powered()])
            lengths, values = zip(*self._powered(), strict=True)
            values = torch.tensor(values, dtype=dtype, device=device)
            return values.repeat_interleave(torch.tensor(lengths, device=device), output_size=self.m)
        gamma = self._gamma if self.scaling == "projection" else self._gamma.sqrt()
        return gamma.masked_fill(gamma == 0, 1.0).to(device, dtype)  # a slot that no weight reads has no gradient

    def divided(self, gradient: Tensor) -> Tensor:
        """``gradient`` (m,) over the divisor, differentiable."""
        divisor = self.tensor(gradient.device, gradient.dtype)
        return gradient if divisor is None else gradient / divisor

    @torch.no_grad()
    def divide_(self, gradient: Tensor) -> None:
        """Divide ``gradient`` (m,) by the divisor, in place; where Gamma has long pieces, without an array for it."""
        if self.scaling == "none":
            return
        key = (gradient.device, gradient.dtype, self.scaling)
        if key not in self._kept:
            if self._pieces and len(self._pieces) * _SHORT_PIECE <= self.m:
                lengths, values = zip(*self._powered(), strict=True)
                self._kept[key] = (list(lengths), list(values))
            else:
                self._kept[key] = self.tensor(gradient.device, gradient.dtype)
        divisor = self._kept[key]
        if isinstance(divisor, Tensor):
            gradient.div_(divisor)
        else:
            internals.divide_each_(list(gradient.split(divisor[0])), divisor[1])

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this object keeps."""
        kept = [value for value in self._kept.values() if isinstance(value, Tensor)]
        return kept if self._gamma is None else [*kept, self._gamma]


def _load_pieces(matrices: Collection[SharedMatrix], m: int) -> list[tuple[int, float]]:
    """Gamma as (length, value) pieces that cover the m slots, or [] where some matrix has none."""
    steps: dict[int, float] = {0: 0.0, m: 0.0}
    for matrix in matrices:
        pieces = matrix.load_pieces()
        if pieces is None:
            return []
        for slot, length, value in pieces:
            steps[slot] = steps.get(slot, 0.0) + value
            steps[slot + length] = steps.get(slot + length, 0.0) - value
    cuts, total, result = sorted(steps), 0.0, []
    for cut, following in itertools.pairwise(cuts):
        total += steps[cut]
        result.append((following - cut, total))
    return result


def load(matrices: Collection[SharedMatrix], m: int) -> Tensor:
    """Gamma slot by slot, float64 (m,), on the CPU, from the matrices of any mapping."""
    gamma = torch.zeros(m, dtype=torch.float64, device="cpu")  # also while a model is built on meta
    for matrix in matrices:
        matrix.add_load(gamma)
    return gamma
