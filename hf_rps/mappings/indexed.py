"""Mappings by an index per weight: HashedNets and ROAST, and any mapping with a sign per weight.

They are slow and take 8 bytes of memory per weight for the index; they are here to be compared with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.hashing import hash_range
from hf_rps.mappings.base import DeviceCopies, Mapping, SharedMatrix, SignedScale, Span
from hf_rps.mappings.sizes import slots_for

ROAST_TILE = 64  # weights per hashed tile; Desai, Zhou and Shrivastava, ICML 2023, use tiles of this order


class IndexedMatrix(SharedMatrix):
    """W[r, c] = factor[r, c] * psi[slot[r, c]], with the slots as an index.

    Args:
        slots: Gives the slots of a flat range, int64.
        span: The matrix's flat range.
        scale, signs: Their product is the factor; signs int8 (rows, 1) or (rows, cols).
    """

    def __init__(self, slots: Callable[[int, int], np.ndarray], span: Span, scale: float, signs: np.ndarray):
        self.rows, self.cols = span.rows, span.cols
        self._factor = SignedScale(scale, signs)
        with torch.inference_mode(False):
            index = torch.from_numpy(slots(span.start, span.stop))
        self._index = DeviceCopies(index)  # (rows * cols,)

    def weight(self, psi: Tensor) -> Tensor:
        unscaled = psi[self._index.on(psi.device)].view(self.rows, self.cols)
        return (unscaled * self._factor.on(psi.device, psi.dtype)).to(psi.dtype)

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        scaled = (gradient * self._factor.on(into.device, into.dtype)).reshape(-1)
        into.index_add_(0, self._index.on(into.device), scaled.to(into.dtype))

    def _rows_of(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows ``ids`` (...) of something that all weights have, or of what each row has: (..., cols) or (..., 1)."""
        return F.embedding(ids, table.view(self.rows, -1))

    def look_up(self, ids: Tensor, psi: Tensor) -> Tensor:
        factor = self._rows_of(self._factor.on(psi.device, psi.dtype), ids)
        return (psi[self._rows_of(self._index.on(psi.device), ids)] * factor).to(psi.dtype)

    def add_look_up_adjoint(self, into: Tensor, ids: Tensor, gradient: Tensor) -> None:
        scaled = gradient * self._rows_of(self._factor.on(into.device, into.dtype), ids)
        slots = self._rows_of(self._index.on(into.device), ids)
        into.index_add_(0, slots.flatten(), scaled.flatten().to(into.dtype))

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        square = torch.tensor(self._factor.scale**2 * factor, device=into.device, dtype=into.dtype)
        into.index_add_(0, self._index.on(into.device), square.expand(self.rows * self.cols))

    def kept_tensors(self) -> list[Tensor]:
        return [*self._factor.tensors(), *self._index.tensors()]


class IndexedMapping(Mapping):
    """A mapping that says for every weight which slot it reads, and nothing more."""

    def __init__(self, spans: Sequence[Span], ratio: float, key: int, base: int = 0):
        self.n = spans[-1].stop
        self.m, _ = slots_for(self.n, ratio)
        self.key, self.base = key, base

    @abstractmethod
    def slots(self, start: int, stop: int) -> np.ndarray:
        """The slot of every weight of the flat range [start, stop), int64."""

    def matrix(self, span: Span, scale: float, signs: np.ndarray) -> IndexedMatrix:
        return IndexedMatrix(self.slots, span, scale, signs)


class Roast(IndexedMapping):
    """Tiles of 64 weights at hashed slots (ROAST, ICML 2023)."""

    name = "roast"
    help = "hashed tiles of 64 weights (ROAST, ICML 2023), slow"

    def slots(self, start: int, stop: int) -> np.ndarray:
        length = min(ROAST_TILE, self.m)
        tile, inside = np.divmod(np.arange(start, stop, dtype=np.int64), length)
        starts = hash_range(self.key, 0, int(tile[-1]) + 1) % np.uint64(self.m - length + 1)
        return self.base + starts.astype(np.int64)[tile] + inside


class Hash(IndexedMapping):
    """A hashed slot for every weight (HashedNets, ICML 2015)."""

    name = "hash"
    help = "a hash per weight (HashedNets, ICML 2015), slow"

    def slots(self, start: int, stop: int) -> np.ndarray:
        hashes = hash_range(self.key, start, stop) % np.uint64(self.m)
        return self.base + hashes.astype(np.int64)
