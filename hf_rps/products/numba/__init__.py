"""Products with codebook matrices on a CPU by Numba: few tokens straight from packed codes, W made, and its adjoint."""

from hf_rps.products.numba import product as product  # a row of the table, which is filled by importing it
