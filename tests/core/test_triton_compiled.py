"""The Triton kernels of codebook matrices compiled for GPUs that need not be there: by Triton's own compiler and ptxas.

With Triton on the path, and without TRITON_INTERPRET, under which there is nothing to compile.
"""

import pytest
import torch
from triton_cases import INTERPRETED

from hf_rps.mappings.codebook import BITS
from hf_rps.products.triton import codebook

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
triton, compiler, backends = map(pytest.importorskip, ("triton", "triton.compiler", "triton.backends.compiler"))

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
DEVICE, CODES = torch.device("cuda", 0), torch.uint8
SHARED = 48 << 10  # bytes that every program may have


def compiled(launcher, types, architecture):
    """What a launcher would have compiled for arguments of these types (None: no tensor) before its fixed ones."""
    kernel, fixed = launcher._kernel, dict(enumerate(launcher._fixed, len(types)))
    names = {i: NAMES.get(kind, kind) for i, kind in enumerate(types) if kind is not None}
    constants = fixed | {i: None for i, kind in enumerate(types) if kind is None}
    signature = {name: names.get(i, "constexpr") for i, name in enumerate(kernel.arg_names)}
    source = compiler.ASTSource(
        kernel, signature, {kernel.arg_names[i]: value for i, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in names.items() if name.startswith("*")},
    )  # fmt: skip
    return triton.compile(source, target=backends.GPUTarget("cuda", architecture, 32), options=launcher._options)


@pytest.mark.parametrize(("architecture", "dtype"), [(80, torch.float16), (90, torch.bfloat16), (90, torch.float32)])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_compile(bits, architecture, dtype):
    shape, single = (2048, 2048, 2048 if bits % 2 else 24, bits, False), torch.float32
    for launcher, types in [
        (codebook._product(shape, True, DEVICE, dtype, None), (dtype, dtype, dtype, None, CODES, "i32", "i32")),
        (codebook._product(shape, False, DEVICE, dtype, single),
         (dtype, dtype, dtype, single, CODES, "i32", "i32", "i32")),
        (codebook._make(shape, DEVICE, dtype), (dtype, dtype, CODES, "i64", "i32")),
        (codebook._adjoint(shape, DEVICE, dtype, single), (dtype, single, CODES, "i32", "i32")),
    ]:  # fmt: skip
        kernel = compiled(launcher, types, architecture)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED
