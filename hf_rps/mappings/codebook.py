"""Codebooks: every row of a matrix has a few numbers of its own, and each weight is one of them.

    W[r, c] = psi[start + (r * groups + c // group_size) * entries + codes[r, c]]

Which one is learned from a pretrained weight (:mod:`hf_rps.learning`) and stored in a few bits: the map is learned, not
hashed, and psi is all the codebooks.

Source: 'Sketch to adapt: fine-tunable sketches for efficient LLM adaptation' (SketchTune), which trains them.
"""

from __future__ import annotations

from collections.abc import Mapping as Tensors
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_rps.mappings.base import Mapping, SharedMatrix, Span
from hf_rps.mappings.codes import packed_size, unpack

BITS = (2, 3, 4, 8)


class Faster(Protocol):
    """Who can do a codebook matrix's work faster than torch's operations, on some devices and dtypes."""

    def make(self, matrix: CodebookMatrix, psi: Tensor) -> Tensor | None:
        """W (rows, cols) in psi's dtype, a new contiguous tensor; None where this is not for it."""

    def add_adjoint(self, matrix: CodebookMatrix, into: Tensor, gradient: Tensor) -> bool:
        """``into`` (m,) += R^T ``gradient`` (rows, cols); False where this is not for it, and nothing was done."""


FASTER: list[Faster] = []  # asked in order; :mod:`hf_rps.products` puts them here, which this module must not know


class CodebookMatrix(SharedMatrix):
    """W (rows, cols) by codes and codebooks.

    Args:
        span: The matrix's rows and columns.
        bits: Of a code.
        group: Columns of a row that share a codebook.
        start: First slot of its codebooks.
    """

    def __init__(self, span: Span, bits: int, group: int, start: int):
        self.rows, self.cols, self.bits, self.group, self.start = span.rows, span.cols, bits, group, start
        self.groups, self.entries = -(-span.cols // group), 2**bits
        self.size = self.rows * self.groups * self.entries
        self._home: Tensors[str, Tensor] = {}
        self._key = "codes"

    def stored(self) -> dict[str, Tensor]:
        codes = self._home.get(self._key)
        if codes is None:
            codes = torch.empty(self.rows, packed_size(self.cols, self.bits), dtype=torch.uint8, device="meta")
        return {"codes": codes}

    def keep_in(self, home: Tensors[str, Tensor], keys: dict[str, str]) -> None:
        self._home, self._key = home, keys["codes"]

    @property
    def codes(self) -> Tensor:
        """Packed, uint8 (rows, bytes)."""
        return self._home[self._key]

    def books(self, psi: Tensor) -> Tensor:
        """All codebooks (rows, groups * entries), a view of psi or of its gradient."""
        return psi[self.start : self.start + self.size].view(self.rows, -1)

    def places(self, device: torch.device) -> Tensor:
        """Of every weight, its entry among all those of its row: int64 (rows, cols)."""
        codes = unpack(self.codes.to(device), self.cols, self.bits).to(torch.int64)
        if self.groups > 1:
            codes = codes + torch.arange(self.cols, device=device) // self.group * self.entries
        return codes

    def weight(self, psi: Tensor) -> Tensor:
        return self.books(psi).gather(1, self.places(psi.device))

    def make(self, psi: Tensor, base: Tensor | None = None) -> Tensor:
        for faster in FASTER:
            weight = faster.make(self, psi)
            if weight is not None:
                return weight if base is None else torch.add(base, weight.to(base.dtype)).contiguous()
        return super().make(psi, base)

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        if any(faster.add_adjoint(self, into, gradient) for faster in FASTER):
            return
        self.books(into).scatter_add_(1, self.places(into.device), gradient.to(into.dtype))

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        one = torch.tensor(factor, device=into.device, dtype=into.dtype)
        self.books(into).scatter_add_(1, self.places(into.device), one.expand(self.rows, self.cols))


class Codebook(Mapping):
    """Codebooks per row or per group of a row, learned from the weights."""

    name = "codebook"
    help = "a few numbers per row, and for every weight which of them, learned from pretrained weights"
    options = ("bits", "group_size")
    is_learned = True

    def __init__(
        self, spans: Sequence[Span], ratio: float | None, key: int, base: int = 0, *, bits: int, group_size: int | None
    ):
        self.n, self.base, self.bits, self.group_size = spans[-1].stop, base, bits, group_size
        self._starts, self.m = {}, 0
        for span in spans:
            self._starts[span.start] = base + self.m
            self.m += span.rows * -(-span.cols // self._group(span)) * 2**bits

    def _group(self, span: Span) -> int:
        return span.cols if self.group_size is None else min(self.group_size, span.cols)

    def matrix(self, span: Span, scale: float, signs: np.ndarray) -> CodebookMatrix:
        return CodebookMatrix(span, self.bits, self._group(span), self._starts[span.start])
