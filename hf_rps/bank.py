"""The bank: the module that owns the shared array psi of a compressed model."""

from __future__ import annotations

import torch
from torch import nn

from hf_rps.mapping import WeightMap
from hf_rps.shared_array import Gated, SharedArray


class Bank(SharedArray, nn.Module):
    """Owner of the shared array.

    Args:
        weight_map: Which weight reads which slot of the array.
        grad_scaling: "projection", "norm" or "none"; see :class:`hf_rps.RPSConfig`.
        device, dtype: Of psi (m,), which is left uninitialised.

    Layers keep the bank in an unregistered reference, so that psi is saved and sharded once.
    """

    def __init__(self, weight_map: WeightMap, grad_scaling: str = "projection", device=None, dtype=None):
        nn.Module.__init__(self)
        SharedArray.__init__(self, weight_map, grad_scaling)
        self.psi = nn.Parameter(torch.empty(weight_map.m, device=device, dtype=dtype))

    def __setstate__(self, state):
        nn.Module.__setstate__(self, state)
        self._reset()

    def forward(self, device: torch.device, dtype: torch.dtype) -> Gated:
        """Make a gate; see :meth:`SharedArray.make_gate`."""
        return self.make_gate(device, dtype)

    def _call_gate(self, device: torch.device, dtype: torch.dtype) -> Gated:
        return self(device, dtype)

    def extra_repr(self) -> str:
        return f"n={self.weight_map.n}, m={self.weight_map.m}, grad_scaling={self.grad_scaling!r}"
