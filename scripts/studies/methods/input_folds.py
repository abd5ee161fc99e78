"""Other ways to fold an input than the library's, for the comparison that chose it.

Each is a subclass of the library's own fold with other coefficients ``fold_j(x)[b] = sum_t a[j, t, b] x[t K / c + b]``,
so that sharing, initialisation, gradient scaling and training are the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hf_rps.hashing import hash_signs, stream_key
from hf_rps.mappings import weight_map
from hf_rps.mappings.input_fold import FoldedMatrix, InputFold, folded_size
from hf_rps.mappings.weight_map import WeightMap


class Form(InputFold):
    """A fold with any coefficients (J, c, width), and perhaps another order of the channels.

    Args:
        channels, positions, fold, key: As of the library's.
        blocks: J, as a multiple of c; 0 for a single one.
    """

    order: Tensor | None = None

    def __init__(self, channels: int, positions: int, fold: int, key: int, blocks: float = 1.0):
        super().__init__(channels, positions, fold, key)
        self.blocks = max(1, round(blocks * self.c))
        self.drawn = np.ascontiguousarray(self.draw(key)[: self.blocks])

    def draw(self, key: int) -> np.ndarray:
        """The coefficients of at least all blocks, float64."""
        sets = [self.mixed(hash_signs(key + i, self.c * self.width)) for i in range(-(-self.blocks // self.c))]
        return np.concatenate(sets)

    def mixed(self, signs: np.ndarray) -> np.ndarray:
        """Orthogonal mixing of tiles with ``signs``: (c, c, width)."""
        return self.mix[:, :, None] * signs.reshape(self.c, self.width)

    @property
    def coefficients(self) -> np.ndarray:
        return self.drawn

    def _coefficients(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self.drawn).to(like.device, like.dtype)

    def _tiles(self, x: Tensor) -> Tensor:
        """x (..., channels * positions) as (..., c, width, positions)."""
        x = x.unflatten(-1, (self.channels, self.positions))
        x = x if self.order is None else x[..., self.order, :]
        missing = self.c * self.width - self.channels
        x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        return x.unflatten(-2, (self.c, self.width))

    def fold(self, x: Tensor) -> Tensor:
        return torch.einsum("...tbp,jtb->...jbp", self._tiles(x), self._coefficients(x)).flatten(-2)

    def fold_unfollowed(self, x: Tensor) -> Tensor:
        return self.fold(x)

    def unfold(self, folded: Tensor) -> Tensor:
        folded = folded.unflatten(-1, (self.width, self.positions))
        x = torch.einsum("...jbp,jtb->...tbp", folded, self._coefficients(folded))
        return self.in_order(x.flatten(-3)[..., : self.channels * self.positions])

    def in_order(self, columns: Tensor) -> Tensor:
        """Columns as :meth:`_tiles` takes them, back in the input's order."""
        if self.order is None:
            return columns
        channels = columns.unflatten(-1, (self.channels, self.positions))
        return channels[..., torch.argsort(self.order), :].flatten(-2)

    def fold_channels(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[:, self.order]
        missing = self.c * self.width - self.channels
        x = torch.cat([x, x.new_zeros(x.size(0), missing, *x.shape[2:])], 1) if missing else x
        tiles = x.unflatten(1, (self.c, self.width))
        return torch.einsum("ntb...,jtb->njb...", tiles, self._coefficients(x)).flatten(1, 2)


class IndependentSigns(Form):
    """A sign of its own for every channel and block."""

    def draw(self, key: int) -> np.ndarray:
        return hash_signs(key, self.blocks * self.c * self.width).reshape(self.blocks, self.c, self.width) * 1.0


class Unsigned(Form):
    """Orthogonal mixing without signs: the same fold for all layers of a width."""

    def draw(self, key: int) -> np.ndarray:
        return np.tile(self.mixed(np.ones(self.c * self.width)), (-(-self.blocks // self.c), 1, 1))


class Permuted(Form):
    """Orthogonal mixing of channels in a hashed order."""

    def draw(self, key: int) -> np.ndarray:
        self.order = torch.randperm(self.channels, generator=torch.Generator().manual_seed(key % 2**63))
        return super().draw(key)


class RandomRotation(Form):
    """A random orthogonal matrix in the place of Hadamard's or the DCT's, with signs."""

    def mixed(self, signs: np.ndarray) -> np.ndarray:
        normal = np.random.default_rng(int((signs > 0).sum()) + self.width).standard_normal((self.c, self.c))
        return (np.linalg.qr(normal)[0] * math.sqrt(self.c))[:, :, None] * signs.reshape(self.c, self.width)


class FormMatrix(FoldedMatrix):
    """The library's, but for the order of the channels."""

    def unfolded(self, narrow: Tensor) -> Tensor:
        fold = self.input_fold
        filled = FoldedMatrix.unfolded(self, narrow)
        return fold.in_order(filled) if isinstance(fold, Form) else filled


class Choice(NamedTuple):
    """A form that is compared.

    Attributes:
        title: For tables.
        blocks: J as a multiple of c; 0 for a single one.
        own: Whether every layer has a fold of its own, or those of one module share theirs.
    """

    title: str
    kind: type[Form] = Form
    blocks: float = 1.0
    own: bool = False


FORMS = {
    "orthogonal": Choice("orthogonal mixing, signs"),
    "own": Choice("the same, every layer its own", own=True),
    "unsigned": Choice("orthogonal mixing, no signs", Unsigned),
    "permuted": Choice("orthogonal mixing, signs, permutation", Permuted),
    "rotation": Choice("a random rotation, signs", RandomRotation),
    "signs": Choice("independent signs", IndependentSigns),
    "half": Choice("orthogonal mixing, J = c/2", blocks=0.5),
    "double": Choice("orthogonal mixing, J = 2c", blocks=2.0),
    "one": Choice("J = 1 (SS1 as released)", blocks=0.0),
}


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """Maps that are made inside fold inputs in the form ``name`` of :data:`FORMS`."""
    choice = FORMS[name]

    def fold_of(self: WeightMap, target_name: str) -> InputFold | None:
        target = self.target(target_name)
        channels = target.in_features // target.positions
        if folded_size(channels, self.input_fold)[0] == 1:
            return None
        key = stream_key(self.seed, "form", name, target_name if choice.own else target_name.rpartition(".")[0])
        return choice.kind(channels, target.positions, self.input_fold, key, choice.blocks)

    with (
        mock.patch.object(WeightMap, "fold_of", fold_of),
        mock.patch.object(weight_map, "FoldedMatrix", FormMatrix),
    ):
        yield
