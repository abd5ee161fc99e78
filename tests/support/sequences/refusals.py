"""What a compressed layer, or model, can't take."""

from __future__ import annotations

import random

import peft
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from hf_rps import RPSConfig, get_rps_model
from hf_rps.conversion import shared_layers
from sequences.world import World


def refused(world: World, rng: random.Random) -> None:
    """What a compressed layer can't take."""
    layers = shared_layers(world.model)
    if not layers:
        return
    name = rng.choice(sorted(layers))
    layer = layers[name]
    dense = torch.zeros(layer.weight.shape, dtype=layer.weight_dtype)
    loha = peft.LoHaConfig(target_modules=[name], r=2)
    ways = {
        "prune": lambda m: prune.l1_unstructured(layer, "weight", 0.5),
        "prune globally": lambda m: prune.global_unstructured([(layer, "weight")], prune.RandomUnstructured, amount=2),
        "parametrize": lambda m: register_parametrization(layer, "weight", nn.Identity()),
        "weight_norm": lambda m: parametrizations.weight_norm(layer),
        "orthogonal": lambda m: parametrizations.orthogonal(layer),
        "old weight_norm": lambda m: nn.utils.weight_norm(layer),
        "spectral_norm": lambda m: nn.utils.spectral_norm(layer),
        "write": lambda m: layer.weight.copy_(dense),
        "data": lambda m: setattr(layer.weight, "data", dense),
        "parameter": lambda m: setattr(layer, "weight", nn.Parameter(dense)),
        "delete": lambda m: delattr(layer, "weight"),
        "init": lambda m: nn.init.zeros_(layer.weight),
        "mul_": lambda m: layer.weight.data.mul_(2),
        "index": lambda m: layer.weight.__setitem__(0, 0.0),
        "reset": lambda m: layer.reset_parameters(),
        "convert": lambda m: get_rps_model(m, RPSConfig(ratio=0.5)),
        "peft delta": lambda m: peft.get_peft_model(m, RPSConfig(ratio=0.5, mode="delta")),
        "peft replace": lambda m: peft.get_peft_model(m, RPSConfig(ratio=0.5)),
        "loha": lambda m: peft.get_peft_model(m, loha),
        "a dense state dict": lambda m: m.load_state_dict(world.twin.state_dict(), strict=False),
        "data parallel": lambda m: layer._replicate_for_data_parallel(),
    }
    way = rng.choice(sorted(ways))
    if way in ("peft delta", "peft replace", "loha") and not isinstance(world.model, PreTrainedModel):
        return

    def act(model):
        with torch.no_grad():
            ways[way](model)
        raise AssertionError(f"{way} of {name} was accepted")

    world.apply(act, lambda twin: twin, refused=True)
