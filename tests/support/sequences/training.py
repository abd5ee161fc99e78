"""Operations that train, and freezing, which decides what is trained."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn

from hf_rps.conversion import find_banks
from sequences import reference
from sequences.models import run
from sequences.operations import part_of
from sequences.reference import adjoint, as_matrix, demand, divisor, take_over_weights
from sequences.world import World, is_clear


def step(world: World, rng: random.Random) -> None:
    """One step of an optimizer; psi's gradient is the dense one mapped by the definition's adjoint."""
    make = rng.choice([lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
                       lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
                       lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)])  # fmt: skip
    if any(p.dtype == torch.float16 for p in world.twin.parameters()):  # whose zero gradients AdamW makes NaN
        make = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
    expected: list[torch.Tensor] = []

    def act(model):
        backward(model, world.batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        twin = world.twin
        backward(twin, world.batch)
        compare_gradients(world)
        by_hand = [nn.Parameter(bank.psi.detach().clone()) for bank in find_banks(model)]
        for bank, parameter in zip(find_banks(model), by_hand, strict=True):
            parameter.grad = bank.psi.grad
        if trained:
            make(trained).step()
        by_hand_trained = [p for p in by_hand if p.grad is not None]
        if by_hand_trained:
            make(by_hand_trained).step()
        expected.extend(p.detach() for p in by_hand)
        targets, twins = reference.targets(model), dict(twin.named_parameters())
        others = [p for name, p in twins.items() if name not in targets and p.requires_grad]
        if others:
            make(others).step()
        take_over_weights(model, twin)
        for net in (model, twin):
            net.zero_grad()
        return model

    world.apply(act, lambda twin: without_gradients(backward(twin, world.batch)), psi=lambda old: expected)


def without_gradients(model: nn.Module) -> nn.Module:
    model.zero_grad()
    return model


def backward(model: nn.Module, batch: dict) -> nn.Module:
    """Of a fixed projection of all outputs; batch norms use their statistics, so that no buffer moves."""
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = False
    model.zero_grad()
    try:
        generator = torch.Generator().manual_seed(1)
        loss = sum((value.float() * torch.randn(value.shape, generator=generator)).sum()
                   for value in run(model, batch).values())  # fmt: skip
        if torch.is_tensor(loss) and loss.requires_grad:
            (loss / 64).backward()
    finally:
        for module, training in modes.items():
            module.training = training
    return model


def compare_gradients(world: World) -> None:
    model, twin = world.model, world.twin
    targets, tolerance = reference.targets(model), max(2000 * world.narrowest(), 1e-7)
    twins = dict(twin.named_parameters())
    own = dict(model.named_parameters())
    size = max([p.grad.abs().nan_to_num().max().item() for p in twins.values() if p.grad is not None], default=0.0)
    precise = world.narrowest() < 1e-5  # half precision: the gradients' own rounding says little
    for name, parameter in twins.items():
        if name in targets:
            continue
        found = own[name].grad
        demand((found is None) == (parameter.grad is None), f"gradient of {name} is {found}")
        if found is not None:
            if precise:
                difference = (found - parameter.grad).abs().max().item()
                demand(difference <= tolerance * size, f"gradient of {name} differs by {difference}, of {size}")
            parameter.grad = found.clone()  # so that the steps are the same, bit for bit
    for bank in find_banks(model):
        grads = {}
        for name, layer in targets.items():
            if layer.bank is bank and twins[name].grad is not None:
                dense = twin.get_submodule(name.removesuffix(".weight"))
                grads[layer.name] = as_matrix(dense, twins[name].grad)
        demand((bank.psi.grad is None) == (not grads), f"psi's gradient is {bank.psi.grad}, of {len(grads)} dense ones")
        if grads and precise:
            expected = adjoint(bank.weight_map, grads) / divisor(bank.weight_map, bank.grad_scaling)
            error = (bank.psi.grad.double() - expected).norm() / expected.norm().clamp(min=1e-30)
            demand(error <= tolerance, f"psi's gradient differs by {error:.3g}")


def freeze(world: World, rng: random.Random) -> None:
    """The whole model, or a part; one with some of the layers is refused, at once or in a training pass."""
    if rng.random() < 0.5:
        flag = rng.random() < 0.5
        world.apply(lambda model: model.requires_grad_(flag))
        return
    part = part_of(world, rng)
    if next(world.model.get_submodule(part).parameters(), None) is None:
        return  # nothing that torch could freeze; see test_freezing.py
    inside = [n for n in reference.targets(world.model) if n.startswith(f"{part}.")]
    if not inside:
        world.apply(lambda model: model.get_submodule(part).requires_grad_(False) and model)
        return
    _freeze_layers(world, rng, part)


def _freeze_layers(world: World, rng: random.Random, part: str) -> None:
    """Compressed layers are frozen through a module around them: psi too, or a refusal, or a message in training."""
    model, twin = world.model, world.twin
    flags = [{n: p.requires_grad for n, p in net.named_parameters()} for net in (model, twin)]
    try:
        model.get_submodule(part).requires_grad_(False)
    except RuntimeError as error:
        demand(is_clear(error), f"unclear: {error}")
        world.refusals.append(str(error))
        _restore(model, flags[0])
        return
    twin.get_submodule(part).requires_grad_(False)
    if rng.random() < 0.4:
        world.model = model = copy.deepcopy(model)
    targets = reference.targets(model)
    torn = [n for n, layer in targets.items() if layer.bank.psi.requires_grad != twin.get_parameter(n).requires_grad]
    if torn:
        try:
            backward(model, world.batch)
        except RuntimeError as error:
            world.refusals.append(str(error))
            demand(is_clear(error), f"unclear: {error}")
        else:
            still = [n for n in targets if not twin.get_parameter(n).requires_grad]
            banks = {targets[n].bank for n in torn}
            all_frozen = all(n in still for n, layer in targets.items() if layer.bank in banks)
            silent = any(bank.psi.grad is not None for bank in banks) and not all_frozen
            demand(not silent, f"{part} was frozen, its weights {torn} are trained, and nothing was said")
        model.zero_grad()
        _restore(model, flags[0])
        _restore(twin, flags[1])
    world.agree(reference.psis(model), world.narrowest())


def _restore(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])


TRAINING = {f.__name__: f for f in (step, freeze)}
