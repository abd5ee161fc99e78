"""Normalisation layers without their statistics, for SynFlow's positive network.

LayerNorm subtracts the mean and divides by the scale of its input, so the output of a network of them says nothing of
how much flows through it. BatchNorm in eval mode at initialisation is |γ| · x + |β| already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

_NORM = re.compile(r".*(Batch|Group|Instance|Layer|RMS)Norm(\dd)?")  # of transformers there is one per model


def is_norm(module: nn.Module) -> bool:
    """True for the norms of torch and of transformers' models, by the names of their classes."""
    return not module._modules and any(_NORM.fullmatch(kind.__name__) for kind in type(module).__mro__)


def scale_and_shift(module: nn.Module, x: Tensor) -> Tensor:
    """|γ| · x + |β| for a norm's weight γ and bias β, where it has them; over channels, the second axis, or the last.

    A weight of zeros is that of a norm that multiplies by 1 + weight, like Gemma's.
    """
    over_channels = (
        isinstance(module, nn.GroupNorm)
        or getattr(module, "data_format", None) == "channels_first"
        or re.search(r"(Batch|Instance)Norm|\dd$", type(module).__name__) is not None
    )

    def broadcast(parameter: Tensor) -> Tensor:
        return parameter.abs().view(-1, *[1] * (x.ndim - 2)) if over_channels else parameter.abs()

    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        x = x * broadcast(weight if weight.any() else weight + 1)
    return x if bias is None else x + broadcast(bias)


@contextmanager
def norms_without_statistics(model: nn.Module) -> Iterator[None]:
    """Within the context all norms of ``model`` compute :func:`scale_and_shift`; they are put back at its end."""
    norms = [module for module in model.modules() if is_norm(module)]
    own = {module: module.__dict__["forward"] for module in norms if "forward" in module.__dict__}
    try:
        for module in norms:
            module.forward = partial(scale_and_shift, module)
        yield
    finally:
        for module in norms:
            module.__dict__.pop("forward", None)
            if module in own:
                module.forward = own[module]
