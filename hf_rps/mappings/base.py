"""What a mapping is: one weight matrix after the other becomes a linear function of the shared array psi.

    W_i = R_i psi          R_i: (rows * cols) x m, never stored as a matrix

Everything that the library does with a weight is linear algebra with R_i and its adjoint, and asks nothing of a
mapping but this file's two protocols: a :class:`Mapping` lays the matrices of one sharing group on a segment of psi,
and gives a :class:`SharedMatrix` for each. A new mapping is one class of each, and a row of
:data:`hf_rps.mappings.table.MAPPINGS`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping as MappingOf
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """One matrix to be shared: its name, its shape (out_features, in_features) and its standard deviation at init.

    ``positions`` is how many columns belong to one channel of the input, where that matters: kernel positions.
    """

    name: str
    out_features: int
    in_features: int
    std: float
    positions: int = 1

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    def __str__(self) -> str:
        """The form in which configs record a target."""
        if self.positions == 1:
            return f"{self.name} {self.out_features}x{self.in_features} std {self.std!r}"
        channels = self.in_features // self.positions
        return f"{self.name} {self.out_features}x{channels}*{self.positions} std {self.std!r}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Inverse of ``str(target)``.

        >>> Target.parse("layer.0.q 8x4 std 0.02")
        Target(name='layer.0.q', out_features=8, in_features=4, std=0.02, positions=1)
        """
        form = r"(.+) (\d+)x(\d+)(?:\*(\d+))? std (\S+)"
        match = re.fullmatch(form, text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"recorded module {text!r} is not of the form 'NAME ROWSxCOLS std STD'")
        positions = int(match[4] or 1)
        return cls(match[1], int(match[2]), int(match[3]) * positions, float(match[5]), positions)


@dataclass(frozen=True)
class Span:
    """Where one matrix (rows, cols) lies in the flat index range of its group: [start, start + rows * cols)."""

    start: int
    rows: int
    cols: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.cols


class SharedMatrix(ABC):
    """One weight matrix W (rows, cols), a linear function of the shared array psi (m,).

    :meth:`weight` is the definition. The other methods follow from it; a mapping overrides those that it can do faster
    or with less memory.
    """

    rows: int
    cols: int

    @property
    def multiplications(self) -> int:
        """Of one product with a vector, in the cheapest way."""
        return self.rows * self.cols

    @abstractmethod
    def weight(self, psi: Tensor) -> Tensor:
        """W (rows, cols) in psi's dtype, by operations that autograd, compilers and torch.func can follow."""

    def linear(self, x: Tensor, psi: Tensor) -> Tensor:
        """x (..., cols) W^T: (..., rows), by operations that autograd, compilers and torch.func can follow."""
        return F.linear(x, self.weight(psi).to(x.dtype))

    def make(self, psi: Tensor, base: Tensor | None = None) -> Tensor:
        """W (rows, cols), or ``base`` + W in base's dtype: a new contiguous tensor. psi must not require a gradient."""
        with torch.no_grad():
            weight = self.weight(psi)
            return weight if base is None else torch.add(base, weight.to(base.dtype)).contiguous()

    def add_adjoint(self, into: Tensor, gradient: Tensor) -> None:
        """``into`` (m,) += R^T ``gradient`` (rows, cols)."""
        with torch.enable_grad():
            psi = torch.zeros_like(into, requires_grad=True)
            (part,) = torch.autograd.grad(self.weight(psi), psi, gradient.to(into.dtype))
        into.add_(part)

    def look_up(self, ids: Tensor, psi: Tensor) -> Tensor:
        """W[ids], (..., cols) for int64 ``ids`` (...), by operations that autograd and compilers can follow.

        Raises:
            IndexError: An id is no row (on a GPU torch's assertion fails instead).
        """
        return F.embedding(ids, self.weight(psi))

    def add_look_up_adjoint(self, into: Tensor, ids: Tensor, gradient: Tensor) -> None:
        """``into`` (m,) += R^T of what ``gradient`` (k, cols) for W[ids], ``ids`` (k,), is for W."""
        whole = gradient.new_zeros(self.rows, self.cols)
        self.add_adjoint(into, whole.index_add_(0, ids, gradient))

    def add_load(self, into: Tensor, factor: float = 1.0) -> None:
        """``into`` (m,) += ``factor`` times this matrix's part of Gamma: for every slot, its column's sum of squares.

        It is R^T (R 1), which is just that where every weight reads one slot; other mappings override it.
        """
        ones = torch.ones_like(into)
        self.add_adjoint(into, self.make(ones) * factor)

    def load_pieces(self) -> list[tuple[int, int, float]] | None:
        """The same as (first slot, length, value) pieces, or None where it is not piecewise constant."""
        return None

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this object keeps: indices, scales and signs, on every device where they were used."""
        return []

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside psi, by name: of a learned map, what was learned.

        The layer registers each as a frozen parameter, and calls :meth:`keep_in`. On meta where there is none yet.
        """
        return {}

    def keep_in(self, home: MappingOf[str, Tensor], keys: dict[str, str]) -> None:  # noqa: B027, most store nothing
        """From now on find what is stored in ``home``, where the name ``n`` is called ``keys[n]``.

        Loaders and wrappers replace parameter objects, so it is looked up on every use.
        """


class Mapping(ABC):
    """How the weights of one sharing group lie on a segment of psi, [base, base + m).

    Args:
        spans: Where the group's matrices lie in its flat index range [0, n), end to end.
        ratio: Stored numbers over weights; None for a learned mapping, which has no such knob.
        key: Of the group's hashed streams.
        base: First slot of the segment.
    """

    name: ClassVar[str]
    help: ClassVar[str]  # half a sentence for users
    options: ClassVar[tuple[str, ...]] = ()  # fields of RPSConfig that it takes beside the ratio, as keywords
    is_learned: ClassVar[bool] = False  # from the weights: then it takes no ratio, and matrices have something stored
    shifts: tuple[int, ...] = ()  # what it drew, for the fingerprint

    n: int
    m: int
    base: int

    @abstractmethod
    def __init__(self, spans: Sequence[Span], ratio: float | None, key: int, base: int): ...

    @abstractmethod
    def matrix(self, span: Span, scale: float, signs: np.ndarray) -> SharedMatrix:
        """The matrix at ``span``, with its scale and its signs, int8 (rows, 1) or (rows, cols)."""


class DeviceCopies:
    """A constant tensor and its copies on the devices where it was asked for.

    Nothing is kept while a compiler traces: the copy is then part of the graph.
    """

    def __init__(self, tensor: Tensor):
        self._copies = {tensor.device: tensor}
        self._source = tensor

    def on(self, device: torch.device) -> Tensor:
        if device in self._copies:
            return self._copies[device]
        if torch.compiler.is_compiling():
            return self._source.to(device)
        with torch.inference_mode(False):  # an inference tensor would break training later
            self._copies[device] = self._source.to(device)
        return self._copies[device]

    def tensors(self) -> list[Tensor]:
        return list(self._copies.values())


class SignedScale:
    """Scale times sign of a matrix, in the shape of its signs: (rows,), (rows, 1) or, one per weight, (rows, cols).

    Of float32, or float64 where that is asked for: signs and scale must not be rounded to the compute dtype.
    """

    def __init__(self, scale: float, signs: np.ndarray):
        self.scale = scale
        with torch.inference_mode(False):
            self._copies = DeviceCopies(torch.from_numpy(signs).to(torch.float32) * scale)

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        factor = self._copies.on(device)
        return factor.sign().to(dtype) * self.scale if dtype == torch.float64 else factor

    def tensors(self) -> list[Tensor]:
        return self._copies.tensors()
