"""Products on CUDA by Triton: one launch for few tokens, and one to make W or to add up its gradient."""

from hf_rps.products.triton import product as product  # a row of the table, which is filled by importing it
