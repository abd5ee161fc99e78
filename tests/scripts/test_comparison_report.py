"""The comparison of scripts/compare.py: what it concludes from rows, and the page that it fills."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.comparison import learning_rates, main_table, report


@given(st.floats(-6.5, -2.5), st.floats(0.05, 2), st.booleans(), st.floats(-7, -3), st.integers(4, 7))
def test_peak_of_a_parabola(top, bend, higher, first, count):
    """Exact for a parabola over the logarithm of evenly spaced rates; the end of the grid where the top is beyond."""
    logs = first + 0.7 * np.arange(count)
    scores = (-1 if higher else 1) * bend * (logs - top) ** 2
    found = math.log(learning_rates.peak(list(np.exp(logs)), list(scores), higher))
    if logs[0] + 0.36 < top < logs[-1] - 0.36:
        assert found == pytest.approx(top, abs=1e-6)
    else:
        assert logs[0] - 1e-9 <= found <= logs[-1] + 1e-9


@settings(deadline=None)
@given(st.floats(-0.6, 0.6), st.floats(-6, -4))
def test_law_finds_its_exponent(exponent, best):
    rates = [math.exp(x) for x in np.arange(-11, 0, 0.7)]
    rows = [
        {"task": "vit", "optimizer": "adamw", "init_exponent": 0.5, "compression": c, "learning_rate": rate,
         "validation": [1 - 0.05 * (math.log(rate) - best - shift - exponent * math.log(c)) ** 2
                        for shift in (-0.1, 0.1)]}
        for c in (1, 4, 20) for rate in rates
    ]  # fmt: skip
    (fit,) = learning_rates.law_fits(rows)
    assert fit["exponent"] == pytest.approx(exponent, abs=1e-6)
    assert fit["best"][1] == pytest.approx(math.exp(best), rel=1e-6)
    assert fit["error"] > 0


def test_tables_mark_the_best_the_edges_and_the_unreachable():
    common = {"task": "lm", "numbers": 10, "bytes": 40, "diverged": 0, "validation": [1.0, 1.0]}
    rows = [
        common | {"method": "dense", "compression": 1, "learning_rate": 0.01, "at_edge": False, "test": [2.0, 2.2]},
        common | {"method": "rps", "compression": 10, "learning_rate": 0.01, "at_edge": False, "test": [2.5, 2.5]},
        common | {"method": "snip", "compression": 10, "learning_rate": 0.1, "at_edge": True, "test": [3.0, 3.2]},
        {"task": "lm", "method": "depth", "compression": 10, "unreachable": "why"},
    ]
    table = main_table.compare_table(rows)
    assert "| RPS | **2.500 ± 0.000** at 0.01 |" in table  # fewer bits are better
    assert "| SNIP | 3.100 ± 0.141 at 0.1\\* |" in table
    assert "| smaller dense, depth | can't reach |" in table
    assert "Dense: 2.100 ± 0.141 at 0.01, 10 numbers, 40 bytes." in table


def test_the_page_is_filled_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n")
    assert report.fill(page, "one", "| new \\1 |\n")
    assert report.fill(page, "two", "x\n")
    assert not report.fill(page, "three", "y\n")
    assert page.read_text() == "a\n<!-- one -->\n| new \\1 |\n<!-- end -->\nb\n<!-- two -->\nx\n<!-- end -->\n"


def test_the_page_has_a_place_for_every_table():
    page = report.PAGE.read_text()
    for name in ("main", "storage", "learning-rate", "continuity"):
        assert f"<!-- {name}-vit -->" in page
        assert f"<!-- {name}-convnet -->" in page
    assert "<!-- stability-vit -->" in page
    assert "<!-- theory -->" in page
