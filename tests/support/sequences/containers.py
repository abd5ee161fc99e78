"""Putting a model into another one, and taking it out again."""

from __future__ import annotations

import copy
import random

from transformers import BertConfig, BertLMHeadModel, EncoderDecoderModel

from hf_rps import to_dense
from hf_rps.conversion import find_banks, shared_layers
from sequences.models import KINDS, OUTER, Chain, Towers, build
from sequences.world import World


def wrap(world: World, rng: random.Random) -> None:
    """Put it into another model, or take it out again."""
    model = world.model
    for attribute in ("inner", "encoder", "one"):
        if isinstance(model, (*OUTER.values(), EncoderDecoderModel, Towers)) and hasattr(model, attribute):
            _take_out(world, attribute)
            return
    if isinstance(model, Chain):
        world.apply(lambda m: m[0])
        return
    way = rng.choice(["outer", "outer", "encoder", "towers", "chain"])
    base = getattr(model, "base_model", model)
    if way == "outer" and type(base) in OUTER:
        dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())

        def outer(m):
            found = OUTER[type(m.base_model)](copy.deepcopy(_plain_config(m))).eval().to(dtype)
            found.inner = m.base_model
            return found

        world.apply(outer)
    elif way == "encoder" and world.kind == "bert":
        config = BertConfig(**KINDS["bert"].arguments, is_decoder=True, add_cross_attention=True)
        dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())

        def pair(m):
            return EncoderDecoderModel(encoder=m.base_model, decoder=BertLMHeadModel(config)).eval().to(dtype)

        world.apply(pair, psi=lambda old: old)
    elif way == "towers":
        world.apply(lambda m: Towers(m, build(world.kind, 1)).eval())
    elif way == "chain":
        world.apply(lambda m: Chain(m))


def _take_out(world: World, attribute: str) -> None:
    part = getattr(world.model, attribute)
    banks = find_banks(part)
    if all(layer.bank in banks for layer in shared_layers(part).values()):
        positions = [i for i, bank in enumerate(find_banks(world.model)) if bank in banks]
        world.apply(lambda model: getattr(model, attribute), psi=lambda old: [old[i] for i in positions])
        return

    densify = world.rng.random() < 0.5

    def act(model):  # its array stays outside: it can't be used as a model of its own
        to_dense(part) if densify else part.save_pretrained(world.new_folder())

    world.apply(act, lambda twin: twin, refused=True)


def _plain_config(model):
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
