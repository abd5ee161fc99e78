"""scripts/studies/theory: its formulas against plain sums and full enumerations, and against measurements."""

from itertools import combinations, permutations, product

import numpy as np
import pytest

from hf_rps.mappings.fold import Fold
from studies import theory


def pair(n, seed=0):
    """x and y (n,), neither centred nor alike in their entries."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(n) * rng.uniform(0.2, 3, n) + 0.3, rng.standard_normal(n) + 0.5


def estimate(x, y, m, slots, signs):
    """<R^T x, R^T y> with R[i, slots[i]] = signs[i], as a matrix product."""
    r = np.zeros((len(x), m))
    r[np.arange(len(x)), slots] = signs
    return (r.T @ x) @ (r.T @ y)


def all_slots(n, m):
    """The slots (n,) of RANDOMFOLD for every choice of rotations."""
    for shifts in product(range(m), repeat=-(-n // m)):
        runs = Fold.of(n, m, shifts).runs(0, n)
        yield np.concatenate([np.arange(slot, slot + length) for slot, length in runs])


def all_signs(n):
    return map(np.array, product((-1, 1), repeat=n))


@pytest.mark.parametrize(("n", "m"), [(7, 3), (12, 4), (10, 7), (5, 5), (9, 1)])
def test_sums_over_pairs(n, m):
    x, y = pair(n)
    squares = {(i, j): (x[i] * y[j] + x[j] * y[i]) ** 2 for i, j in combinations(range(n), 2)}
    apart = sum(square for (i, j), square in squares.items() if i // m != j // m)
    assert theory.pair_energy(x, y) == pytest.approx(sum(squares.values()))
    assert theory.fold_variance(x, y, m) == pytest.approx(apart / m)
    assert theory.hash_variance(x, y, m) == pytest.approx(sum(squares.values()) / m)


@pytest.mark.parametrize(("n", "m"), [(6, 3), (6, 4), (5, 2), (4, 1)])
def test_fold_enumerated(n, m):
    x, y = pair(n)
    values = [estimate(x, y, m, slots, signs) for slots in all_slots(n, m) for signs in all_signs(n)]
    assert np.mean(values) == pytest.approx(x @ y)
    assert np.var(values) == pytest.approx(theory.fold_variance(x, y, m))


# whole rows, split rows, rows longer than the array, one column (a sign per weight) and one row (a single sign)
@pytest.mark.parametrize(
    ("rows", "cols", "m"), [(2, 3, 3), (3, 2, 2), (3, 2, 4), (3, 4, 5), (2, 3, 2), (3, 3, 2), (6, 1, 3), (1, 6, 4)]
)
def test_row_signs_enumerated(rows, cols, m):
    n = rows * cols
    x, y = pair(n)
    row_signs = [np.repeat(signs, cols) for signs in all_signs(rows)]
    values = [estimate(x, y, m, slots, signs) for slots in all_slots(n, m) for signs in row_signs]
    bias, variance = theory.row_fold_moments(x.reshape(rows, cols), y.reshape(rows, cols), m)
    assert np.mean(values) - x @ y == pytest.approx(bias, abs=1e-9)
    assert np.var(values) == pytest.approx(variance)


def test_one_column_has_a_sign_per_weight():
    x, y = pair(60)
    for m in (7, 20, 60):
        bias, variance = theory.row_fold_moments(x[:, None], y[:, None], m)
        assert bias == pytest.approx(0, abs=1e-9)
        assert variance == pytest.approx(theory.fold_variance(x, y, m), abs=1e-9)


def test_hash_enumerated():
    x, y = pair(4)
    values = [estimate(x, y, 3, slots, signs) for slots in product(range(3), repeat=4) for signs in all_signs(4)]
    assert np.mean(values) == pytest.approx(x @ y)
    assert np.var(values) == pytest.approx(theory.hash_variance(x, y, 3))


@pytest.mark.parametrize("kept", [1, 4, 6])
def test_random_pruning_enumerated(kept):
    x, y = pair(6)
    values = [6 / kept * sum(x[i] * y[i] for i in chosen) for chosen in combinations(range(6), kept)]
    assert np.mean(values) == pytest.approx(x @ y)
    assert np.var(values) == pytest.approx(theory.pruning_variance(x, y, kept), abs=1e-9)


def test_magnitude_pruning_enumerated():
    x, y = pair(4)
    dropped = np.argsort(np.abs(x))[:3]
    errors = [sum(x[i] * signs[i] * new[i] for i in dropped) for new in permutations(y) for signs in all_signs(4)]
    assert np.mean(np.square(errors)) == pytest.approx(theory.magnitude_error(x, y, kept=1))


def test_pruning_is_exact_and_sharing_is_not_where_products_are_equal():
    x = np.tile([1.0, -1.0], 50)
    assert theory.pruning_variance(x, x, 10) == 0
    assert theory.fold_variance(x, x, 10) > 0


def test_sharing_and_pruning_agree_for_gaussians_and_part_for_a_power_law():
    vectors = theory.draw_vectors(4096)
    ratios = {name: theory.pruning_variance(x, y, 400) / theory.fold_variance(x, y, 400)
              for name, (x, y) in vectors.items()}  # fmt: skip
    assert 0.9 < ratios["Gaussian"] < 1.1
    assert ratios["power law"] > 100


@pytest.fixture(scope="module")
def rows():
    return theory.study(trials=1500, n=256, compressions=(1, 2, 5, 10))


def test_measured_is_within_five_standard_errors(rows):
    assert len(rows) == 2 * 4 * len(theory.METHODS)
    for row in rows:
        assert row["measured"] == pytest.approx(row["predicted"], abs=5 * row["standard_error"] + 1e-20), row
        assert row["measured_bias"] == pytest.approx(
            row["predicted_bias"], abs=5 * np.sqrt(row["measured"] / 1500) + 1e-12
        ), row


def test_only_hashing_errs_without_compression(rows):
    for row in rows:
        if row["compression"] == 1:
            exact = row["method"] != theory.HASH
            assert (row["predicted"] < 1e-25) == (row["measured"] < 1e-25) == exact, row


def test_memory_is_equal(rows):
    shared = {row["compression"]: row for row in rows if row["method"] == theory.FOLD}
    for row in rows:
        limit = shared[row["compression"]]
        if row["method"] == theory.PRUNE_NUMBERS:
            assert row["numbers"] == limit["numbers"]
        else:
            assert row["bytes"] <= limit["bytes"]


def test_table_and_plot(rows, tmp_path):
    lines = theory.table(rows).splitlines()
    assert sum(line.startswith("| 10x") for line in lines) == 2
    cells = next(line for line in lines if line.startswith("| 1x")).split(" | ")
    assert cells[1:4] == ["256 (256)", "0 / 0", "0 / 0"]
    theory.plot(rows, tmp_path / "theory.png")
    assert (tmp_path / "theory.png").stat().st_size > 10_000


@pytest.mark.parametrize(("n", "compressions"), [(200, (2,)), (256, (200,)), (16384, (2,))])
def test_unfit_sizes(n, compressions):
    with pytest.raises(ValueError, match=f"n={n}"):
        theory.study(trials=2, n=n, compressions=compressions)
