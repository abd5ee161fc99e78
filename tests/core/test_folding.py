"""RANDOMFOLD against its definition, slot(j) = (j mod m + u(j div m)) mod m, and the layout against the runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rps.mappings.base import Span
from hf_rps.mappings.fold import Fold, draw_shifts
from hf_rps.mappings.layout import row_layout
from hf_rps.mappings.sizes import ALIGNMENT, slots_for

sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000)).map(lambda pair: (max(pair), min(pair)))  # n >= m


def make(n, m, key=7, alignment=1):
    return Fold.of(n, m, draw_shifts(n, m, alignment, key, [Span(0, n, 1)]))


@given(sizes, st.integers(0, 2**64 - 1))
def test_every_slot_carries_the_floor_or_the_ceiling(size, key):
    n, m = size
    fold = make(n, m, key)
    slots = np.concatenate([np.arange(a, a + length) for a, length in fold.runs(0, n)])
    load = np.bincount(slots, minlength=m)
    assert set(load.tolist()) <= {n // m, -(-n // m)}
    assert load.size == m


@given(sizes, st.data())
def test_runs_follow_the_definition(size, data):
    n, m = size
    fold = make(n, m)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    expected = [(j % m + fold.shifts[j // m]) % m for j in range(start, stop)]
    assert [slot for a, length in fold.runs(start, stop) for slot in range(a, a + length)] == expected
    assert fold.slots(start, stop).tolist() == expected


def test_equal_sizes_give_a_bijection():
    slots = [slot for a, length in make(1000, 1000).runs(0, 1000) for slot in range(a, a + length)]
    assert sorted(slots) == list(range(1000))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 500), st.integers(0, 10**6))
def test_layout_covers_every_weight_once_in_order(rows, cols, m, key):
    n = rows * cols + 13
    m = min(m, n)
    fold = make(n, m, key)
    span = Span(5, rows, cols)
    runs = fold.runs(span.start, span.stop)
    layout = row_layout(runs, rows, cols)
    by_row = {}
    for row, count, slot in layout.blocks:
        for i in range(count):
            by_row[row + i] = list(range(slot + i * cols, slot + (i + 1) * cols))
    for row, pieces in layout.split:
        assert row not in by_row
        by_row[row] = [slot for a, length in pieces for slot in range(a, a + length)]
    flat = [slot for a, length in runs for slot in range(a, a + length)]
    assert [slot for row in range(rows) for slot in by_row[row]] == flat


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1))
def test_shifts_are_aligned_and_folds_of_one_matrix_do_not_coincide(key):
    rows, cols, m = 640, 768, 65_536
    shifts = draw_shifts(rows * cols, m, ALIGNMENT, key, [Span(0, rows, cols)])
    assert all(shift % ALIGNMENT == 0 and 0 <= shift < m for shift in shifts)
    for i, one in enumerate(shifts):
        for other in shifts[:i]:
            assert all((one - other + wrap) % cols for wrap in (-m, 0, m))


@pytest.mark.parametrize(("n", "ratio", "m"), [(1000, 1, 1000), (1001, 1.0, 1001), (100, 0.001, 1), (999, 0.1, 100),
                                               (1_000_000, 0.1, 100_000), (1_000_003, 0.1, 100_000)])  # fmt: skip
def test_slots_for(n, ratio, m):
    assert slots_for(n, ratio)[0] == m


@given(st.integers(1, 10**12), st.floats(1e-6, 1))
def test_slots_stay_within_a_unit_of_alignment(n, ratio):
    m, alignment = slots_for(n, ratio)
    assert 1 <= m <= n
    assert abs(m - ratio * n) <= max(1, alignment)
