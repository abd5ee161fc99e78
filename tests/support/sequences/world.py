"""A model and its dense twin, and what must hold between them after every operation."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rps.conversion import find_banks
from hf_rps.integrations.transformers.marks import is_recorded
from sequences import reference
from sequences.models import KINDS, build, run
from sequences.reference import ROUNDING, close, demand, snapshot, unchanged

Act = Callable[[nn.Module], nn.Module]
Psi = Callable[[list[Tensor]], list[Tensor]]
# what a message of the library names: itself, what it has made, or the remedy
_TERMS = re.compile(
    r"hf_rps|rps\.psi_|shared array|shared weight|\bRPS|compress|to_dense|merge_and_unload"
    r"|can't be shared|shares the weights"
)


def is_clear(error: Exception) -> bool:
    """True for an error that says what the library has to do with it."""
    kinds = (ValueError, RuntimeError, TypeError, AttributeError)  # the last as torch's own for what can't be set
    return isinstance(error, kinds) and _TERMS.search(str(error)) is not None


def unknown(old: list[Tensor]) -> None:
    """For operations that say themselves what becomes of psi."""


def kept(old: list[Tensor]) -> list[Tensor]:
    return old


class World:
    """Where a sequence is.

    Attributes:
        model: The model under test, dense or compressed.
        twin: A dense model of the same class, on which every operation is done, too. After each operation its weights
            are compared with those that the model's shared arrays stand for by definition, and set to them.
        bystanders: Models from which the sequence has gone on with a copy, and what they were: they must stay so.
    """

    def __init__(self, kind: str, folder: Path, rng: random.Random):
        self.kind, self.folder, self.rng = kind, folder, rng
        self.model, self.twin = build(kind), build(kind)
        self.bystanders: list[tuple[nn.Module, dict]] = []
        self.refusals: list[str] = []
        self.files = 0

    @property
    def batch(self) -> dict[str, Tensor]:
        return KINDS[self.kind].batch

    def new_folder(self) -> Path:
        self.files += 1
        return self.folder / str(self.files)

    # ---- an operation

    def apply(self, act: Act, twin_act: Act | None = None, *, psi: Psi = kept, leaves: bool = False,
              refused: bool = False, tolerance: float = 0.0, psi_tolerance: float = 0.0) -> bool:  # fmt: skip
        """Do ``act`` on the model and ``twin_act`` (by default the same) on the twin, and compare.

        Args:
            psi: The shared arrays afterwards, but for their dtypes, from those before.
            leaves: The model is to stay as it was; the sequence goes on with what ``act`` returns.
            refused: It must end in an error.
            tolerance: Of all other parameters and buffers; ``psi_tolerance`` of the arrays.

        Returns:
            Whether it was done; False where it ended in a clear error.
        """
        twin_act = twin_act or act
        before, old, model, narrow = snapshot(self.model), reference.psis(self.model), self.model, self.narrowest()
        seed = self.rng.randrange(2**31)
        torch.manual_seed(seed)
        try:
            result = act(model)
        except Exception as error:
            self._judge(error, twin_act, before, seed)
            return False
        demand(not refused, "was not refused")
        torch.manual_seed(seed)
        self.twin = twin_act(self.twin)
        if leaves:
            demand(result is not model, "gave back the very same model")
            unchanged(model, before, "the model that was left")
            self.bystanders.append((model, before))
        self.model = result
        self.agree(psi(old), narrow, tolerance, psi_tolerance)
        return True

    def _judge(self, error: Exception, twin_act: Act, before: dict, seed: int) -> None:
        """Raise ``error`` again unless it is clear and nothing has changed, or the twin's own."""
        if is_clear(error):
            self.refusals.append(f"{type(error).__name__}: {error}")
            unchanged(self.model, before, f"after a refusal ({error})")
            return
        torch.manual_seed(seed)
        try:
            twin_act(copy.deepcopy(self.twin))
        except type(error):
            # a dense model may be half changed by now, so go on with neither
            self.refusals.append(f"as the dense model: {type(error).__name__}")
            raise Ended from None
        raise error

    # ---- the comparison

    def narrowest(self) -> float:
        """The rounding of the narrowest dtype in use."""
        dtypes = {p.dtype for net in (self.model, self.twin) for p in net.parameters() if p.is_floating_point()}
        return max([ROUNDING[dtype] for dtype in dtypes])

    def agree(
        self, psi: list[Tensor] | None, narrow: float, tolerance: float = 0.0, psi_tolerance: float = 0.0
    ) -> None:
        """Compare model and twin; then set the twin's weights to those of the definition, and compare outputs."""
        narrow = max(narrow, self.narrowest())
        self._compare_structure()
        targets = reference.targets(self.model)
        if psi is not None:
            self._compare_psi(psi, psi_tolerance)
        self._compare_others(set(targets), tolerance)
        twins = dict(self.twin.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, layer in targets.items():
                twin = twins[name]
                dense = self.twin.get_submodule(name.removesuffix(".weight"))
                demand(layer.weight_dtype == twin.dtype, f"{name}: {layer.weight_dtype}, the twin's {twin.dtype}")
                psi_trained = layer.bank.psi.requires_grad
                demand(psi_trained == twin.requires_grad, f"{name}: psi trained {psi_trained}, {twin.requires_grad}")
                weight = reference.definition_weight(layer, dense) if not twin.is_meta else twin
                close(weight, twin, 8 * narrow, f"definition of {name} and the twin's")
                made = layer.dense_weight()
                close(made, weight, 4 * max(ROUNDING[made.dtype], 2.0**-22 * (made.dtype != torch.float64)), name)
                twin.copy_(weight)
        self.compare_outputs()

    def _compare_structure(self) -> None:
        model, twin = self.model, self.twin
        demand(type(model) is type(twin), f"{type(model).__name__}, the twin {type(twin).__name__}")
        modes = {name: module.training for name, module in model.named_modules()}
        for name, module in twin.named_modules():
            demand(name in modes, f"the module {name} is missing")
            demand(modes[name] == module.training, f"{name}.training is {modes[name]}")
        configs = reference.config_of(model), reference.config_of(twin)
        demand(configs[0] == configs[1], f"config, the twin's second: {reference.differing(*configs)}")
        banks = find_banks(model)
        if isinstance(model, PreTrainedModel) and not banks:
            demand(not is_recorded(model.config), "a dense model says that it is compressed")
        demand(all(psi.psi.isfinite().all() for psi in banks if not psi.psi.is_meta), "psi is not finite")

    def _compare_psi(self, expected: list[Tensor], tolerance: float) -> None:
        found = reference.psis(self.model)
        demand(len(found) == len(expected), f"{len(found)} shared arrays, expected {len(expected)}")
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            close(one, other.to(one.dtype), tolerance, f"psi of bank {i}")

    def _compare_others(self, targets: set[str], tolerance: float) -> None:
        found, expected = reference.parameters(self.model), reference.parameters(self.twin, targets)
        demand(found.keys() == expected.keys(), f"parameters differ: {found.keys() ^ expected.keys()}")
        for name, parameter in expected.items():
            close(found[name], parameter, tolerance, name)
            trained = found[name].requires_grad
            demand(trained == parameter.requires_grad, f"{name}.requires_grad is {trained}")
        found, expected = dict(self.model.named_buffers()), dict(self.twin.named_buffers())
        demand(found.keys() == expected.keys(), f"buffers differ: {found.keys() ^ expected.keys()}")
        for name, tensor in expected.items():
            close(found[name], tensor, tolerance, name)
        groups = [reference.tied(net, targets) for net in (self.model, self.twin)]
        demand(groups[0] == groups[1], f"tied are {groups[0]}, the twin's {groups[1]}")

    def compare_outputs(self) -> None:
        """Outputs without gradients, in eval mode; where the twin refuses (mixed dtypes), the model may."""
        try:
            expected = outputs(self.twin, self.batch)
        except Exception as error:
            try:
                outputs(self.model, self.batch)
            except type(error):
                pass
            return
        found = outputs(self.model, self.batch)
        demand(found.keys() == expected.keys(), f"outputs {found.keys()}, the twin's {expected.keys()}")
        for name, tensor in expected.items():
            close(found[name], tensor, 64 * max(self.narrowest(), 2.0**-46), f"output {name}")

    def end(self) -> None:
        for model, before in self.bystanders:
            unchanged(model, before, "a model that the sequence has left")


class Ended(Exception):
    """The dense model refuses, too, and may be half changed by that: nothing follows."""


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return run(model, batch)
    finally:
        for module, training in modes.items():
            module.training = training
