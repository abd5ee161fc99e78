"""PEFT: a session of operations on a dense model with RPS adapters, at whose end it is a dense model again."""

from __future__ import annotations

import copy
import pickle
import random

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rps import get_rps_model, to_dense
from hf_rps.conversion import find_banks
from hf_rps.integrations.peft.bank import AdapterArray
from hf_rps.integrations.peft.layers import AdapterLinear
from hf_rps.mappings import definition
from sequences.compression import random_config
from sequences.reference import (
    ROUNDING,
    adjoint,
    as_matrix,
    as_stored,
    close,
    demand,
    divisor,
    same,
    snapshot,
    unchanged,
)
from sequences.training import backward
from sequences.world import World, is_clear, outputs


class Session:
    """A PEFT model and the dense model that it is made on.

    Attributes:
        model: The PEFT model.
        base: A dense model with the weights before any adapter.
    """

    def __init__(self, world: World, config, rng: random.Random):
        self.world, self.config, self.rng = world, config, rng
        self.base = copy.deepcopy(world.twin)
        self.model = peft.get_peft_model(world.model, config)
        self.refusals: list[str] = []

    @property
    def delta(self) -> bool:
        return self.config.mode == "delta"

    @property
    def inner(self) -> nn.Module:
        return self.model.base_model.model

    def array(self) -> AdapterArray:
        """That of the active adapter."""
        (name,) = self.model.active_adapters
        arrays = [(path, m) for path, m in self.inner.named_modules() if isinstance(m, AdapterArray)]
        return next(array for path, array in arrays if path.rpartition(".")[2] == name)

    def layers(self) -> dict[str, AdapterLinear]:
        """Those that the active adapter has a part in."""
        (name,) = self.model.active_adapters
        found = {n: m for n, m in self.inner.named_modules() if isinstance(m, AdapterLinear)}
        return {n: m for n, m in found.items() if name in m.shared}

    def twin(self) -> nn.Module:
        """The dense model that the PEFT model stands for, by the definition."""
        twin, array = copy.deepcopy(self.base), self.array()
        (name,) = self.model.active_adapters
        with torch.no_grad():
            for path, layer in self.layers().items():
                dense = twin.get_submodule(path)
                weight = definition.weight(array.psi.detach(), array.weight_map, layer.shared[name].name)
                weight = as_stored(dense, weight).to(dense.weight.dtype)
                dense.weight.copy_(dense.weight + weight if self.delta else weight)
        return twin

    def check(self) -> None:
        """Outputs, and that adapters alone are trained."""
        twin, tolerance = self.twin(), 64 * self.world.narrowest()
        self.compare(twin, tolerance)
        for name, parameter in self.inner.named_parameters():
            demand(not parameter.requires_grad or ".rps_banks." in name, f"{name} is trained")

    def compare(self, twin: nn.Module, tolerance: float) -> None:
        expected, found = outputs(twin, self.world.batch), outputs(self.inner, self.world.batch)
        demand(found.keys() == expected.keys(), f"outputs {found.keys()}")
        for name, tensor in expected.items():
            close(found[name], tensor, tolerance, f"output {name} with an adapter")


def adapter(world: World, rng: random.Random) -> None:
    """get_peft_model, some operations, merge_and_unload or unload."""
    if not isinstance(world.model, PreTrainedModel) or find_banks(world.model) or not _runs(world):
        return
    config = random_config(world, rng)
    config.mode = rng.choice(["delta", "replace"])
    config.init_weights = config.init_weights if config.mode == "replace" else rng.random() < 0.3
    frozen = {name: p.requires_grad for name, p in world.twin.named_parameters()}
    before = snapshot(world.model)
    torch.manual_seed(rng.randrange(99))
    try:
        session = Session(world, config, rng)
    except Exception as error:
        nothing_matches = type(error).__name__ == "NoMatchingPeftModuleError"  # PEFT's own, as for any method
        demand(is_clear(error) or nothing_matches, f"unclear: {type(error).__name__}: {error}")
        world.refusals.append(str(error))
        unchanged(world.model, before, "a model that no adapter could be put on")
        return
    session.check()
    for name in rng.choices(sorted(SESSION), k=rng.randint(1, 4)):
        SESSION[name](session, rng)
        session.check()
    _end(session, rng, frozen)


def _runs(world: World) -> bool:
    """False where the dense model can't run, such as in several dtypes."""
    try:
        outputs(world.twin, world.batch)
    except RuntimeError:
        return False
    return True


def _end(session: Session, rng: random.Random, frozen: dict[str, bool]) -> None:
    """A dense model again: with the weights in use, or with those before (mode="delta")."""
    world = session.world
    merge = rng.random() < 0.7 or not session.delta
    expected = session.twin() if merge else session.base
    world.model = session.model.merge_and_unload() if merge else session.model.unload()
    world.twin = expected
    for net in (world.model, world.twin):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(frozen[name])
    rounding = 16 * world.narrowest()
    with torch.no_grad():  # PEFT adds in an order of its own
        for name, parameter in world.model.named_parameters():
            close(parameter, world.twin.get_parameter(name), rounding, f"{name} after the adapter")
            world.twin.get_parameter(name).copy_(parameter)
    world.agree([], world.narrowest())


def train(session: Session, rng: random.Random) -> None:
    """A step: psi moves by its gradient, which is that of the dense weights by the adjoint; nothing else does."""
    twin, array = session.twin(), session.array()
    (name,) = session.model.active_adapters
    backward(session.inner, session.world.batch)
    backward(twin, session.world.batch)
    others = {n: p.detach().clone() for n, p in session.inner.named_parameters() if p is not array.psi}
    grads = {}
    for path, layer in session.layers().items():
        dense = twin.get_submodule(path)
        if dense.weight.grad is not None:
            grads[layer.shared[name].name] = as_matrix(dense, dense.weight.grad)
    if session.world.narrowest() < 1e-5 and all(p.requires_grad for p in twin.parameters()):
        demand(array.psi.grad is not None, "psi has no gradient")
        expected = adjoint(array.weight_map, grads) / divisor(array.weight_map, array.grad_scaling)
        error = (array.psi.grad.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        demand(error <= max(2000 * session.world.narrowest(), 1e-7), f"the adapter's gradient differs by {error:.3g}")
    psi, grad = array.psi.detach().clone(), array.psi.grad
    torch.optim.SGD([p for p in session.model.parameters() if p.requires_grad], lr=0.01).step()
    if grad is not None:
        close(array.psi, psi - 0.01 * grad, ROUNDING[psi.dtype], "psi after a step")
    for n, p in others.items():
        same(session.inner.get_parameter(n), p, f"{n} beside the adapter")
    session.model.zero_grad()


def disable(session: Session, rng: random.Random) -> None:
    with session.model.disable_adapter():
        try:
            session.compare(session.base, 64 * session.world.narrowest())
            demand(session.delta, "a replaced weight was not missed")
        except ValueError as error:
            demand(not session.delta and is_clear(error), f"unclear: {error}")


def go_on_with_a_copy(session: Session, rng: random.Random) -> None:
    left, before = session.model, snapshot(session.model)
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in left.modules())  # by a local hook
    session.model = copy.deepcopy(left) if checkpoints or rng.random() < 0.5 else pickle.loads(pickle.dumps(left))
    unchanged(left, before, "the PEFT model that was left")


def save_and_load(session: Session, rng: random.Random) -> None:
    """Only the active adapter is taken along."""
    folder = session.world.new_folder()
    (name,) = session.model.active_adapters
    psi = session.array().psi.detach().clone()
    session.model.save_pretrained(folder, selected_adapters=[name])
    folder = folder if name == "default" else folder / name
    base = copy.deepcopy(session.base)
    session.model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    same(session.array().psi.detach().to(psi.dtype), psi, "psi of a loaded adapter")


def second(session: Session, rng: random.Random) -> None:
    """Another adapter beside the first, and to and fro."""
    (first,) = session.model.active_adapters
    if "second" in session.model.peft_config:
        return
    other = copy.deepcopy(session.config)
    other = type(other)(**{f: getattr(other, f) for f in ("ratio", "mode", "mapping", "sign", "target_modules",
                                                          "exclude_modules", "grad_scaling")})  # fmt: skip
    other.seed = session.config.seed + 1
    session.model.add_adapter("second", other)
    session.check()
    session.model.set_adapter("second")
    session.check()
    if rng.random() < 0.5:
        session.model.set_adapter(first)
        session.check()
        if rng.random() < 0.5:
            session.model.delete_adapter("second")


def state_dict(session: Session, rng: random.Random) -> None:
    """Into a copy whose adapter was spoilt."""
    state = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    with torch.no_grad():
        session.array().psi.zero_()
    session.model.load_state_dict(state)


def merge_and_unmerge(session: Session, rng: random.Random) -> None:
    session.model.merge_adapter()
    session.compare(session.twin(), 256 * session.world.narrowest())
    before = {n: p.detach().clone() for n, p in session.base.named_parameters()}
    session.model.unmerge_adapter()
    if session.delta:  # subtracting leaves the rounding of the sum
        for path, layer in session.layers().items():
            close(layer.base_layer.weight, before[f"{path}.weight"], 64 * session.world.narrowest(), f"{path} unmerged")
            with torch.no_grad():
                layer.base_layer.weight.copy_(before[f"{path}.weight"])


def refused(session: Session, rng: random.Random) -> None:
    """Neither the PEFT model nor the model inside it is compressed or made dense."""
    model = rng.choice([session.inner, session.model])
    try:
        _ = to_dense(model) if rng.random() < 0.5 else get_rps_model(model, session.config)
    except ValueError as error:
        demand(is_clear(error), f"unclear: {error}")
    else:
        raise AssertionError("a model with adapters was compressed, or made dense")


SESSION = {f.__name__: f for f in (train, disable, go_on_with_a_copy, save_and_load, second, state_dict,
                                   merge_and_unmerge, refused)}  # fmt: skip
