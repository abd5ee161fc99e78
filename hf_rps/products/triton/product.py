"""The product of a folded matrix on CUDA, registered to be asked before those of torch."""

from __future__ import annotations

from torch import Tensor

from hf_rps.mappings.base import SharedMatrix
from hf_rps.products.base import FewTokens, register
from hf_rps.products.triton.launch import loaded
from hf_rps.products.triton.matrix import KernelMatrix, can_serve, usable


@register
class TritonProduct(FewTokens):
    """Few tokens: straight from psi, in float32 until the end. Many: W made by one launch, for the library's product.

    Where Triton can't be imported or a kernel can't be compiled, it does what :class:`Made` does, after a warning.
    HF_RPS_DISABLE_TRITON=1 keeps it from being chosen.
    """

    matrix: KernelMatrix

    def __init__(self, matrix: SharedMatrix):
        super().__init__(KernelMatrix(matrix))

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return can_serve(matrix)

    def fits(self, x: Tensor) -> bool:
        return x.is_cuda and usable(x)

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        module, cols = loaded(), self.matrix.cols
        if module is not None:
            tokens = x.numel() // cols
            if 0 < tokens <= module.FEW_TOKENS and self._understands(x, psi, bias):
                y = self.matrix.few(x, psi, bias, tokens)
                if y is not None:
                    return y
        return self._made.linear(x, psi, bias)

    def _understands(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> bool:
        """False where an argument has to be brought into shape, or refused, by torch's own product."""
        device = x.get_device()
        return (
            x.dtype == psi.dtype
            and x.size(-1) == self.matrix.cols
            and psi.get_device() == device
            and usable(psi)
            and (bias is None or (bias.get_device() == device and bias.is_contiguous()))
        )

    def kept_tensors(self) -> list[Tensor]:
        return self.matrix.kept_tensors()
