"""A part of the compressed layers can't be frozen while the rest is trained: who tries it is told.

All layers read one array. A slot of it belongs to frozen and trained weights alike, and weight decay moves slots that
have no gradient, too.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_rps import internals
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import Candidate
from hf_rps.layers.stand_in import FREEZE_REMEDY
from hf_rps.psi.bank import Bank

logger = logging.getLogger(__name__)


def register() -> None:
    """Let ``requires_grad_`` of a part with no parameter but shared weights (a Llama's MLP) ask its layers, once per
    process: torch walks over parameters, finds none (or only codes), and says nothing."""
    internals.wrap_method(nn.Module, "requires_grad_", _asking_layers)


def _asking_layers(original):
    def requires_grad_(self, requires_grad: bool = True):
        if not any(parameter.is_floating_point() for parameter in self.parameters()):
            for layer in self.modules():
                if isinstance(layer, RPSLayer) and layer.bank.psi.requires_grad != requires_grad:
                    RPSLayer.requires_grad_(layer, requires_grad)  # raises
        return original(self, requires_grad)

    return requires_grad_


def check_frozen(candidates: Sequence[Candidate]) -> None:
    """Raise a ValueError where some of the weights that are to share an array are frozen and some are not."""
    frozen = [c.full_name for c in candidates if not c.stored.requires_grad]
    if 0 < len(frozen) < len(candidates):
        raise ValueError(
            f"{frozen[0]!r} is frozen ({len(frozen)} of the {len(candidates)} targets are), and others are trained; "
            f"they would all read one shared array. {FREEZE_REMEDY}, or train all (model.requires_grad_(True))"
        )


def watch_freezing(model: nn.Module, bank: Bank) -> None:
    """Notice in the training passes of ``model`` that a part of the layers of ``bank`` was frozen after compressing."""
    watch = bank.array.passes.before = FrozenParts(model)
    for layer, witnesses in watch.witnesses(model):
        layer.watched = _any_trained(witnesses)


class _Watched(NamedTuple):
    """A layer and its witnesses, by module and name: loaders and FSDP replace parameter objects."""

    layer: weakref.ref
    witnesses: list[tuple[weakref.ref, str]]


class FrozenParts:
    """Looks, when a pass with gradients opens, for layers that were frozen by their neighbours.

    A layer has no parameter of its own but perhaps a bias, so ``block.requires_grad_(False)`` does not reach it. The
    witnesses are the parameters of the smallest module around the layer (itself included) that has any beside psi. If
    all of them were frozen since the layer was put in place, for some layers and not for others, the weights of these
    were meant to be frozen, too. Where they are frozen for all layers, as all norms or all biases may be, just these
    parameters are taken to be meant; a warning says so once, if anything but psi is trained.

    It refers weakly to the model, which it must not keep alive, and finds it anew in a copy: the module that opens the
    pass.
    """

    def __init__(self, model: nn.Module | None = None):
        self._root = None if model is None else weakref.ref(model)
        self._layers: list[_Watched] | None = None
        self._accepted: list[int] = []  # positions of the frozen layers that were judged already

    def __getstate__(self):
        return {"_root": None, "_layers": None, "_accepted": []}

    def __call__(self, module: nn.Module) -> None:
        """Raise a RuntimeError where a part of the layers was frozen; ``module`` opens a pass."""
        if not torch.is_grad_enabled():
            return
        if self._layers is None or any(watched.layer() is None for watched in self._layers):
            self._find(module)
        first = self._layers[0].layer() if self._layers else None
        if first is None or not first.bank.psi.requires_grad:
            return
        frozen = [i for i, watched in enumerate(self._layers) if not _has_trained(watched.witnesses)]
        if frozen != self._accepted:
            self._judge(module)
            self._accepted = frozen

    def _find(self, module: nn.Module) -> None:
        if self._root is None or self._root() is None:
            self._root = weakref.ref(module)
        self._layers = [
            _Watched(weakref.ref(layer), [(weakref.ref(owner), name) for owner, name in witnesses])
            for layer, witnesses in self.witnesses(self._root())
        ]

    def witnesses(self, root: nn.Module) -> list[tuple[RPSLayer, list[tuple[nn.Module, str]]]]:
        """The layers in ``root`` that this object watches, with the witnesses of each; none without a witness."""
        modules, parameters, found = dict(root.named_modules(remove_duplicate=False)), {}, {}
        for name, layer in modules.items():
            if not isinstance(layer, RPSLayer) or layer.bank.array.passes.before is not self or layer in found:
                continue
            for around in _upwards(name):
                if around not in parameters:
                    parameters[around] = _parameters(modules[around])
                if parameters[around]:
                    found[layer] = parameters[around]
                    break
        return list(found.items())

    def _judge(self, module: nn.Module) -> None:
        """The same from the model as it is now: witnesses may have moved since they were found."""
        self._find(module)
        root = self._root()
        layers = self.witnesses(root)
        frozen = [layer for layer, around in layers if not _any_trained(around)]
        for layer, _ in layers:
            layer.stays_trained = layer.stays_trained and layer in frozen
        meant = [layer for layer in frozen if layer.watched and not layer.stays_trained]
        if meant and len(frozen) == len(layers) and _any_trained(_parameters(root)):
            logger.warning(
                "the parameters around all compressed layers (norms, biases) were frozen after compressing, and the "
                "shared array is trained. If the layers were meant to be frozen, freeze it, too: "
                "layer.bank.psi.requires_grad_(False)"
            )
        elif meant and len(frozen) < len(layers):
            raise RuntimeError(
                f"the parameters of {_frozen_block(root, meant[0])!r} were frozen after compressing ({len(meant)} of "
                f"{len(layers)} compressed layers are in such modules), but the weights of its compressed layers are "
                f"slices of the shared array, which is trained, so they would go on changing. {FREEZE_REMEDY}. If only "
                f"these parameters are meant to be frozen and not the shared weights, say so with "
                f"layer.requires_grad_(True) for the compressed layers in it, and freeze the parameters after that"
            )


def _is_trained(parameter: Tensor) -> bool:
    """False for a frozen parameter. What functional_call puts in its place is none, and tells nothing."""
    return parameter.requires_grad or not isinstance(parameter, nn.Parameter)


def _any_trained(witnesses: list[tuple[nn.Module, str]]) -> bool:
    return any(_is_trained(owner._parameters[name]) for owner, name in witnesses)


def _has_trained(witnesses: list[tuple[weakref.ref, str]]) -> bool:
    """True where one of the witnesses is trained, of those that are still where they were found."""
    for owner, name in witnesses:
        module = owner()
        parameter = None if module is None else module._parameters.get(name)
        if parameter is not None and _is_trained(parameter):
            return True
    return False


def _upwards(name: str) -> list[str]:
    """The names of a module and of all those around it, the smallest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)] if name else [""]


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters in ``module`` that could be trained, but psi, by owner and name."""
    return [
        (owner, name)
        for owner in module.modules()
        if not isinstance(owner, Bank)
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]


def _frozen_block(root: nn.Module, layer: RPSLayer) -> str:
    """Name of the largest module around ``layer`` whose parameters are all frozen but psi."""
    block = name = next(name for name, module in root.named_modules() if module is layer)
    for around in _upwards(name):
        if _any_trained(_parameters(root.get_submodule(around))):
            break
        block = around
    return block
