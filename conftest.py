"""For the doctests of the library: what can't be imported everywhere is collected where it can."""

from importlib.util import find_spec

KERNELS = {"triton": ("kernels", "codebook_kernels"), "numba": ("kernels",)}
collect_ignore = [
    f"hf_rps/products/{name}/{file}.py" for name, files in KERNELS.items() if not find_spec(name) for file in files
]
