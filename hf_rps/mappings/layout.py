"""Row layout: contiguous runs of the shared array, cut into blocks of whole rows and rows that a run's end splits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowLayout:
    """How the rows of one weight matrix (rows, cols) are found in the shared array.

    ``blocks``: (first row, number of rows, first slot); rows that follow each other in the array, a zero-copy view.
    ``split``: (row, ((first slot, length), ...)); a row in which a run ends, in order of its pieces.
    Every row is in exactly one of the two. ``runs``: (first slot, length) of the whole matrix, row-major.
    """

    rows: int
    cols: int
    runs: tuple[tuple[int, int], ...]
    blocks: tuple[tuple[int, int, int], ...]
    split: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def row_layout(runs: list[tuple[int, int]], rows: int, cols: int) -> RowLayout:
    """Cut contiguous ``runs`` that together cover a (rows, cols) matrix row-major into blocks and split rows.

    A 5 x 4 matrix whose first 10 weights are slots 30 to 39, and whose last 10 are slots 0 to 9: rows 0 and 1 are one
    view and rows 3 and 4 another; row 2 has two slots at the end of the first run and two at the start of the second.

    >>> layout = row_layout([(30, 10), (0, 10)], rows=5, cols=4)
    >>> layout.blocks
    ((0, 2, 30), (3, 2, 2))
    >>> layout.split
    ((2, ((38, 2), (0, 2))),)
    """
    blocks, split, pieces = [], [], []
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
                    split.append((row, tuple(pieces)))
                    pieces = []
            slot, length, position = slot + taken, length - taken, position + taken
    return RowLayout(rows, cols, tuple(runs), tuple(blocks), tuple(split))
