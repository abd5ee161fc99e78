"""The table of layer kinds: which layers have a weight that can be shared, how it becomes a matrix, what stands in.

A new kind of layer is one class and one row of :data:`KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from hf_rps.layers.base import RPSLayer
from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.embedding import RPSEmbedding
from hf_rps.layers.linear import RPSLinear, RPSTransposedLinear
from hf_rps.psi.bank import Bank


class LayerKind(ABC):
    """One kind of layer; a base class.

    Attributes:
        noun: What users call such layers, in the plural.
        layer: The class that stands in for it.
        parameters: Names of the parameters that are shared. In a map a parameter called "weight" goes by the name of
            its module, any other by its own full name.
        adapters: Whether PEFT adapters can take such layers.
        multiplies: Whether the layer multiplies the last dimension of its input with the matrix, and nothing else.
        fallback: Chosen by default only in models that have no layer of the other kinds.
        field: Of the config, that must be True for such layers to be chosen by default.
        ties: Whether such a layer can hold its parameter together with others that do, as the same matrix.
    """

    noun: ClassVar[str]
    layer: ClassVar[type[RPSLayer]]
    parameters: ClassVar[tuple[str, ...]] = ("weight",)
    adapters: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    fallback: ClassVar[bool] = False
    field: ClassVar[str | None] = None
    ties: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """True where ``module`` is of this kind by its class or its form, in whatever state its parameter is."""

    def can_share(self, module: nn.Module) -> bool:
        """True where a module that matches computes just what the stand-in will, from its parameters alone."""
        return True

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as a matrix (out_features, in_features)."""
        return weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`matrix`, for the kinds that adapters take."""
        return matrix

    def positions(self, module: nn.Module) -> int:
        """How many columns of the matrix belong to one channel of the input: kernel positions."""
        return 1

    def stand_in(self, bank: Bank, module: nn.Module, names: dict[str, str]) -> RPSLayer:
        """The layer that takes the place of ``module``; ``names`` are its targets in the bank's map, by parameter.

        Of a kind with several parameters some may stay dense.
        """
        ((parameter, name),) = names.items()
        return self.layer(name, bank, module, parameter)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features), also of a layer whose weight is packed or freed; for kinds of adapters."""
        return module.out_features, module.in_features

    def blank(self, rows: int, cols: int) -> nn.Module:
        """A plain layer of this kind and shape on the meta device; for kinds of adapters."""
        return nn.Linear(cols, rows, device="meta")


class TransposedLinear(LayerKind):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as (in_features, out_features)."""

    noun, layer, adapters, multiplies = "linear layers", RPSTransposedLinear, True, True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Conv1D)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.nf, module.nx

    def blank(self, rows: int, cols: int) -> nn.Module:
        with torch.device("meta"):
            return Conv1D(rows, cols)


class Convolution(LayerKind):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d and subclasses that compute the same from weight and bias alone.

    The matrix has a row per output channel and all else as columns.
    """

    noun, layer, fallback = "convolutions", RPSConv, True
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def matches(self, module: nn.Module) -> bool:
        kind = next((kind for kind in self.classes if isinstance(module, kind)), None)
        if kind is None or set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
            return False
        return type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward

    def can_share(self, module: nn.Module) -> bool:
        return module.weight is not None and not is_lazy(module.weight)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def positions(self, module: nn.Module) -> int:
        return math.prod(module.kernel_size)


class Embedding(LayerKind):
    """nn.Embedding, and subclasses with the same forward. A row of the matrix is the vector of an id."""

    noun, layer, field, ties = "embeddings", RPSEmbedding, "share_embeddings", True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward

    def can_share(self, module: nn.Module) -> bool:
        # these would write to the weight, scale its gradient by what a batch holds, or want it sparse
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


class Linear(LayerKind):
    """nn.Linear, and layers of any class that compute ``F.linear(x, weight, bias)``."""

    noun, layer, adapters, multiplies, ties = "linear layers", RPSLinear, True, True, True

    def matches(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return True
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if "weight" not in module._parameters or None in shape:
            return False
        return module.weight is None or shape == tuple(module.weight.shape)  # an adapter may have freed it

    def can_share(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or set(module._parameters) - {"weight", "bias"} or module._modules:
            return False
        return type(module).forward is nn.Linear.forward or _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Module) -> bool:
    """Probe a layer with a forward of its own: does it compute the linear map of its weight and bias?"""
    weight = module.weight
    if not weight.is_floating_point() or weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(3, -1)
    try:
        y, expected = module(x), F.linear(x, weight, module.bias)
        return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)
    except Exception:  # whatever else it computes, it is not a linear layer of one input
        return False


KINDS: list[LayerKind] = [TransposedLinear(), Convolution(), Embedding(), Linear()]


def register(kind: LayerKind) -> LayerKind:
    """Put a kind of layer before those there are: it is asked first."""
    KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of ``module``, whether or not its weight can be shared in its present state."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def shareable_kind(module: nn.Module) -> LayerKind | None:
    """The kind of ``module`` if its weight can be shared, else None."""
    kind = kind_of(module)
    return kind if kind is not None and kind.can_share(module) else None


def candidates_of(name: str, module: nn.Module) -> list[Candidate]:
    """The weights of ``module``, called ``name``, that can be shared: none if its kind is not known."""
    kind = shareable_kind(module)
    return [] if kind is None else [Candidate(name, module, kind, parameter) for parameter in kind.parameters]


def candidate_at(modules: dict[str, nn.Module], name: str) -> Candidate | None:
    """The weight that is called ``name`` (see :attr:`Candidate.full_name`) among ``modules``, whatever its state.

    None: there is no such module. The kind is None where the module is of no kind that is known.
    """
    if name in modules:
        return Candidate(name, modules[name], kind_of(modules[name]))
    owner, _, parameter = name.rpartition(".")
    kind = kind_of(modules[owner]) if owner in modules else None
    return Candidate(owner, modules[owner], kind, parameter) if kind and parameter in kind.parameters else None


def nouns(adapters: bool) -> list[str]:
    """What users call the layers that can be shared, natively or by adapters."""
    return list(dict.fromkeys(kind.noun for kind in KINDS if kind.adapters or not adapters))


@dataclass(frozen=True)
class Candidate:
    """A weight that can be shared: the full name of its module, the module, its kind, and the parameter's name."""

    name: str
    module: nn.Module
    kind: LayerKind | None
    parameter: str = "weight"

    @property
    def positions(self) -> int:
        """See :meth:`LayerKind.positions`."""
        return self.kind.positions(self.module)

    @property
    def full_name(self) -> str:
        """What the weight is called among those of all modules."""
        return self.name if self.parameter == "weight" else f"{self.name}.{self.parameter}"

    @property
    def key(self) -> str:
        """The parameter's name."""
        return f"{self.name}.{self.parameter}"

    @property
    def stored(self) -> Tensor | None:
        """The parameter as the module stores it; None where it was freed."""
        return getattr(self.module, self.parameter)

    @property
    def weight(self) -> Tensor:
        """The weight as (out_features, in_features)."""
        return self.kind.matrix(self.stored)
