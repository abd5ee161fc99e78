"""Codebooks and codes for one weight matrix: weighted k-means, error feedback, and rounds of descent on the same error.

What is made small is the layer's error on its inputs, ``tr((W' - W) H (W' - W)^T)`` with ``H`` (cols, cols) the mean of
``x x^T``: that of W' on typical inputs. Without inputs H is the identity.

1. Codebooks by k-means on each row (or group of a row), every weight counted by the root of H's diagonal.
2. Codes column by column; what a column loses is taken out of the columns to come, as in GPTQ ('GPTQ: accurate
   post-training quantization for generative pre-trained transformers', ICLR 2023).
3. In turn, for a few rounds: the codebooks that are best for the codes (least squares), and for each column the code
   that is best while all others stay (coordinate descent). Neither can make the error larger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.005  # of the mean of H's diagonal, added to it: few inputs tell little of some directions
ROUNDS = 2
_ITERATIONS = 25  # of k-means
_BLOCK = 64  # columns whose effect on all later ones is added up in one product
_AT_ONCE = 1 << 25  # numbers of a temporary array


class Learned(NamedTuple):
    """Codebooks (rows, groups, entries), codes (rows, cols), uint8, and the W' (rows, cols) that they stand for."""

    books: Tensor
    codes: Tensor
    weight: Tensor


def damped(hessian: Tensor) -> Tensor:
    """H (cols, cols) with a part of its mean diagonal added to the diagonal; inputs that are never there get one."""
    mean = hessian.diagonal().mean()
    return hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (
        DAMPING * mean if mean > 0 else 1.0
    )


class RowCodebooks:
    """Codebooks of single numbers for the rows of one matrix, or for groups of columns in each.

    Args:
        weight: W (rows, cols), float32.
        entries: Of a codebook.
        group: Columns that share one; cols for whole rows.

    Attributes:
        books: (rows, groups, entries), each ascending.
        codes: int64 (rows, cols).
    """

    def __init__(self, weight: Tensor, entries: int, group: int, importance: Tensor):
        self.weight, self.entries, self.group = weight, entries, group
        self.rows, self.cols = weight.shape
        self.groups = -(-self.cols // group)
        self.books = weight.new_empty(self.rows, self.groups, entries)
        self.codes = weight.new_empty(self.rows, self.cols, dtype=torch.int64)
        self._offsets = torch.arange(self.cols, device=weight.device) // group * entries
        for i, columns in enumerate(self._columns()):
            self.books[:, i] = kmeans(weight[:, columns], importance[columns], entries)
            self.codes[:, columns] = self.nearest(weight[:, columns], i)

    def _columns(self) -> list[slice]:
        return [slice(start, min(self.cols, start + self.group)) for start in range(0, self.cols, self.group)]

    def nearest(self, weight: Tensor, group: int) -> Tensor:
        """Codes of the entries of one group's books that are nearest to ``weight`` (rows, any)."""
        book = self.books[:, group]
        return torch.searchsorted(((book[:, 1:] + book[:, :-1]) / 2).contiguous(), weight.contiguous())

    def made(self) -> Tensor:
        """W' (rows, cols)."""
        return self.books.flatten(1).gather(1, self._places())

    def _places(self) -> Tensor:
        """Of every weight, its entry among all those of its row."""
        return self.codes + self._offsets

    def sort(self) -> None:
        """Put the entries of all books in order, and the codes with them."""
        self.books, order = self.books.sort(-1)
        entry = torch.arange(self.entries, device=order.device).expand_as(order)
        self.codes = torch.empty_like(order).scatter_(-1, order, entry).flatten(1).gather(1, self._places())

    def feed_back(self, hessian: Tensor) -> None:
        """Choose the codes column by column, with feedback of each column's error to the later ones."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        left = self.weight.clone()
        for start in range(0, self.cols, _BLOCK):
            stop = min(self.cols, start + _BLOCK)
            block, factor = left[:, start:stop].t().contiguous(), upper[start:stop, start:stop]  # (columns, rows)
            errors = torch.empty_like(block)
            for i in range(stop - start):
                code, value = self._choose(block[i], start + i)
                self.codes[:, start + i] = code
                torch.sub(block[i], value, out=errors[i]).div_(factor[i, i])
                block[i:].addr_(factor[i, i:], errors[i], alpha=-1)
            if stop < self.cols:
                left[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)

    def _choose(self, column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Nearest codes (rows,) for one column, and their entries."""
        group = place // self.group
        code = self.nearest(column[:, None], group)
        return code[:, 0], self.books[:, group].gather(1, code)[:, 0]

    def descend(self, hessian: Tensor) -> int:
        """Choose for each column in turn the code that is best while the others stay; how many changed."""
        made, changed = self.made(), 0
        gradient = (made - self.weight) @ hessian  # (rows, cols), half that of the error
        for start in range(0, self.cols, _BLOCK):
            stop = min(self.cols, start + _BLOCK)
            block, now = gradient[:, start:stop].t().contiguous(), made[:, start:stop].t().contiguous()
            steps, inside = torch.empty_like(block), hessian[start:stop, start:stop]
            for i in range(stop - start):
                code, value = self._choose(now[i] - block[i] / inside[i, i], start + i)
                changed += int((code != self.codes[:, start + i]).sum())
                self.codes[:, start + i] = code
                torch.sub(value, now[i], out=steps[i])
                block.addr_(inside[i], steps[i])
            if stop < self.cols:  # what comes before is asked for in the next round only
                gradient[:, stop:].addmm_(steps.t(), hessian[start:stop, stop:])
        return changed

    def refit(self, hessian: Tensor) -> None:
        """Set the books to the best ones for the codes: least squares, row by row."""
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


def learn(
    weight: Tensor, bits: int, group_size: int | None = None, hessian: Tensor | None = None, rounds: int = ROUNDS
) -> Learned:
    """Codebooks and codes of one weight matrix, determined by the arguments.

    Args:
        weight: W (rows, cols).
        bits: Of a code; a codebook has 2**bits entries.
        group_size: Columns of a row that share a codebook; None: all.
        hessian: Mean of ``x x^T`` over inputs, (cols, cols); None: every direction counts the same.
        rounds: Of least squares and descent.
    """
    dtype, weight = weight.dtype, weight.detach().float()
    cols = weight.shape[1]
    group = min(group_size or cols, cols)
    if hessian is None:
        state = RowCodebooks(weight, 2**bits, group, weight.new_ones(cols))
    else:
        hessian = damped(hessian.float())
        state = RowCodebooks(weight, 2**bits, group, hessian.diagonal().sqrt())
        state.feed_back(hessian)
        for _ in range(rounds):
            state.refit(hessian)
            if state.descend(hessian) == 0:
                break
        state.refit(hessian)
    return Learned(state.books.to(dtype), state.codes.to(torch.uint8), state.made().to(dtype))
