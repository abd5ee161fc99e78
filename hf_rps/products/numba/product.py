"""The product of a coded matrix with few tokens on a CPU, registered to be asked before those of torch."""

from __future__ import annotations

from torch import Tensor

from hf_rps import internals
from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.codebook import CodedMatrix
from hf_rps.products.base import FewTokens, register
from hf_rps.products.numba.loading import loaded
from hf_rps.products.numba.matrix import few_tokens, usable


@register
class NumbaProduct(FewTokens):
    """Few tokens: straight from packed codes, in float32 until the end. Many are for :class:`Made`.

    The matrix's own W and adjoint are as fast (:mod:`matrix`).
    HF_RPS_DISABLE_NUMBA=1 keeps it from being chosen.
    """

    matrix: CodedMatrix

    @classmethod
    def accepts(cls, matrix: SharedMatrix) -> bool:
        return isinstance(matrix, CodedMatrix)

    def fits(self, x: Tensor) -> bool:
        return usable(x) and self._is_few(x)

    def _is_few(self, x: Tensor) -> bool:
        cols = self.matrix.cols
        return 0 < x.numel() <= loaded().FEW_TOKENS * cols and x.size(-1) == cols

    def linear(self, x: Tensor, psi: Tensor, bias: Tensor | None) -> Tensor:
        if self.fits(x) and usable(psi) and psi.dtype == x.dtype and (bias is None or usable(bias)):
            y = few_tokens(self.matrix, self.tokens(x), psi, bias)
            if y is not None:
                return y if x.dim() == 2 else internals.reshaped(y, (*x.shape[:-1], self.matrix.rows))
        return self._made.linear(x, psi, bias)
