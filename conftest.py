"""For the doctests of the library: what can't be imported everywhere is collected where it can."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["hf_rps/products/triton/kernels.py"]
