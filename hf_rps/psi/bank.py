"""The bank: the module that owns the shared array psi of a compressed model."""

from __future__ import annotations

import torch
from torch import nn

from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.array import SharedArray
from hf_rps.psi.passes import Reading


class Bank(nn.Module):
    """Owner of the shared array.

    Args:
        weight_map: Which weight reads which slots of the array.
        grad_scaling: "projection", "norm" or "none"; see :class:`hf_rps.RPSConfig`.
        device, dtype: Of psi (m,), which is left uninitialised.

    Layers keep the bank in an unregistered reference, so that psi is saved and sharded once.
    """

    def __init__(self, weight_map: WeightMap, grad_scaling: str = "projection", device=None, dtype=None):
        super().__init__()
        self.array = SharedArray(weight_map, grad_scaling)
        self.psi = nn.Parameter(torch.empty(weight_map.m, device=device, dtype=dtype))

    @property
    def weight_map(self) -> WeightMap:
        return self.array.weight_map

    @property
    def grad_scaling(self) -> str:
        return self.array.divisor.scaling

    def read(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """psi as this pass reads it."""
        return self.array.read(self.psi, device, dtype, self)

    def forward(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """Read psi anew: a call, so that the hooks on this module (offloading, FSDP) run around it."""
        return self.array.enter(self.psi, device, dtype)

    def extra_repr(self) -> str:
        return f"n={self.weight_map.n}, m={self.weight_map.m}, grad_scaling={self.grad_scaling!r}"
