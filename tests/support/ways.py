"""How a model's weights are read, set by the test that is about it: views of psi, or made for a product."""

from __future__ import annotations

from torch import nn

from hf_rps.products.base import Made, always
from hf_rps.products.views import Views
from hf_rps.psi.array import SharedArray

WAYS = {"views": Views, "made": Made}


def arrays_of(model: nn.Module) -> list[SharedArray]:
    """The shared arrays of a compressed model, or of all its adapters."""
    found = []
    for module in model.modules():
        found += [module.array] if isinstance(getattr(module, "array", None), SharedArray) else []
        found += getattr(module, "arrays", {}).values()
    return found


def read(model: nn.Module, way: str) -> nn.Module:
    """Let every product of ``model`` read its weight by ``way``, whatever is quicker (tiny models make theirs)."""
    arrays = arrays_of(model)
    assert arrays, "the model has no shared array"
    for array in arrays:
        array.choose = always(WAYS[way])
    return model
