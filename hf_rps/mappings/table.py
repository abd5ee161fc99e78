"""The table of mappings: config, command line, help and error texts read their choices here."""

from __future__ import annotations

from hf_rps.mappings.base import Mapping
from hf_rps.mappings.codebook import Codebook
from hf_rps.mappings.fold import Fold
from hf_rps.mappings.indexed import Hash, Roast

MAPPINGS: dict[str, type[Mapping]] = {}


def register(mapping: type[Mapping]) -> type[Mapping]:
    """Add a mapping by its ``name``; a class decorator for mappings from outside the library.

    Raises:
        ValueError: Another mapping has that name.
    """
    if MAPPINGS.setdefault(mapping.name, mapping) is not mapping:
        raise ValueError(f"there is a mapping {mapping.name!r} already: {MAPPINGS[mapping.name].__name__}")
    return mapping


for _mapping in (Fold, Roast, Hash, Codebook):
    register(_mapping)
