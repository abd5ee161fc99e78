"""The measurements: errors of inner products over many maps and masks, beside what the formulas predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_rps.mappings.base import Target
from hf_rps.mappings.sizes import slots_for
from hf_rps.mappings.weight_map import WeightMap
from studies.methods.magnitude import most_kept, sparse_bytes
from studies.theory.predictions import (
    fold_variance,
    hash_variance,
    magnitude_error,
    pruning_variance,
    row_fold_moments,
)

FOLD = "RANDOMFOLD, sign per weight"
ROW_FOLD = "RANDOMFOLD, sign per row"
HASH = "HashedNets"
PRUNE_BYTES = "random pruning, equal bytes"
PRUNE_NUMBERS = "random pruning, equal numbers"
MAGNITUDE = "magnitude pruning of x, random y"
METHODS = (FOLD, ROW_FOLD, HASH, PRUNE_BYTES, PRUNE_NUMBERS, MAGNITUDE)
_VALUE_BYTES = 4
_CORRELATION = 0.5
_DECAY = 0.7  # of the power law: the largest of 4096 coordinates then holds a third of the squared norm


def draw_vectors(n: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs x, y (n,) of norm 1: y is half x and for the rest an independent vector of the same kind.

    "Gaussian": entries N(0, 1), all alike. "power law": magnitudes i^-0.7 in random order with random signs.
    """
    rng = np.random.default_rng(seed)
    power_law = np.arange(1, n + 1) ** -_DECAY
    drawn = {
        "Gaussian": rng.standard_normal((2, n)),
        "power law": np.stack([rng.permutation(power_law) * rng.choice([-1, 1], n) for _ in range(2)]),
    }
    vectors = {}
    for name, (x, z) in drawn.items():
        x, z = x / np.linalg.norm(x), z / np.linalg.norm(z)
        y = _CORRELATION * x + math.sqrt(1 - _CORRELATION**2) * z
        vectors[name] = (x, y / np.linalg.norm(y))
    return vectors


def sharing_errors(pairs: np.ndarray, target: Target, ratio: float, seeds: Sequence[int], **kind: str) -> np.ndarray:
    """Errors of <R^T x, R^T y> with the library's own WeightMap, one per seed.

    Args:
        pairs: (pairs, 2, n), the vectors x and y of every pair.
        target: The matrix that the n coordinates are the weights of, row-major.
        ratio: m / n.
        seeds: One map each.
        kind: The map's ``mapping`` and ``sign``.

    Returns:
        (pairs, seeds).
    """
    exact = (pairs[:, 0] * pairs[:, 1]).sum(-1)
    errors = np.empty((len(pairs), len(seeds)))
    for column, seed in enumerate(seeds):
        weight_map = WeightMap([target], ratio=ratio, seed=seed, **kind)
        slots = weight_map.slots(target.name).ravel()
        signs = np.broadcast_to(weight_map.signs(target.name), (target.out_features, target.in_features)).ravel()
        for line, pair in enumerate(pairs):
            x, y = (np.bincount(slots, signs * vector, weight_map.m) for vector in pair)
            errors[line, column] = x @ y - exact[line]
    return errors


def pruning_errors(pairs: np.ndarray, kept: Sequence[int], trials: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of random pruning of both vectors and of magnitude pruning of x with a y of new positions and signs.

    Args:
        pairs: (pairs, 2, n), the vectors x and y of every pair.
        kept: How many coordinates are kept. One drawn order gives the kept ones of every such number: its beginning.
        trials: Draws.
        seed: Of the draws.

    Returns:
        Two arrays (pairs, kept, trials).
    """
    rng = np.random.default_rng((seed, 1))
    n, kept = pairs.shape[-1], np.asarray(kept)
    x, y = pairs[:, 0], pairs[:, 1]
    z = x * y
    largest_first = np.take_along_axis(x, np.argsort(-np.abs(x), axis=-1), -1)
    random, magnitude = (np.empty((len(pairs), len(kept), trials)) for _ in range(2))
    for trial in range(trials):
        order, signs = rng.permutation(n), rng.choice([-1.0, 1.0], n)
        random[..., trial] = n / kept * np.cumsum(z[:, order], -1)[:, kept - 1] - z.sum(-1, keepdims=True)
        sums = np.cumsum(largest_first * signs * y[:, order], -1)
        magnitude[..., trial] = sums[:, kept - 1] - sums[:, -1:]
    return random, magnitude


class Budget(NamedTuple):
    """What one compression may store: ``slots`` numbers, or as many bytes, which hold ``kept`` and their places."""

    compression: float
    slots: int
    kept: int


def budgets(n: int, compressions: Sequence[float]) -> list[Budget]:
    """The budgets of n coordinates.

    Raises:
        ValueError: A compression leaves no byte to keep a coordinate in, or so many slots that the library aligns its
            rotations, which are then not the uniform ones of the formulas.
    """
    layouts = [slots_for(n, 1 / compression) for compression in compressions]
    if any(alignment > 1 and m < n for m, alignment in layouts):
        raise ValueError(
            f"n={n} is not valid with compressions {compressions}; the predictions are for uniform rotations, and the "
            f"library aligns those of so many slots: lower n"
        )
    paid = [most_kept(m / n, n, _VALUE_BYTES) for m, _ in layouts]
    if not all(paid):
        compression = compressions[paid.index(0)]
        raise ValueError(f"compression {compression} of n={n} coordinates leaves no room for one and its index")
    return [Budget(c, m, kept) for c, (m, _), kept in zip(compressions, layouts, paid, strict=True)]


def study(
    trials: int = 4000, n: int = 4096, compressions: Sequence[float] = (1, 2, 5, 10, 20, 50, 100), seed: int = 0
) -> list[dict]:
    """Predict and measure every method's error for every pair of vectors and compression.

    With a sign per weight the n weights are one matrix of one column, in which
    :func:`hf_rps.mappings.fold.draw_shifts` has no rows to keep from coinciding, so that rotations are uniform as the
    formula has them. With a sign per row they are a square matrix, in which rotations that lay whole rows on whole
    rows are avoided where a row is at most m/4 long. The prediction leaves this out: at n = 4096 it concerns one
    rotation in 64 per pair of partitions (one in 32 where 64 does not divide m), less than what the measurement can
    tell.

    Args:
        trials: Seeds (of maps or of draws) behind every measured number.
        n: Coordinates, a square number.
        compressions: n/m, each at least 1.
        seed: Of the vectors and, disjointly for every value, of the trials.

    Returns:
        One dict for each pair of vectors, compression and method: ``vectors``, ``method``, ``compression``, ``numbers``
        stored, ``bytes`` they and their positions take, ``n``, then, in units of |x||y|: ``product`` <x, y>,
        ``predicted_bias``, ``measured_bias`` (mean error), ``predicted`` and ``measured`` mean squared error (the
        variance where there is no bias), and ``standard_error`` of the latter.

    Raises:
        ValueError: ``n`` is no square, a compression leaves no byte to keep a coordinate in, or so many slots that the
            library aligns its rotations, which are then not the uniform ones of the formulas.
    """
    side = math.isqrt(n)
    if side**2 != n:
        raise ValueError(f"n={n} is not valid; a sign per row needs a square matrix of n weights, e.g. n={side**2}")
    allowed = budgets(n, compressions)
    vectors = draw_vectors(n, seed)
    pairs = np.array(list(vectors.values()))
    column, matrix = Target("w", n, 1, 1.0), Target("w", side, side, 1.0)
    seeds = range(seed * trials, (seed + 1) * trials)
    random, magnitude = pruning_errors(pairs, [b.kept for b in allowed] + [b.slots for b in allowed], trials, seed)
    rows = []
    for index, budget in enumerate(allowed):
        ratio = budget.slots / n
        errors = {
            FOLD: sharing_errors(pairs, column, ratio, seeds, mapping="fold", sign="element"),
            ROW_FOLD: sharing_errors(pairs, matrix, ratio, seeds, mapping="fold", sign="row"),
            HASH: sharing_errors(pairs, column, ratio, seeds, mapping="hash", sign="element"),
            PRUNE_BYTES: random[:, index],
            PRUNE_NUMBERS: random[:, len(allowed) + index],
            MAGNITUDE: magnitude[:, index],
        }
        for line, (name, pair) in enumerate(vectors.items()):
            of_pair = {method: errors[method][line] for method in METHODS}
            rows += [{"vectors": name} | row for row in _compare(*pair, budget, of_pair)]
    return rows


def _compare(x: np.ndarray, y: np.ndarray, budget: Budget, errors: dict[str, np.ndarray]) -> list[dict]:
    """The rows of one pair of vectors at one budget: every method's error, predicted and measured."""
    n, side = len(x), math.isqrt(len(x))
    compression, m, kept = budget
    bias, variance = row_fold_moments(x.reshape(side, side), y.reshape(side, side), m)
    predicted = {
        FOLD: fold_variance(x, y, m),
        ROW_FOLD: bias**2 + variance,
        HASH: hash_variance(x, y, m),
        PRUNE_BYTES: pruning_variance(x, y, kept),
        PRUNE_NUMBERS: pruning_variance(x, y, m),
        MAGNITUDE: magnitude_error(x, y, kept),
    }
    stored = dict.fromkeys((FOLD, ROW_FOLD, HASH), (m, m * _VALUE_BYTES))
    for method, count in ((PRUNE_BYTES, kept), (PRUNE_NUMBERS, m), (MAGNITUDE, kept)):
        stored[method] = (count, sparse_bytes(count, n, _VALUE_BYTES))
    rows = []
    for method in METHODS:
        squares = errors[method] ** 2
        rows.append({
            "method": method,
            "compression": compression,
            "numbers": stored[method][0],
            "bytes": stored[method][1],
            "n": n,
            "product": float(x @ y),
            "predicted_bias": bias if method == ROW_FOLD else 0.0,
            "measured_bias": float(errors[method].mean()),
            "predicted": predicted[method],
            "measured": float(squares.mean()),
            "standard_error": float(squares.std(ddof=1) / math.sqrt(len(squares))),
        })  # fmt: skip
    return rows
