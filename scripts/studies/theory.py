"""Parameter sharing against pruning, in theory: how well are inner products kept at equal memory?

A linear model whose n weights are w = R psi, with m trained numbers psi, computes f(x) = <R psi, x> = <psi, R^T x>. So
it is an ordinary linear model on m compressed features R^T x, and what it can tell apart or fit is decided by the inner
products <R^T x, R^T y> that are left of <x, y>. A pruned model is the same with an R that only copies the kept
coordinates. Here <x, y> is estimated by both, many times; the mean squared error is set beside its prediction.

Let z_i = x_i y_i, and let P(S) be the sum of (x_i y_j + x_j y_i)^2 over the unordered pairs {i, j} of a set S of
weights (:func:`pair_energy`). Over the random maps, or the random masks:

- RANDOMFOLD, a sign per weight: two weights meet with probability 1/m if they are in different partitions and never
  within one, so Var = (P(all) - sum over partitions of P(partition)) / m, which is 0 at m = n.
- RANDOMFOLD, a sign per row: :func:`row_fold_moments`. Entries of one row that meet have the same sign: a bias.
- HashedNets, a hash per weight: any two weights meet with probability 1/m, so Var = P(all) / m, also at m = n.
- Random pruning, k of n kept without replacement and rescaled by n/k: Var = n^2/k (1 - k/n) S^2 with S^2 the sample
  variance of z. Once with k such that values and positions take the bytes of the shared array, as trained masks have
  to; once with k = m, which is the fair count where the mask is drawn from a seed and so need not be stored.
- Magnitude pruning answers another question: it knows one vector, x, as after training, and only y is unknown. It keeps
  the k largest |x_i| and has no randomness of its own, so its error is a mean over draws of y (y's entries with new
  positions and signs): sum over the dropped i of x_i^2 |y|^2 / n. Such a y is nearly orthogonal to x, so that even the
  answer 0 errs by |x||y| / sqrt(n) only, and RANDOMFOLD by about sqrt(n/m - 1) times that. Do not read this line
  against the others, whose y is given.

Where z is spread as evenly as a Gaussian's, pruning at k = m and sharing have the same variance. They part with the sum
of z_i^2: pruning pays for a product that sits in few coordinates, and sharing doesn't; where all z_i are equal, pruning
is exact, and sharing isn't.

Sources: 'In defense of parameter sharing for model-compression' (ICLR 2024), its analysis of linear models; 'Feature
hashing for large scale multitask learning' (ICML 2009) for the variance of hashing; Cochran, 'Sampling techniques',
theorem 2.2, for sampling without replacement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_rps.folding import slots_for
from hf_rps.mapping import Target, WeightMap
from studies.methods.magnitude import most_kept, sparse_bytes

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
_ROUNDING = 1e-20  # relative squared errors below this are float64's, not the method's


def pair_energy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum of (x_i y_j + x_j y_i)^2 over unordered pairs i != j, in O(n); x, y (..., n) -> (...)."""
    z = x * y
    return (x**2).sum(-1) * (y**2).sum(-1) + z.sum(-1) ** 2 - 2 * (z**2).sum(-1)


def fold_variance(x: np.ndarray, y: np.ndarray, m: int) -> float:
    """Variance of <R^T x, R^T y> for RANDOMFOLD on m slots, a sign per weight, uniform rotations; x, y (n,)."""
    padding = (0, -len(x) % m)
    within = pair_energy(np.pad(x, padding).reshape(-1, m), np.pad(y, padding).reshape(-1, m))
    return float((pair_energy(x, y) - within.sum()) / m) if len(x) > m else 0.0


def row_fold_moments(x: np.ndarray, y: np.ndarray, m: int) -> tuple[float, float]:
    """Bias and variance of <R^T x, R^T y> for RANDOMFOLD, a sign per row, uniform rotations; x, y (rows, cols).

    Given the rotations, the error is b + sum over r < r' of s_r s_r' a_rr', where a_rr' adds x_i y_j + x_j y_i over the
    weights of rows r and r' that meet, and b adds x_i y_j + x_j y_i over those of one row. The products s_r s_r' are
    uncorrelated, so Var = Var[b] + sum of E[a_rr'^2] = Var[b] + sum (Var[a_rr'] + E[a_rr']^2). a and b are sums over
    pairs of partitions of circular correlations, taken at the difference of two rotations; these differences are
    pairwise independent. (Two rows never both lie across p and across q, so for p < q the piece in p names the row r.)
    By Parseval, a correlation's variance over rotations is its power at the frequencies other than 0, and summed over
    the pairs of rows that power needs only each partition's sums over its rows: O(rows * n log m) in all.
    """
    rows, cols = x.shape
    partitions = -(-x.size // m)
    row, flat = np.repeat(np.arange(rows), cols), np.arange(x.size)
    pieces = np.zeros((2, rows, partitions * m))  # x and y, every row alone in an array of zeros
    pieces[0, row, flat], pieces[1, row, flat] = x.ravel(), y.ravel()
    pieces = pieces.reshape(2, rows, partitions, m)

    fx, fy = np.fft.fft(pieces)[..., 1:]  # (rows, partitions, m - 1)
    power_x, power_y, cross = (np.abs(fx) ** 2).sum(0), (np.abs(fy) ** 2).sum(0), (fx * fy.conj()).sum(0)
    products = power_x.sum(0) * power_y.sum(0) - (power_x * power_y).sum(0)  # over p != q; both orders of x and y
    products += (cross.sum(0) ** 2 - (cross**2).sum(0)).real
    variance = products.sum() / m**2

    sx, sy = pieces.sum(-1)  # (rows, partitions)
    means = (np.outer(sx.sum(-1), sy.sum(-1)) - sx @ sy.T) / m  # over p != q; x of row r, y of row r'
    variance += (np.triu(means + means.T, 1) ** 2).sum()
    return float(np.trace(means)), float(variance)


def hash_variance(x: np.ndarray, y: np.ndarray, m: int) -> float:
    """Variance of <R^T x, R^T y> where every weight has an independent, uniform slot of m and a sign; x, y (n,)."""
    return float(pair_energy(x, y) / m)


def pruning_variance(x: np.ndarray, y: np.ndarray, kept: int) -> float:
    """Variance of n/kept * sum of x_i y_i over ``kept`` of n coordinates drawn without replacement; x, y (n,)."""
    n = len(x)
    return float(n**2 / kept * (1 - kept / n) * np.var(x * y, ddof=1))


def magnitude_error(x: np.ndarray, y: np.ndarray, kept: int) -> float:
    """Mean squared error of the sum over the ``kept`` largest |x_i|, over all orders and signs of y's entries."""
    dropped = np.sort(x**2)[: len(x) - kept]
    return float(dropped.sum() * np.mean(y**2))


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
    """Errors of <R^T x, R^T y> with the library's own WeightMap, one a seed.

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


def study(
    trials: int = 4000, n: int = 4096, compressions: Sequence[float] = (1, 2, 5, 10, 20, 50, 100), seed: int = 0
) -> list[dict]:
    """Predict and measure every method's error for every pair of vectors and compression.

    With a sign per weight the n weights are one matrix of one column, in which
    :func:`hf_rps.folding.draw_shifts` has no rows to keep from coinciding, so that rotations are uniform as the formula
    has them. With a sign per row they are a square matrix, in which rotations that lay whole rows on whole rows are
    avoided where a row is at most m/4 long. The prediction leaves this out: at n = 4096 it concerns one rotation in
    64 a pair of partitions (one in 32 where 64 does not divide m), less than what the measurement can tell.

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
    layouts = [slots_for(n, 1 / compression) for compression in compressions]
    if any(alignment > 1 and m < n for m, alignment in layouts):
        raise ValueError(
            f"n={n} is not valid with compressions {compressions}; the predictions are for uniform rotations, and the "
            f"library aligns those of so many slots: lower n"
        )
    slots = [m for m, _ in layouts]
    paid = [most_kept(m / n, n, _VALUE_BYTES) for m in slots]
    if not all(paid):
        compression = compressions[paid.index(0)]
        raise ValueError(f"compression {compression} of n={n} coordinates leaves no room for one and its index")
    vectors = draw_vectors(n, seed)
    pairs = np.array(list(vectors.values()))
    column, matrix = Target("w", n, 1, 1.0), Target("w", side, side, 1.0)
    seeds = range(seed * trials, (seed + 1) * trials)
    random, magnitude = pruning_errors(pairs, paid + slots, trials, seed)

    rows = []
    for index, (compression, m, kept) in enumerate(zip(compressions, slots, paid, strict=True)):
        errors = {
            FOLD: sharing_errors(pairs, column, m / n, seeds, mapping="fold", sign="element"),
            ROW_FOLD: sharing_errors(pairs, matrix, m / n, seeds, mapping="fold", sign="row"),
            HASH: sharing_errors(pairs, column, m / n, seeds, mapping="hash", sign="element"),
            PRUNE_BYTES: random[:, index],
            PRUNE_NUMBERS: random[:, len(slots) + index],
            MAGNITUDE: magnitude[:, index],
        }
        shared = (m, m * _VALUE_BYTES)
        stored = {FOLD: shared, ROW_FOLD: shared, HASH: shared}
        for method, count in ((PRUNE_BYTES, kept), (PRUNE_NUMBERS, m), (MAGNITUDE, kept)):
            stored[method] = (count, sparse_bytes(count, n, _VALUE_BYTES))
        for line, (name, (x, y)) in enumerate(vectors.items()):
            bias, variance = row_fold_moments(x.reshape(side, side), y.reshape(side, side), m)
            predicted = {
                FOLD: fold_variance(x, y, m),
                ROW_FOLD: bias**2 + variance,
                HASH: hash_variance(x, y, m),
                PRUNE_BYTES: pruning_variance(x, y, kept),
                PRUNE_NUMBERS: pruning_variance(x, y, m),
                MAGNITUDE: magnitude_error(x, y, kept),
            }
            for method in METHODS:
                squares = errors[method][line] ** 2
                rows.append({
                    "vectors": name,
                    "method": method,
                    "compression": compression,
                    "numbers": stored[method][0],
                    "bytes": stored[method][1],
                    "n": n,
                    "product": float(x @ y),
                    "predicted_bias": bias if method == ROW_FOLD else 0.0,
                    "measured_bias": float(errors[method][line].mean()),
                    "predicted": predicted[method],
                    "measured": float(squares.mean()),
                    "standard_error": float(squares.std(ddof=1) / math.sqrt(trials)),
                })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: for every pair of vectors a table of the root mean squared errors over |x||y|, predicted / measured."""
    grouped: dict[str, dict[float, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        grouped[row["vectors"]][row["compression"]][row["method"]] = row

    def root(square: float) -> str:
        return f"{math.sqrt(square):.4f}" if square > _ROUNDING else "0"

    lines = []
    for name, by_compression in grouped.items():
        head = ["compression", "numbers shared (kept at equal bytes)", *METHODS, "bias of the sign per row"]
        lines += [f"**{name}**, root mean squared error over \\|x\\|\\|y\\|, predicted / measured", ""]
        lines += [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
        for compression, by_method in by_compression.items():
            cells = [f"{compression:g}x", f"{by_method[FOLD]['numbers']:,} ({by_method[PRUNE_BYTES]['numbers']:,})"]
            cells += [f"{root(by_method[m]['predicted'])} / {root(by_method[m]['measured'])}" for m in METHODS]
            row = by_method[ROW_FOLD]
            exact = row["measured"] <= _ROUNDING
            cells.append("0 / 0" if exact else f"{row['predicted_bias']:+.4f} / {row['measured_bias']:+.4f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    deviations = [
        abs(row["measured"] - row["predicted"]) / row["standard_error"] for row in rows if row["measured"] > _ROUNDING
    ]
    lines.append(
        f"Of {len(deviations)} measured mean squared errors, {sum(d < 2 for d in deviations)} are within two standard "
        f"errors of the prediction; the furthest is {max(deviations):.1f} away."
    )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path | str) -> None:
    """Root mean squared error against compression, one panel a pair of vectors: lines predicted, markers measured.

    Bars are two standard errors long either way. An error of 0, as at compression 1, has no place on the log axis. Two
    grey lines are the errors of the answer 0, which needs no numbers: for the given y and for magnitude pruning's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(row["vectors"] for row in rows))
    compressions = sorted({row["compression"] for row in rows})
    styles = dict(zip(METHODS, zip(("-", "--", "-", "-", ":", "-"), "os^DvP", strict=True), strict=True))
    figure, axes = plt.subplots(1, len(names), figsize=(12, 6), layout="constrained", sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, (method, (line, marker)) in enumerate(styles.items()):
            shown = [row for row in rows if (row["vectors"], row["method"]) == (name, method)]
            shown = [row for row in shown if row["measured"] > _ROUNDING]
            at = [row["compression"] for row in shown]
            measured = np.sqrt([row["measured"] for row in shown])
            bars = [row["standard_error"] / root for row, root in zip(shown, measured, strict=True)]  # 2 * d sqrt(v)
            axis.plot(at, np.sqrt([row["predicted"] for row in shown]), line, color=f"C{number}", alpha=0.8)
            style = {"color": f"C{number}", "marker": marker, "markerfacecolor": "none", "linestyle": "none"}
            axis.errorbar(at, measured, bars, capsize=2, label=method, **style)
        given = next(row for row in rows if row["vectors"] == name)
        axis.axhline(abs(given["product"]), color="grey", lw=1, label="the answer 0, given y")
        axis.axhline(given["n"] ** -0.5, color="grey", lw=1, linestyle=":", label="the answer 0, random y")
        axis.set(xscale="log", yscale="log", xlabel="compression n/m", title=f"{name} x and y")
        axis.set_xticks(compressions, [f"{compression:g}" for compression in compressions])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("root mean squared error of <x, y> over |x||y|")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("Inner products kept by sharing and by pruning: predicted (lines) and measured (markers)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
