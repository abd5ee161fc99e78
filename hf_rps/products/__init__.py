"""Products with shared matrices, by device and number of tokens, and the autograd nodes over them."""

from hf_rps.products import views as views  # a row of the table, which is filled by importing it
