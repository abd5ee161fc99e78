"""Formulas: the mean squared error of an inner product under sharing and pruning, derived in the package's text."""

from __future__ import annotations

import numpy as np


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
