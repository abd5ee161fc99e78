"""Tied weights: one parameter that several modules hold, as an embedding and the output head that reads it.

In a map it is one target, that of the embedding. The modules that hold it, too, are its *readers*: layers of their own
kinds that read the same slice of the shared array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from hf_rps.layers.kinds import Candidate, kind_of, shareable_kind
from hf_rps.names import base_prefix, map_name


def holders_of(modules: Mapping[str, nn.Module]) -> dict[int, list[Candidate]]:
    """By the id of a parameter, all that hold it among ``modules``."""
    found: dict[int, list[Candidate]] = {}
    for name, module in modules.items():
        for parameter, tensor in module._parameters.items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(Candidate(name, module, kind_of(module), parameter))
    return found


def can_be_tied(holders: Iterable[Candidate]) -> bool:
    """True where each of the modules that hold one parameter can read it as the same matrix: tables of embeddings and
    layers that multiply with it, an embedding among them."""
    kinds = [shareable_kind(holder.module) for holder in holders]
    return all(kind is not None and kind.ties for kind in kinds) and any(kind.field is not None for kind in kinds)


Readers = dict[str, dict[str, Candidate]]  # by target, and by what they are called as targets are


def readers_of(model: nn.Module, candidates: Mapping[str, Candidate]) -> Readers:
    """The other modules that hold the very same parameter as an embedding among ``candidates``, by target.

    Only embeddings have readers: a class may tie to a head what was untied when the head alone was compressed.
    """
    holders, prefix, found = holders_of(dict(model.named_modules())), base_prefix(model), {}
    for target, table in candidates.items():
        if table.kind.field is not None:
            others = [h for h in holders.get(id(table.stored), ()) if h.module is not table.module]
            found[target] = {map_name(other.full_name, prefix): other for other in others}
    return found
