"""Codebooks of vectors for one weight matrix, which all of its rows read, each with a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rps.learning.codebooks import Codebooks
from hf_rps.mappings.codebook import pack_vectors

_ITERATIONS = 25  # of k-means
_VECTORS = 1 << 15  # that it looks at
_STEPS = 15  # of conjugate gradients
_AT_ONCE = 1 << 24  # numbers of a temporary array


class VectorCodebooks(Codebooks):
    """See :class:`hf_rps.learning.codebooks.Codebooks`. Columns are filled up with zeros to whole tiles.

    Args:
        importance: How much a column counts, (cols,).

    Attributes:
        books: (groups, entries, tile).
        scales: (rows, 1), float32 numbers that bfloat16 holds. At first rows' root mean squares, as columns count, over
            a power of two that brings them near to one: an optimizer's step on the books is then one on weights.
    """

    def __init__(self, weight: Tensor, entries: int, group: int, importance: Tensor, tile: int):
        size = (importance * weight.square()).sum(1, keepdim=True) / importance.sum()
        cols, more = weight.shape[1], -weight.shape[1] % tile
        super().__init__(F.pad(weight, (0, more)), entries, group if group < cols else cols + more, tile)
        unit = torch.exp2(size[size > 0].sqrt().mean().log2().round()) if bool((size > 0).any()) else 1.0
        self.scales = _rounded(torch.where(size > 0, size.sqrt() / unit, 1.0))
        self._counted = F.pad(importance, (0, more)).unflatten(0, (-1, tile))
        self._of_tile = torch.arange(self.codes.shape[1], device=weight.device) * tile // self.group
        vectors, groups = self._vectors(), [self._of_tile == i for i in range(self.groups)]
        self.books = torch.stack([kmeans(vectors[:, mine], self._counted[mine], entries) for mine in groups])

    def _vectors(self) -> Tensor:
        """The weights (rows, tiles, tile) in units of their rows' scales."""
        return (self.weight / self.scales).unflatten(1, (-1, self.tile))

    def round(self) -> None:
        vectors = self._vectors()
        for i, book in enumerate(self.books):
            mine = self._of_tile == i
            self.codes[:, mine] = nearest(vectors[:, mine], self._counted[mine], book)

    def padded(self, hessian: Tensor) -> Tensor:
        """H of the columns with those that fill them up, which hardly count."""
        more = self.cols - len(hessian)
        little = hessian.diagonal().mean() * 1e-3
        return torch.block_diag(hessian, little * torch.eye(more, device=hessian.device)) if more else hessian

    def packed(self, bits: int) -> Tensor:
        return pack_vectors(self.codes.to(torch.uint8), self.scales[:, 0], bits)

    def made(self) -> Tensor:
        return self._made(self.books)

    def _places(self) -> Tensor:
        """Of every tile, its entry among all those of the matrix."""
        return self.codes + self._of_tile * self.entries

    def _made(self, books: Tensor) -> Tensor:
        return F.embedding(self._places(), books.flatten(0, 1)).flatten(1) * self.scales

    def _adjoint(self, gradient: Tensor) -> Tensor:
        """Of :meth:`_made`, in the shape of the books."""
        books = self.books.new_zeros(self.groups * self.entries, self.tile)
        scaled = (gradient * self.scales).reshape(-1, self.tile)
        return books.index_add_(0, self._places().flatten(), scaled).view_as(self.books)

    def choose(self, wanted: Tensor, place: int, metric: Tensor) -> tuple[Tensor, Tensor]:
        book = self.books[place // self.group]
        there, entries = (wanted.t() / self.scales) @ metric, book @ metric
        code = torch.addmm(entries.square().sum(1), there, entries.t(), alpha=-2).argmin(1)
        return code, book[code].t() * self.scales.t()

    def refit(self, hessian: Tensor) -> None:
        """The best scales for the books, and then, by conjugate gradients from those there are, the books for both."""
        plain = self.made() / self.scales
        seen = plain @ hessian
        mass = (seen * plain).sum(1, keepdim=True)
        best = (seen * self.weight).sum(1, keepdim=True) / mass
        scales = _rounded(best)
        self.scales = torch.where((mass > 0) & torch.isfinite(scales) & (scales != 0), scales, self.scales)
        load = self._adjoint(self.scales.expand(self.rows, self.cols))  # of how many weights an entry stands for
        little = 1e-6 * hessian.diagonal().mean()  # how strongly a book is held where it is
        share = 1 / (load * hessian.diagonal().mean() + load.eq(0) + little)

        def normal(step: Tensor) -> Tensor:
            return self._adjoint(self._made(step) @ hessian) + little * step

        books = self.books.clone()
        rest = self._adjoint((self.weight - self._made(books)) @ hessian)
        towards = share * rest
        step, left = towards.clone(), (rest * towards).sum()
        for _ in range(_STEPS):
            if not left > 0:
                break
            image = normal(step)
            length = left / (step * image).sum()
            books += length * step
            rest -= length * image
            towards = share * rest
            left, before = (rest * towards).sum(), left
            step = towards + left / before * step
        self.books = books


def _rounded(scales: Tensor) -> Tensor:
    """As they are stored."""
    return scales.to(torch.bfloat16).to(torch.float32)


def nearest(vectors: Tensor, counted: Tensor, book: Tensor) -> Tensor:
    """Codes (rows, tiles) of the entries of ``book`` (entries, tile) nearest to ``vectors`` (rows, tiles, tile), whose
    columns count as ``counted`` (tiles, tile)."""
    codes = torch.empty(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
    constant = counted @ book.square().t()  # (tiles, entries)
    step = max(1, _AT_ONCE // (vectors.shape[0] * len(book)))
    for start in range(0, vectors.shape[1], step):
        part = slice(start, start + step)
        distance = constant[part] - 2 * (vectors[:, part] * counted[part]) @ book.t()
        codes[:, part] = distance.argmin(-1)
    return codes


def kmeans(vectors: Tensor, counted: Tensor, entries: int) -> Tensor:
    """By Lloyd's algorithm ``entries`` centres (entries, tile) of the ``vectors`` (rows, tiles, tile), or of some.

    ``counted`` (tiles, tile) is how much a column counts.
    """
    rows, tiles = vectors.shape[:2]
    random = torch.Generator().manual_seed(0)
    taken = torch.randperm(rows * tiles, generator=random)[:_VECTORS].to(vectors.device)
    flat, weights = vectors.flatten(0, 1)[taken], counted[taken % tiles]
    centres = flat[torch.arange(entries, device=flat.device) % len(flat)].clone()
    for _ in range(_ITERATIONS):
        code = nearest(flat[None], weights, centres)[0]
        moment = torch.zeros_like(centres).index_add_(0, code, flat * weights)
        mass = torch.zeros_like(centres).index_add_(0, code, weights)
        centres = torch.where(mass > 0, moment / mass, centres)
    return centres
