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

from studies.theory.measurements import (
    FOLD,
    HASH,
    MAGNITUDE,
    METHODS,
    PRUNE_BYTES,
    PRUNE_NUMBERS,
    ROW_FOLD,
    draw_vectors,
    pruning_errors,
    sharing_errors,
    study,
)
from studies.theory.predictions import (
    fold_variance,
    hash_variance,
    magnitude_error,
    pair_energy,
    pruning_variance,
    row_fold_moments,
)
from studies.theory.report import plot, table

__all__ = [
    "FOLD",
    "HASH",
    "MAGNITUDE",
    "METHODS",
    "PRUNE_BYTES",
    "PRUNE_NUMBERS",
    "ROW_FOLD",
    "draw_vectors",
    "fold_variance",
    "hash_variance",
    "magnitude_error",
    "pair_energy",
    "plot",
    "pruning_errors",
    "pruning_variance",
    "row_fold_moments",
    "sharing_errors",
    "study",
    "table",
]
