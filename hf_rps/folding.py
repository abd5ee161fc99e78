"""RANDOMFOLD: which slots of the shared array a weight matrix reads, in plain integers.

All targeted weights lie end to end in one flat index range [0, n). The range is cut into partitions of length m, and
partition p is laid over the shared array rotated by its own hashed shift u(p):

    slot(j) = (j mod m + u(j div m)) mod m                                                       (0 <= j < n)

Every slot then carries floor(n/m) or ceil(n/m) weights, the best possible load, and at m = n the map is a bijection.
A weight's flat range becomes a handful of contiguous *runs* of slots, which is what makes weights views of the array.

Source: 'In defense of parameter sharing for model-compression' (ICLR 2024), section on RANDOMFOLD.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rps.hashing import hash_int

ALIGNMENT = 8  # elements: 16 bytes in bfloat16, what vectorised loads and tensor cores want a row to start on
_ALIGN_FROM = 1 << 12  # below this many slots alignment would cost rotations and buys nothing
_SHIFT_TRIES = 32
_NEIGHBOURS = 16  # earlier partitions compared with; bounds the work when a matrix is folded very many times


@dataclass(frozen=True)
class Span:
    """Where one weight matrix of shape (rows, cols) lies in the flat index range: [start, start + rows * cols)."""

    start: int
    rows: int
    cols: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.cols


@dataclass(frozen=True)
class RowLayout:
    """How the rows of one weight matrix (rows, cols) are found in the shared array.

    ``blocks``: (first row, number of rows, first slot); rows that follow each other in the array, a zero-copy view.
    ``torn``: (row, ((first slot, length), ...)); a row in which a run ends, in order of its pieces.
    Every row is in exactly one of the two. ``runs``: (first slot, length) of the whole matrix, row-major.
    """

    rows: int
    cols: int
    runs: tuple[tuple[int, int], ...]
    blocks: tuple[tuple[int, int, int], ...]
    torn: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True)
class Fold:
    """RANDOMFOLD of n weights on m slots that begin at ``base`` in the shared array, with one shift a partition."""

    n: int
    m: int
    shifts: tuple[int, ...]
    base: int = 0

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

    def layout(self, span: Span) -> RowLayout:
        """Cut the runs of ``span`` into blocks of whole rows and torn rows."""
        return row_layout(self.runs(span.start, span.stop), span.rows, span.cols)


def row_layout(runs: list[tuple[int, int]], rows: int, cols: int) -> RowLayout:
    """Cut contiguous ``runs`` that together cover a (rows, cols) matrix row-major into blocks and torn rows."""
    blocks, torn, pieces = [], [], []
    position = 0  # flat position inside the matrix
    for slot, length in runs:
        while length:
            row, column = divmod(position, cols)
            if column == 0 and length >= cols:
                count = length // cols
                blocks.append((row, count, slot))
                taken = count * cols
            else:
                taken = min(length, cols - column)
                pieces.append((slot, taken))
                if column + taken == cols:
                    torn.append((row, tuple(pieces)))
                    pieces = []
            slot, length, position = slot + taken, length - taken, position + taken
    return RowLayout(rows, cols, tuple(runs), tuple(blocks), tuple(torn))


def slots_for(n: int, ratio: float) -> tuple[int, int]:
    """Return (m, alignment) for n weights at ``ratio``: m = round(ratio * n), brought to a multiple of the alignment.

    m = n exactly at ratio 1, and m >= 1 always. The alignment is 8 elements, or 1 for a tiny m.
    """
    if ratio == 1:
        return n, ALIGNMENT if n % ALIGNMENT == 0 and n >= _ALIGN_FROM else 1
    m = max(1, round(ratio * n))
    if m < _ALIGN_FROM:
        return m, 1
    return min(n, max(1, round(ratio * n / ALIGNMENT)) * ALIGNMENT), ALIGNMENT


def draw_shifts(n: int, m: int, alignment: int, key: int, spans: list[Span]) -> tuple[int, ...]:
    """Draw one shift a partition from stream ``key``, each a multiple of ``alignment`` in [0, m).

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
