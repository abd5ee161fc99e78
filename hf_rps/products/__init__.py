"""Products with shared matrices, by device and number of tokens, and the autograd nodes over them."""

# rows of the table, which is filled by importing them; the last is asked first
from hf_rps.products import input_fold as input_fold  # isort: skip
from hf_rps.products import views as views  # isort: skip
from hf_rps.products import triton as triton  # isort: skip
from hf_rps.products import numba as numba  # isort: skip
