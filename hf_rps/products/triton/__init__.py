"""Products on CUDA by Triton: one launch for few tokens, and one to make W or to add up its gradient."""

# rows of the table, which is filled by importing them
from hf_rps.products.triton import codebook as codebook
from hf_rps.products.triton import product as product
