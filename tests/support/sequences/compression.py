"""Operations of the library."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rps import RPSConfig, get_rps_config, get_rps_model, to_dense
from hf_rps.conversion import find_banks, shared_layers
from hf_rps.names import is_psi_key
from sequences import reference
from sequences.models import run
from sequences.operations import fresh_like
from sequences.reference import ROUNDING, as_matrix, close, demand, take_over_weights
from sequences.world import World, unknown


def random_config(world: World, rng: random.Random) -> RPSConfig:
    options = {
        "ratio": rng.choice([1, 1.0, 0.5, 0.3, 0.1, 0.03]),
        "seed": rng.randrange(4),
        "input_fold": 1,
        "mapping": rng.choice(["fold", "fold", "fold", "roast", "hash"]),
        "sharing": rng.choice(["global", "global", "block", "module"]),
        "sign": rng.choice(["row", "row", "element", "none"]),
        "grad_scaling": rng.choice(["projection", "projection", "norm", "none"]),
        "init_weights": rng.choice([True, True, False, "project", "rescale"]),
    }
    options["input_fold"] = rng.choice([1, 1, 2, "full"]) if options["ratio"] <= 0.5 else 1
    some = {"bert": [None, r".*(query|key|value|dense)", "all-linear"],
            "llama": [None, ["q_proj", "up_proj"], ["lm_head", "q_proj", "down_proj"], ["lm_head"]],
            "llama tied": [None, ["lm_head", "q_proj"], ["v_proj", "gate_proj"]],
            "gpt2": [None, ["c_attn", "c_proj"], ["lm_head", "c_fc"]],
            "t5": [None, ["wo", "q"], ["wi", "k", "lm_head"]],
            "resnet": [None, r".*convolution", r".*\.(convolution|1)"]}  # fmt: skip
    options["target_modules"] = rng.choice(some[world.kind])
    options["exclude_modules"] = rng.choice([None, None, None, ["query", "k_proj", "wo", "c_fc"], r".*\.1\..*"])
    return RPSConfig(**options)


def convert(world: World, rng: random.Random) -> None:
    """The model, or a part of it; psi is what the definition gives from the twin's weights."""
    config, on_meta = random_config(world, rng), any(p.is_meta for p in world.model.parameters())
    parts = [name for name, module in world.twin.named_modules() if isinstance(module, PreTrainedModel) and name]
    part = rng.choice(parts) if parts and rng.random() < 0.3 else ""
    compressed, given = bool(find_banks(world.model.get_submodule(part))), copy.deepcopy(config)

    def act(model):
        found = get_rps_model(model.get_submodule(part), config)
        demand(found is model.get_submodule(part), "gave back another object")
        demand(config == given, f"the config was changed from {given} to {config}")
        for bank in find_banks(model.get_submodule(part)):
            check_start(world, model, bank)
        take_over_weights(model, world.twin)
        return model

    world.apply(act, lambda twin: twin, psi=unknown, refused=compressed or on_meta)


def check_start(world: World, model: nn.Module, bank) -> None:
    """psi from the twin's weights by the definition; at ratio 1, the twin's weights again."""
    weights, rounding = {}, ROUNDING[bank.psi.dtype]
    for name, layer in shared_layers(model).items():
        if layer.bank is bank:
            dense = world.twin.get_submodule(name)
            weights[layer.name] = as_matrix(dense, dense.weight.detach())
            if bank.weight_map.ratio == 1 and bank.array.started and bank.weight_map.mapping == "fold":
                rounding_here = 8 * max(rounding, ROUNDING[layer.weight_dtype])
                close(layer.dense_weight(), dense.weight, rounding_here, f"{name} at ratio 1")
    if bank.array.started:
        expected = reference.started(bank.weight_map, weights, bank.array.started)
        close(bank.psi.detach().double(), expected, 8 * rounding, f"psi by {bank.array.started}")


def densify(world: World, rng: random.Random) -> None:
    compressed = bool(find_banks(world.model))
    tolerance = 8 * world.narrowest() if compressed else 0.0
    world.apply(to_dense, lambda twin: twin, psi=lambda old: [], refused=not compressed, tolerance=tolerance)
    with torch.no_grad():  # the rounding of both ways to make a weight
        for name, parameter in world.twin.named_parameters():
            if not find_banks(world.model):
                parameter.copy_(world.model.get_parameter(name))


def densify_and_convert_anew(world: World, rng: random.Random) -> None:
    if find_banks(world.model):
        densify(world, rng)
        convert(world, rng)


def change_psi(world: World, rng: random.Random) -> None:
    """As training by hand does."""
    factor = rng.choice([0.5, 2.0, -1.0])

    def act(model):
        with torch.no_grad():
            for bank in find_banks(model):
                bank.psi.mul_(factor)
        return model

    def twin(model):
        with torch.no_grad():
            for name in reference.targets(world.model):
                model.get_parameter(name).mul_(factor)
        return model

    world.apply(act, twin, psi=lambda old: [p * factor for p in old])


def load_into_another(world: World, rng: random.Random) -> None:
    """The state dict into a model that was dense and other: with the recorded map it loads, with another it doesn't."""
    if not find_banks(world.model):
        return
    same_map, part = rng.random() < 0.6, ""
    strict = rng.random() < 0.5

    def act(model):
        if same_map:
            other = get_rps_model(fresh_like(world), get_rps_config(model))
        else:
            other = fresh_like(world)
            settings = find_banks(model)[0].settings
            changed = copy.deepcopy(settings)
            changed.seed, changed.fingerprint, changed.modules = settings.seed + 1, None, None
            get_rps_model(other.get_submodule(part), changed)
        # an array elsewhere in the model is to torch a missing and an unexpected key, which strict=False passes over
        places = [{name.rpartition(".")[0] for name in net.state_dict() if is_psi_key(name)} for net in (other, model)]
        other.load_state_dict(model.state_dict(), strict=strict or places[0] != places[1])
        _same_flags(other, model)
        return other

    def twin(model):
        return copy.deepcopy(model)

    world.apply(act, twin, leaves=True, refused=not same_map)


def _same_flags(other: nn.Module, model: nn.Module) -> None:
    """What a state dict does not carry, and get_rps_model takes from the dense weights."""
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        demand(parameter.requires_grad == own[name].requires_grad, f"{name}.requires_grad is {parameter.requires_grad}")


def functional_call(world: World, rng: random.Random) -> None:
    """With other parameters in the place of the model's, which stay."""
    factor = 1.25

    def act(model):
        for net, store in ((model, found), (world.twin, expected)):
            net = copy.deepcopy(net).eval()  # torch may mix up parameters of T5 that were tied in pairs
            parameters = {f"net.{name}": p.detach() * factor for name, p in net.named_parameters()}
            with torch.no_grad():
                store.update(torch.func.functional_call(_Runner(net), parameters, (world.batch,)))
        for name, tensor in expected.items():
            close(found[name], tensor, 64 * world.narrowest(), f"functional_call: {name}")
        return model

    found, expected = {}, {}
    world.apply(act)


class _Runner(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return run(self.net, batch)


COMPRESSION = {f.__name__: f for f in (convert, densify, densify_and_convert_anew, change_psi, load_into_another,
                                       functional_call)}  # fmt: skip
