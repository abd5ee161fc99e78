"""Operations that are done on a model and its twin alike."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from transformers import EncoderDecoderModel, PreTrainedModel

from hf_rps.conversion import find_banks, shared_layers
from sequences.models import KINDS
from sequences.reference import demand, differing, take_over_weights, targets
from sequences.world import World

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def copied(world: World, rng: random.Random) -> None:
    """deepcopy, pickle, torch.save of the whole module."""
    way = rng.choice(["deepcopy", "pickle", "torch.save"])

    def act(model):
        if way == "deepcopy":
            return copy.deepcopy(model)
        if way == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    world.apply(act, leaves=True)


def cast(world: World, rng: random.Random) -> None:
    dtype, way = rng.choice(DTYPES), rng.random()

    def act(model):
        if way < 0.5:
            return model.to(dtype)
        return {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float32: model.float,
                torch.float64: model.double}[dtype]()  # fmt: skip

    world.apply(act)


def cast_part(world: World, rng: random.Random) -> None:
    """A part to another dtype, and often back, so that the model goes on running."""
    part, dtype = part_of(world, rng), rng.choice(DTYPES)
    inside = find_banks(world.model.get_submodule(part))
    readers = shared_layers(world.model.get_submodule(part)).values()
    if any(layer.bank in inside and layer not in readers for layer in shared_layers(world.model).values()):
        return  # the array would be cast, and a head that reads it not; see test_dtypes.py
    back = next(p.dtype for p in world.twin.parameters() if p.is_floating_point())

    def act(model):
        model.get_submodule(part).to(dtype)
        return model

    def undo(model):
        model.get_submodule(part).to(back)
        return model

    if world.apply(act) and rng.random() < 0.8:
        world.apply(undo)


def move(world: World, rng: random.Random) -> None:
    """To the meta device and back: what is not in the state dict is put back by hand, as a user must."""
    way = rng.choice(["cpu", "meta", "meta, assigned", "share_memory"])

    def act(model):
        if way == "cpu":
            return model.to("cpu")
        if way == "share_memory":
            return model.share_memory()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        buffers = [(module, name, b.clone()) for module in model.modules() for name, b in module._buffers.items()
                   if b is not None]  # fmt: skip
        model.to("meta")
        if way == "meta":
            model.to_empty(device="cpu")
        model.load_state_dict(state, assign=way != "meta")
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        if isinstance(model, PreTrainedModel):  # both ways give tied weights memory of their own
            model.tie_weights()
        return model

    world.apply(act)


def modes(world: World, rng: random.Random) -> None:
    """train, eval, gradient checkpointing, zero_grad."""
    way = rng.choice(["train", "eval", "checkpoint", "no checkpoint", "zero_grad"])

    def act(model):
        if way in ("checkpoint", "no checkpoint"):
            if isinstance(model, PreTrainedModel):
                options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
                _ = (model.gradient_checkpointing_enable(**options) if way == "checkpoint"
                     else model.gradient_checkpointing_disable())  # fmt: skip
            return model
        getattr(model, way)()
        return model

    world.apply(act)


def save_and_load(world: World, rng: random.Random) -> None:
    """save_pretrained and from_pretrained of the same class, or of that with or without the head."""
    if not isinstance(world.model, PreTrainedModel):
        return
    load = {"dtype": rng.choice([None, "auto", torch.bfloat16, torch.float16, torch.float32])}
    load = {} if load["dtype"] is None else load
    save = rng.choice([{}, {}, {"max_shard_size": "3KB"}])
    cls, kind = type(world.model), KINDS[world.kind]
    if cls in (kind.head_class, kind.base_class) and rng.random() < 0.3:
        cls = kind.base_class if cls is kind.head_class else kind.head_class
    infos, loads = [], []

    def act(model):
        folder = world.new_folder()
        model.save_pretrained(folder, **save)
        demand(all(f.suffix != ".bin" for f in folder.iterdir()), "it is not saved as safetensors")
        written = json.loads((folder / "config.json").read_text())
        demand(("quantization_config" in written) == bool(find_banks(model)), "config.json does not say what it is")
        loaded, info = cls.from_pretrained(folder, output_loading_info=True, **load)
        infos.append(info)
        loads.append(loaded)
        if find_banks(model) and find_banks(loaded):
            records = loaded.config.quantization_config.to_dict(), written["quantization_config"]
            demand(cls is not type(model) or records[0] == records[1], f"the record: {differing(*records)}")
        if len(infos) == 2:  # a new head is drawn at random: take over that of the model
            missing = infos[0]["missing_keys"]
            held = targets(loads[0])  # an array holds its head's weight, too, where the base alone was saved
            lost = set(info["missing_keys"]) - held.keys()
            demand(set(missing) == lost, f"missing: {missing}, the twin's {lost}")
            take_over_weights(loads[0], loaded)
            state = loads[0].state_dict()
            with torch.no_grad():
                for name, tensor in loaded.state_dict().items():
                    if name in missing:
                        tensor.copy_(state[name])
        return loaded

    if not world.apply(act, leaves=True):  # saved perhaps, which writes into the config, and not loaded
        world.twin.save_pretrained(world.new_folder())


def fresh_like(world: World) -> nn.Module:
    """A dense model as the twin, with other numbers."""
    other = copy.deepcopy(world.twin)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return other


def state_dict(world: World, rng: random.Random) -> None:
    """Through a file or not, into a copy whose numbers were spoilt."""
    through_file, assign, strict = rng.random() < 0.5, rng.random() < 0.3, rng.random() < 0.7

    def act(model):
        other, state = copy.deepcopy(model), model.state_dict()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        if through_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        elif assign:
            state = {name: tensor.clone() for name, tensor in state.items()}
        other.load_state_dict(state, assign=assign, strict=strict)
        if assign and isinstance(other, PreTrainedModel):
            other.tie_weights()
        return other

    world.apply(act, leaves=True)


def average(world: World, rng: random.Random) -> None:
    """The mean of two models, by their state dicts or by torch's and by an exponential average."""
    way = rng.choice(["state dicts", "AveragedModel", "EMA"])

    def act(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        if way == "state dicts":
            one, two = model.state_dict(), other.state_dict()
            mean = {k: (one[k] + two[k]) / 2 if one[k].is_floating_point() else one[k] for k in one}
            other.load_state_dict(mean)
            return other
        averaged = AveragedModel(model, multi_avg_fn=None, avg_fn=get_ema_avg_fn(0.5) if way == "EMA" else None)
        averaged.update_parameters(model)
        averaged.update_parameters(other)
        return averaged.module

    def psi(old):
        return [p.lerp(p * 1.5, 0.5) if way == "EMA" else p + (p * 1.5 - p) / 2 if way == "AveragedModel"
                else (p + p * 1.5) / 2 for p in old]  # fmt: skip

    world.apply(act, psi=psi, leaves=True, psi_tolerance=2 * world.narrowest())


def from_config(world: World, rng: random.Random) -> None:
    """A model of the config, into which the state dict is loaded."""
    if not isinstance(world.model, PreTrainedModel) or isinstance(world.model, EncoderDecoderModel):
        return

    def act(model):
        other = type(model)._from_config(copy.deepcopy(model.config))
        other.load_state_dict(model.state_dict())
        return other

    world.apply(act, leaves=True)


def resize(world: World, rng: random.Random) -> None:
    if world.kind == "resnet" or type(world.model) not in (KINDS[world.kind].head_class, KINDS[world.kind].base_class):
        return
    size = rng.choice([29, 33, 36, 40])

    def act(model):
        model.resize_token_embeddings(size, mean_resizing=False)
        return model

    world.apply(act)


def tie(world: World, rng: random.Random) -> None:
    if world.kind not in ("llama", "llama tied", "gpt2", "t5") or type(world.model) is not KINDS[world.kind].head_class:
        return
    tied = rng.random() < 0.5

    def act(model):
        if tied:
            before, model.config.tie_word_embeddings = model.config.tie_word_embeddings, True
            try:
                model.tie_weights()
            except Exception:
                model.config.tie_word_embeddings = before
                raise
        else:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    world.apply(act)


def part_of(world: World, rng: random.Random) -> str:
    """A module that has parameters, by name."""
    named = world.twin.named_modules()
    return rng.choice([name for name, module in named if name and next(module.parameters(), None) is not None])


ALIKE = {f.__name__: f for f in (copied, cast, cast_part, move, modes, save_and_load, state_dict, average, from_config,
                                 resize, tie)}  # fmt: skip
