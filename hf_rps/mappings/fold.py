"""RANDOMFOLD: weights are contiguous runs of the shared array, so that blocks of their rows are views of it.

All targeted weights lie end to end in one flat index range [0, n). The range is cut into partitions of length m, and
partition p is laid over the shared array rotated by its own hashed shift u(p):

    slot(j) = (j mod m + u(j div m)) mod m                                                       (0 <= j < n)

Every slot then carries floor(n/m) or ceil(n/m) weights, the best possible load, and at m = n the map is a bijection.
A weight's flat range becomes a handful of contiguous *runs* of slots, which is what makes weights views of the array.

Source: 'In defense of parameter sharing for model-compression' (ICLR 2024), section on RANDOMFOLD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.hashing import hash_int
from hf_rps.mappings.base import DeviceCopies, Mapping, SharedMatrix, SignedScale, Span
from hf_rps.mappings.indexed import IndexedMatrix
from hf_rps.mappings.layout import RowLayout, row_layout
from hf_rps.mappings.sizes import slots_for

_SHIFT_TRIES = 32
_NEIGHBOURS = 16  # earlier partitions compared with; bounds the work when a matrix is folded very many times


class Fold(Mapping):
    """RANDOMFOLD of n weights on m slots that begin at ``base`` in the shared array, with one shift per partition."""

    name = "fold"
    help = "RANDOMFOLD: weights are views, dense speed"

    def __init__(self, spans: Sequence[Span], ratio: float, key: int, base: int = 0):
        self.n, self.base = spans[-1].stop, base
        self.m, alignment = slots_for(self.n, ratio)
        self.shifts = draw_shifts(self.n, self.m, alignment, key, spans)

    @classmethod
    def of(cls, n: int, m: int, shifts: Sequence[int]) -> Fold:
        """The fold of these sizes and shifts, whatever they are.

        >>> Fold.of(10, 4, [1, 3, 0]).slots(0, 10).tolist()
        [1, 2, 3, 0, 3, 0, 1, 2, 0, 1]
        """
        fold = cls.__new__(cls)
        fold.n, fold.m, fold.base, fold.shifts = n, m, 0, tuple(shifts)
        return fold

    def slots(self, start: int, stop: int) -> np.ndarray:
        """The slot of every weight of the flat range [start, stop), int64, by the formula."""
        partition, inside = np.divmod(np.arange(start, stop, dtype=np.int64), self.m)
        return self.base + (inside + np.asarray(self.shifts, dtype=np.int64)[partition]) % self.m

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Maximal contiguous runs (first slot, length) of the flat range [start, stop), in order."""
        runs: list[tuple[int, int]] = []
        while start < stop:
            partition, inside = divmod(start, self.m)
            slot = (inside + self.shifts[partition]) % self.m
            length = min(stop - start, self.m - inside, self.m - slot)
            first = self.base + slot
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((first, length))
            start += length
        return runs

    def matrix(self, span: Span, scale: float, signs: np.ndarray) -> SharedMatrix:
        if signs.shape[1] > 1:  # a sign per weight: rows are not views any more
            return IndexedMatrix(self.slots, span, scale, signs)
        return FoldMatrix(self, span, scale, signs)


class Rotations(NamedTuple):
    """The fold as one matrix meets it: weight j (row-major) is on slot base + (t mod m + shifts[t div m]) mod m.

    t = start + j, with start in [0, m); there is a shift for every partition that the matrix meets.
    """

    m: int
    base: int
    start: int
    shifts: tuple[int, ...]


class FoldMatrix(SharedMatrix):
    """A matrix whose rows are contiguous in psi, with one scale and sign per row: W[r] = factor[r] * psi[run of r]."""

    def __init__(self, fold: Fold, span: Span, scale: float, signs: np.ndarray):
        self.rows, self.cols = span.rows, span.cols
        self.layout: RowLayout = row_layout(fold.runs(span.start, span.stop), span.rows, span.cols)
        first, start = divmod(span.start, fold.m)
        shifts = tuple(fold.shifts[first : (span.stop - 1) // fold.m + 1])
        self.rotations = Rotations(fold.m, fold.base, start, shifts)
        self._factor = SignedScale(scale, signs[:, 0])
        self._starts: tuple[DeviceCopies, ...] = ()

    def factor(self, psi: Tensor) -> Tensor:
        """Scale times sign, (rows,), where psi is; of float32, or float64 where psi is."""
        return self._factor.on(psi.device, psi.dtype)

    def pieces(self, psi: Tensor) -> list[Tensor]:
        """The contiguous runs of psi that W consists of, as views."""
        return [psi[slot : slot + length] for slot, length in self.layout.runs]

    def block(self, array: Tensor, count: int, slot: int) -> Tensor:
        """View of ``count`` rows from ``slot`` of psi or of its gradient: (count, cols)."""
        return array.as_strided((count, self.cols), (self.cols, 1), array.storage_offset() + slot)

    def weight(self, psi: Tensor) -> Tensor:
        unscaled = torch.cat(self.pieces(psi)).view(self.rows, self.cols)
        return (unscaled * self.factor(psi)[:, None]).to(psi.dtype)

    def make(self, psi: Tensor, base: Tensor | None = None) -> Tensor:
        factor, runs = self.factor(psi)[:, None], self.layout.runs
        weight = torch.empty(self.rows, self.cols, device=psi.device, dtype=psi.dtype if base is None else base.dtype)
        if base is not None:
            unscaled = torch.cat(self.pieces(psi)).view(self.rows, self.cols)
            return torch.addcmul(base, unscaled, factor.to(base.dtype), out=weight)
        if len(runs) == 1:
            return torch.mul(self.block(psi, self.rows, runs[0][0]), factor, out=weight)
        torch.cat(self.pieces(psi), out=weight.view(-1))
        return weight.mul_(factor)

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        factor, runs = self.factor(into)[:, None], self.layout.runs
        if len(runs) == 1:
            self.block(into, self.rows, runs[0][0]).addcmul_(gradient, factor)
            return
        scaled = (gradient * factor).reshape(-1)
        for (slot, length), piece in zip(runs, scaled.split([length for _, length in runs]), strict=True):
            into[slot : slot + length].add_(piece)

    def _row_slots(self, ids: Tensor) -> Tensor:
        """The slots of rows ``ids`` (...): int64 (..., cols)."""
        m, base, start, shifts = self.rotations
        if not self._starts:  # first weights of the rows, from a table, so that an id that is no row is found out
            with torch.inference_mode(False):
                starts = start + self.cols * torch.arange(self.rows)[:, None]
                self._starts = (DeviceCopies(starts), DeviceCopies(torch.tensor(shifts)))
        starts, shifts = (table.on(ids.device) for table in self._starts)
        place = F.embedding(ids, starts) + torch.arange(self.cols, device=ids.device)
        return base + (place % m + shifts[place // m]) % m

    def look_up(self, ids: Tensor, psi: Tensor) -> Tensor:
        return (psi[self._row_slots(ids)] * self.factor(psi)[ids][..., None]).to(psi.dtype)

    def add_look_up_adjoint(self, into: Tensor, ids: Tensor, gradient: Tensor) -> None:
        scaled = gradient.to(into.dtype) * self.factor(into)[ids][:, None]
        into.index_add_(0, self._row_slots(ids).flatten(), scaled.flatten())

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        for slot, length, value in self.load_pieces():
            into[slot : slot + length] += value * factor

    def load_pieces(self) -> list[tuple[int, int, float]]:
        return [(slot, length, self._factor.scale**2) for slot, length in self.layout.runs]

    def kept_tensors(self) -> list[Tensor]:
        return self._factor.tensors() + [tensor for table in self._starts for tensor in table.tensors()]


def draw_shifts(n: int, m: int, alignment: int, key: int, spans: Sequence[Span]) -> tuple[int, ...]:
    """Draw one shift per partition from stream ``key``, each a multiple of ``alignment`` in [0, m).

    Two partitions that hold parts of one matrix would repeat its rows (and cost it rank) if their shifts differed by a
    whole number of rows; each shift is the first candidate of its stream that avoids this against earlier partitions,
    or the candidate with the fewest such clashes where rows are too short for all to differ.
    """
    partitions = -(-n // m)
    neighbours: list[set[tuple[int, int]]] = [set() for _ in range(partitions)]  # (earlier partition, cols)
    for span in spans:
        first, last = span.start // m, (span.stop - 1) // m
        if alignment < span.cols <= m // 4:  # a longer row meets itself whatever the shifts
            for later in range(first + 1, last + 1):
                nearest = range(max(first, later - _NEIGHBOURS), later)
                neighbours[later].update((earlier, span.cols) for earlier in nearest)
    shifts: list[int] = []
    for partition in range(partitions):
        best = None
        for attempt in range(_SHIFT_TRIES):
            candidate = hash_int(key, partition * _SHIFT_TRIES + attempt) % max(1, m // alignment) * alignment
            clashes = 0
            for earlier, cols in neighbours[partition]:
                difference = candidate - shifts[earlier]
                # the rotation wraps, so a row may also meet its twin one array length away
                clashes += any((difference + wrap) % cols == 0 for wrap in (-m, 0, m))
            if best is None or clashes < best[0]:
                best = (clashes, candidate)
            if clashes == 0:
                break
        shifts.append(best[1])
    return tuple(shifts)
