"""For the doctests of the library: what can't be imported everywhere is collected where it can."""

from importlib.util import find_spec

collect_ignore = [f"hf_rps/products/{name}/kernels.py" for name in ("triton", "numba") if not find_spec(name)]
