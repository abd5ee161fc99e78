"""Which models inside a module are compressed each by itself, so that each can be saved by itself."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hf_rps.config import RPSSettings
from hf_rps.integrations.transformers.marks import is_transformers_model
from hf_rps.layers.kinds import Candidate
from hf_rps.names import Place, base_prefix
from hf_rps.targets import find_targets, is_explicit

Part = tuple[nn.Module, list[Candidate] | None]


def parts_of(model: nn.Module, settings: RPSSettings) -> list[Part]:
    """The parts of ``model`` that get a shared array each, with the weights to share (None: what ``settings`` choose).

    A transformers model, and a module without one inside, is one part. In any other module (a SentenceTransformer, two
    towers) each outermost transformers model is one: it is what such modules save. Layers outside of these stay dense
    unless ``target_modules`` names them.
    """
    inner = {} if is_transformers_model(model) else _outermost(model)
    if not inner:
        return [(model, None)]
    if settings.modules is not None:
        return [(_recorded_part(model, inner, settings), None)]
    if not is_explicit(settings):
        return [(part, None) for part in inner.values()]
    chosen: dict[str, list[Candidate]] = {}
    for candidate in find_targets(model, settings):
        owner = next((name for name in inner if candidate.name.startswith(f"{name}.")), "")
        name = candidate.name.removeprefix(f"{owner}.") if owner else candidate.name
        chosen.setdefault(owner, []).append(replace(candidate, name=name))
    return [(inner[owner] if owner else model, candidates) for owner, candidates in chosen.items()]


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the transformers models inside ``model`` that are inside no other one, each once."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_transformers_model(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _recorded_part(model: nn.Module, inner: dict[str, nn.Module], settings: RPSSettings) -> nn.Module:
    """The one of ``model`` and the models inside it that has the modules of the recorded map."""
    name = settings.recorded_targets()[0].name
    fits = [
        part
        for part in (model, *inner.values())
        if any(key == Place(base_prefix(part)).module_name(name) for key, _ in part.named_modules())
    ]
    if len(fits) > 1:
        raise ValueError(
            f"{len(fits)} parts of this {type(model).__name__} have the module {name!r} of the map that the RPSConfig "
            f"records; compress the parts one by one"
        )
    return fits[0] if fits else next(iter(inner.values()))
