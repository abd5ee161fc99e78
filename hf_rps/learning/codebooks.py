"""Codes for one weight matrix, whatever its codebooks are, and the codebooks of its rows.

Both work on the error of :mod:`hf_rps.learning.matrix`, where the steps are put together. What a column loses is taken
out of the columns to come as in GPTQ ('GPTQ: accurate post-training quantization for generative pre-trained
transformers', ICLR 2023).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hf_rps.mappings.codes import pack

_ITERATIONS = 25  # of k-means
_BLOCK = 64  # columns whose effect on all later ones is added up in one product
_AT_ONCE = 1 << 25  # numbers of a temporary array


class Codebooks(ABC):
    """Codebooks and codes of one matrix, on their way; a base class. At first there are books and no codes.

    Args:
        weight: W (rows, cols), float32.
        entries: Of a codebook.
        group: Columns that share one; cols for whole rows.
        tile: Columns that share a code; cols is a multiple of it.

    Attributes:
        codes: int64 (rows, cols / tile), chosen by :meth:`round` or :meth:`feed_back`.
    """

    books: Tensor

    def __init__(self, weight: Tensor, entries: int, group: int, tile: int = 1):
        self.weight, self.entries, self.group, self.tile = weight, entries, group, tile
        self.rows, self.cols = weight.shape
        self.groups = -(-self.cols // group)
        self.codes = weight.new_empty(self.rows, self.cols // tile, dtype=torch.int64)

    @abstractmethod
    def round(self) -> None:
        """Choose the codes of the entries that are nearest to the weights."""

    @abstractmethod
    def made(self) -> Tensor:
        """W' (rows, cols)."""

    @abstractmethod
    def packed(self, bits: int) -> Tensor:
        """What is stored of the rows, uint8 (rows, bytes)."""

    @abstractmethod
    def refit(self, hessian: Tensor) -> None:
        """Set the books to better ones for the codes."""

    @abstractmethod
    def choose(self, wanted: Tensor, place: int, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (rows,) of the entries nearest to ``wanted`` (tile, rows), the columns from ``place`` on, and what they
        stand for (tile, rows). A difference e (rows, tile) is as long as e ``metric`` (tile, tile)."""

    def _tiles(self, matrix: Tensor) -> Tensor:
        """The blocks (tiles, tile, tile) on the diagonal of a (cols, cols) matrix."""
        blocks = matrix.unflatten(0, (-1, self.tile)).unflatten(2, (-1, self.tile))
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def feed_back(self, hessian: Tensor) -> None:
        """Choose the codes tile by tile, with feedback of each one's error to the later columns.

        With U^T U the inverse of H, the error that is left when the later columns make up for e as well as they can is
        that of e's tile of U, inverted.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        metrics, left, tile = torch.linalg.inv(self._tiles(upper)), self.weight.clone(), self.tile
        for start, stop in self._blocks():
            block, factor = left[:, start:stop].t().contiguous(), upper[start:stop, start:stop]  # (columns, rows)
            errors = torch.empty_like(block)
            for i in range(0, stop - start, tile):
                number, end = (start + i) // tile, i + tile
                self.codes[:, number], value = self.choose(block[i:end], start + i, metrics[number])
                torch.mm(metrics[number].t(), block[i:end] - value, out=errors[i:end])
                block[end:].addmm_(factor[i:end, end:].t(), errors[i:end], alpha=-1)
            if stop < self.cols:
                left[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)

    def _blocks(self) -> list[tuple[int, int]]:
        size = max(1, _BLOCK // self.tile) * self.tile
        return [(start, min(self.cols, start + size)) for start in range(0, self.cols, size)]

    def descend(self, hessian: Tensor) -> int:
        """Choose for each tile in turn the code that is best while the others stay; how many changed."""
        made, before, tile = self.made(), self.codes.clone(), self.tile
        gradient = (made - self.weight) @ hessian  # (rows, cols), half that of the error
        diagonal = self._tiles(hessian)
        metrics, inverses = torch.linalg.cholesky(diagonal), torch.linalg.inv(diagonal)
        for start, stop in self._blocks():
            block, now = gradient[:, start:stop].t().contiguous(), made[:, start:stop].t().contiguous()
            steps, inside = torch.empty_like(block), hessian[start:stop, start:stop]
            for i in range(0, stop - start, tile):
                number, end = (start + i) // tile, i + tile
                wanted = now[i:end] - inverses[number] @ block[i:end]
                code, value = self.choose(wanted, start + i, metrics[number])
                self.codes[:, number] = code
                torch.sub(value, now[i:end], out=steps[i:end])
                block.addmm_(inside[:, i:end], steps[i:end])
            if stop < self.cols:  # what comes before is asked for in the next round only
                gradient[:, stop:].addmm_(steps.t(), hessian[start:stop, stop:])
        return int((self.codes != before).sum())


class RowCodebooks(Codebooks):
    """Codebooks of single numbers for the rows of one matrix, or for groups of columns in each.

    Attributes:
        books: (rows, groups, entries), each ascending.
    """

    def __init__(self, weight: Tensor, entries: int, group: int, importance: Tensor):
        super().__init__(weight, entries, group)
        self.books = weight.new_empty(self.rows, self.groups, entries)
        self._middles = weight.new_empty(self.groups, self.rows, entries - 1)  # between the entries, looked up often
        self._offsets = torch.arange(self.cols, device=weight.device) // group * entries
        for i, columns in enumerate(self._columns()):
            self.books[:, i] = kmeans(weight[:, columns], importance[columns], entries)
            self._middles[i] = (self.books[:, i, 1:] + self.books[:, i, :-1]) / 2

    def _columns(self) -> list[slice]:
        """Those of each group."""
        return [slice(start, min(self.cols, start + self.group)) for start in range(0, self.cols, self.group)]

    def round(self) -> None:
        for i, columns in enumerate(self._columns()):
            self.codes[:, columns] = self.nearest(self.weight[:, columns], i)

    def nearest(self, weight: Tensor, group: int) -> Tensor:
        """Codes of the entries of one group's books that are nearest to ``weight`` (rows, any)."""
        return torch.searchsorted(self._middles[group], weight.contiguous())

    def made(self) -> Tensor:
        return self.books.flatten(1).gather(1, self._places())

    def packed(self, bits: int) -> Tensor:
        return pack(self.codes.to(torch.uint8), bits)

    def _places(self) -> Tensor:
        """Of every weight, its entry among all those of its row."""
        return self.codes + self._offsets

    def sort(self) -> None:
        """Put the entries of all books in order, and the codes with them."""
        self.books, order = self.books.sort(-1)
        self._middles = ((self.books[..., 1:] + self.books[..., :-1]) / 2).transpose(0, 1).contiguous()
        entry = torch.arange(self.entries, device=order.device).expand_as(order)
        self.codes = torch.empty_like(order).scatter_(-1, order, entry).flatten(1).gather(1, self._places())

    def choose(self, wanted: Tensor, place: int, metric: Tensor) -> tuple[Tensor, Tensor]:
        group = place // self.group
        code = self.nearest(wanted.t(), group)  # one number each: the nearest in any metric
        return code[:, 0], self.books[:, group].gather(1, code).t()

    def refit(self, hessian: Tensor) -> None:
        """Least squares, row by row: the best books."""
        places, size = self._places(), self.groups * self.entries
        right = self.weight.new_zeros(self.rows, size).scatter_add_(1, places, self.weight @ hessian)
        books = self.books.flatten(1).clone()
        little = 1e-6 * hessian.diagonal().mean()  # how strongly a book is held where it is
        step = max(1, _AT_ONCE // (self.cols * size))
        for start in range(0, self.rows, step):
            rows = slice(start, min(self.rows, start + step))
            chosen = self.weight.new_zeros(rows.stop - start, self.cols, size)
            chosen.scatter_(2, places[rows, :, None], 1.0)  # (rows, cols, entries)
            normal = torch.bmm(chosen.transpose(1, 2), torch.matmul(hessian, chosen))
            unused = chosen.sum(1) == 0
            normal.diagonal(dim1=1, dim2=2).add_(unused + little)
            target = torch.where(unused, books[rows], right[rows] + little * books[rows])
            books[rows] = torch.linalg.solve(normal, target)
        self.books = books.view(self.rows, self.groups, self.entries)
        self.sort()


def kmeans(weight: Tensor, importance: Tensor, entries: int) -> Tensor:
    """Per row of ``weight`` (rows, cols), by Lloyd's algorithm from quantiles: ``entries`` ascending centres.

    ``importance`` (cols,) is how much a column counts. Rows are sorted once; a cluster is then a range, and its mean a
    difference of running sums.
    """
    rows, cols = weight.shape
    values, order = weight.sort(1)
    counted = importance.to(torch.float64)[order]
    mass = counted.new_zeros(rows, cols + 1)
    moment = torch.zeros_like(mass)
    torch.cumsum(counted, 1, out=mass[:, 1:])
    torch.cumsum(counted * values, 1, out=moment[:, 1:])
    levels = (torch.arange(entries, dtype=torch.float64, device=weight.device) + 0.5) / entries
    start = torch.searchsorted(mass[:, 1:].contiguous(), (levels * mass[:, -1:]).contiguous()).clamp_(max=cols - 1)
    centres = values.to(torch.float64).gather(1, start)
    ends = order.new_zeros(rows, entries + 1)
    ends[:, -1] = cols
    values = values.to(torch.float64).contiguous()
    for _ in range(_ITERATIONS):
        ends[:, 1:-1] = torch.searchsorted(values, ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
        there = mass.gather(1, ends).diff(dim=1)
        mean = moment.gather(1, ends).diff(dim=1) / there.clamp_min(torch.finfo(torch.float64).tiny)
        centres = torch.where(there > 0, mean, centres).sort(1).values
    # a row that has no more numbers than that is met exactly, as that of a model that was compressed before
    rank = torch.nn.functional.pad((values.diff(dim=1) != 0).cumsum(1), (1, 0))
    few = rank[:, -1:] < entries
    exact = values[:, -1:].repeat(1, entries).scatter(1, rank.clamp(max=entries - 1), values)
    return torch.where(few, exact, centres).to(weight.dtype)
