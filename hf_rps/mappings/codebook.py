"""Codebooks: each weight is one of a few numbers that its row has, or a few weights together one of a few vectors.

    W[r, c] = psi[start + (r * groups + c // group_size) * entries + codes[r, c]]                           tile = 1
    W[r, c] = scales[r] * psi[start + (c // group_size * entries + codes[r, c // tile]) * tile + c % tile]  tile > 1

entries = 2**bits. Which one is learned from a pretrained weight (:mod:`hf_rps.learning`) and stored in a few bits: the
map is learned, not hashed, and psi is all the codebooks. Books of numbers belong to a row. Books of vectors are read by
all rows of a matrix, since a row is too short for one; a row then has a scale, which is part of the map, not of psi.

Source: 'Sketch to adapt: fine-tunable sketches for efficient LLM adaptation' (SketchTune), which trains codebooks per
row; 'GPTVQ: the blessing of dimensionality for LLM quantization' has vectors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping as Tensors
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.mappings.base import Mapping, SharedMatrix, Span
from hf_rps.mappings.codes import pack, packed_size, unpack

BITS = (2, 3, 4, 8)
SCALE_BYTES = 2  # of a row's scale, in bfloat16


class Faster(Protocol):
    """Who can do a coded matrix's work faster than torch's operations, on some devices and dtypes."""

    def make(self, matrix: CodedMatrix, psi: Tensor) -> Tensor | None:
        """W (rows, cols) in psi's dtype, a new contiguous tensor; None where this is not for it."""

    def add_adjoint(self, matrix: CodedMatrix, into: Tensor, gradient: Tensor) -> bool:
        """``into`` (m,) += R^T ``gradient`` (rows, cols); False where this is not for it, and nothing was done."""


FASTER: list[Faster] = []  # asked in order; :mod:`hf_rps.products` puts them here, which this module must not know


class CodedMatrix(SharedMatrix):
    """W (rows, cols) by codes and codebooks; a base class.

    Args:
        span: The matrix's rows and columns.
        bits: Of a code.
        group: Columns that share a codebook.
        start: First slot of its codebooks.

    Attributes:
        size: How many slots they take.
        row_bytes: Of what is stored for a row.
    """

    size: int
    row_bytes: int

    def __init__(self, span: Span, bits: int, group: int, start: int):
        self.rows, self.cols, self.bits, self.group, self.start = span.rows, span.cols, bits, group, start
        self.groups, self.entries = -(-span.cols // group), 2**bits
        self._home: Tensors[str, Tensor] = {}
        self._key = "codes"

    def stored(self) -> dict[str, Tensor]:
        codes = self._home.get(self._key)
        if codes is None:
            codes = torch.empty(self.rows, self.row_bytes, dtype=torch.uint8, device="meta")
        return {"codes": codes}

    def keep_in(self, home: Tensors[str, Tensor], keys: dict[str, str]) -> None:
        self._home, self._key = home, keys["codes"]

    @property
    def codes(self) -> Tensor:
        """What is stored, uint8 (rows, row_bytes): packed codes and, where rows have scales, their bytes."""
        return self._home[self._key]

    def codes_of(self, device: torch.device, ids: Tensor | None = None) -> Tensor:
        """:attr:`codes` on ``device``, of all rows or of ``ids`` (k,).

        Raises:
            IndexError: An id is no row.
        """
        codes = self.codes.to(device)
        return codes if ids is None else F.embedding(ids, codes)

    def segment(self, psi: Tensor) -> Tensor:
        """Its codebooks (size,), a view of psi or of its gradient."""
        return psi[self.start : self.start + self.size]

    def make(self, psi: Tensor, base: Tensor | None = None) -> Tensor:
        for faster in FASTER:
            weight = faster.make(self, psi)
            if weight is not None:
                return weight if base is None else torch.add(base, weight.to(base.dtype)).contiguous()
        return super().make(psi, base)

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        if not any(faster.add_adjoint(self, into, gradient) for faster in FASTER):
            self._add_adjoint(into, gradient.to(into.dtype))

    @abstractmethod
    def _add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        """:meth:`add_adjoint` by torch's operations, of a gradient in into's dtype."""


class CodebookMatrix(CodedMatrix):
    """Books of numbers, of which every row has its own."""

    def __init__(self, span: Span, bits: int, group: int, start: int):
        super().__init__(span, bits, group, start)
        self.size = self.rows * self.groups * self.entries
        self.row_bytes = packed_size(self.cols, bits)

    def books(self, psi: Tensor) -> Tensor:
        """All codebooks (rows, groups * entries), a view of psi or of its gradient."""
        return self.segment(psi).view(self.rows, -1)

    def places(self, device: torch.device, ids: Tensor | None = None) -> Tensor:
        """Of every weight, or those of rows ``ids`` (k,), its entry among all those of its row: int64 (rows, cols)."""
        codes = unpack(self.codes_of(device, ids), self.cols, self.bits).to(torch.int64)
        if self.groups > 1:
            codes = codes + torch.arange(self.cols, device=device) // self.group * self.entries
        return codes

    def _row_places(self, device: torch.device, ids: Tensor) -> Tensor:
        """Of the weights of rows ``ids`` (k,), their entries among all those of the matrix: int64 (k, cols)."""
        return self.places(device, ids) + ids[:, None] * (self.groups * self.entries)

    def look_up(self, ids: Tensor, psi: Tensor) -> Tensor:
        places = self._row_places(psi.device, ids.flatten())
        return self.segment(psi)[places].view(*ids.shape, self.cols)

    def add_look_up_adjoint(self, into: Tensor, ids: Tensor, gradient: Tensor) -> None:
        places = self._row_places(into.device, ids)
        self.segment(into).index_add_(0, places.flatten(), gradient.to(into.dtype).flatten())

    def weight(self, psi: Tensor) -> Tensor:
        return self.books(psi).gather(1, self.places(psi.device))

    def _add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        self.books(into).scatter_add_(1, self.places(into.device), gradient)

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        one = torch.tensor(factor, device=into.device, dtype=into.dtype)
        self.books(into).scatter_add_(1, self.places(into.device), one.expand(self.rows, self.cols))


class VectorMatrix(CodedMatrix):
    """Books of vectors of ``tile`` numbers, which all rows read, each with a scale of its own.

    A row's bytes are its packed codes, one for ``tile`` columns, and then its scale in bfloat16, the lower byte first.
    ``group`` is a multiple of ``tile``. The last tile of a row may be cut off.
    """

    def __init__(self, span: Span, bits: int, group: int, start: int, tile: int):
        super().__init__(span, bits, group, start)
        self.tile, self.tiles = tile, -(-span.cols // tile)
        self.size = self.groups * self.entries * tile
        self.code_bytes = packed_size(self.tiles, bits)
        self.row_bytes = self.code_bytes + SCALE_BYTES

    def books(self, psi: Tensor) -> Tensor:
        """All codebooks (groups * entries, tile), a view of psi or of its gradient."""
        return self.segment(psi).view(-1, self.tile)

    def scales(self, device: torch.device, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
        """(rows, 1), of all rows or of ``ids`` (k,)."""
        low, high = self.codes_of(device, ids)[:, self.code_bytes :].to(torch.int32).split(1, 1)
        # bfloat16 is the upper half of a float32. (Two bytes viewed as one number come out wrong under torch.compile)
        return ((low | high << 8) << 16).view(torch.float32).to(dtype)

    def places(self, device: torch.device, ids: Tensor | None = None) -> Tensor:
        """Of every tile, or those of rows ``ids`` (k,), its entry among all of the matrix: int64 (rows, tiles)."""
        codes = unpack(self.codes_of(device, ids)[:, : self.code_bytes], self.tiles, self.bits).to(torch.int64)
        if self.groups > 1:
            codes = codes + torch.arange(self.tiles, device=device) * self.tile // self.group * self.entries
        return codes

    def _made(self, psi: Tensor, ids: Tensor | None) -> Tensor:
        vectors = F.embedding(self.places(psi.device, ids), self.books(psi))  # (rows, tiles, tile)
        return vectors.flatten(1)[:, : self.cols] * self.scales(psi.device, psi.dtype, ids)

    def _add(self, into: Tensor, gradient: Tensor, ids: Tensor | None) -> None:
        scaled = gradient * self.scales(into.device, into.dtype, ids)
        scaled = F.pad(scaled, (0, self.tiles * self.tile - self.cols))
        self.books(into).index_add_(0, self.places(into.device, ids).flatten(), scaled.view(-1, self.tile))

    def weight(self, psi: Tensor) -> Tensor:
        return self._made(psi, None)

    def look_up(self, ids: Tensor, psi: Tensor) -> Tensor:
        return self._made(psi, ids.flatten()).view(*ids.shape, self.cols)

    def _add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        self._add(into, gradient, None)

    def add_look_up_adjoint(self, into: Tensor, ids: Tensor, gradient: Tensor) -> None:
        self._add(into, gradient.to(into.dtype), ids)

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        self._add_adjoint(into, (self.scales(into.device, into.dtype) * factor).expand(self.rows, self.cols))


def pack_vectors(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What a :class:`VectorMatrix` stores, of codes (rows, tiles) and scales (rows,): uint8 (rows, row_bytes)."""
    return torch.cat([pack(codes, bits), scales.to(torch.bfloat16)[:, None].view(torch.uint8)], 1)


class Codebook(Mapping):
    """Codebooks per row or per group of a row, learned from the weights; with ``tile``, of vectors, per matrix."""

    name = "codebook"
    help = "a few numbers per row, and for every weight which of them, learned from pretrained weights"
    options = ("bits", "group_size", "tile")
    is_learned = True

    def __init__(
        self,
        spans: Sequence[Span],
        ratio: float | None,
        key: int,
        base: int = 0,
        *,
        bits: int,
        group_size: int | None,
        tile: int = 1,
    ):
        self.n, self.base, self.bits, self.group_size, self.tile = spans[-1].stop, base, bits, group_size, tile
        self._starts, self.m = {}, 0
        for span in spans:
            self._starts[span.start] = base + self.m
            self.m += self._matrix(span, base + self.m).size

    def _matrix(self, span: Span, start: int) -> CodedMatrix:
        group = span.cols if self.group_size is None else min(self.group_size, span.cols)
        if self.tile == 1:
            return CodebookMatrix(span, self.bits, group, start)
        return VectorMatrix(span, self.bits, group, start, self.tile)

    def matrix(self, span: Span, scale: float, signs: np.ndarray) -> CodedMatrix:
        return self._matrix(span, self._starts[span.start])
