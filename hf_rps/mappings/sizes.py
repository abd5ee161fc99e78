"""How many slots n weights get at a ratio."""

from __future__ import annotations

ALIGNMENT = 8  # elements: 16 bytes in bfloat16, what vectorised loads and tensor cores want a row to start on
_ALIGN_FROM = 1 << 12  # below this many slots alignment would cost rotations and buys nothing


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
