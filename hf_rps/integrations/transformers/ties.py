"""What transformers ties: of a compressed model only weights that are parameters.

All that reads a shared weight is there already (:mod:`hf_rps.tied`), and there is no parameter to tie it to.
"""

from __future__ import annotations

import re

from torch import nn

from hf_rps.layers.base import RPSLayer
from hf_rps.psi.bank import Bank

_CLASS = "_tied_weights_keys"  # of a model class: patterns of what is tied, by patterns of what to


def shared_weights(model: nn.Module) -> dict[str, tuple[Bank, str]]:
    """By the names that they would have as parameters of ``model``, shared weights: the array, and the target of it."""
    return {f"{n}.{m.parameter}": (m.bank, m.name) for n, m in model.named_modules() if isinstance(m, RPSLayer)}


def of_parameters(original):
    """get_expanded_tied_weights_keys of a transformers model, which must not look for weights that are shared."""

    def get_expanded_tied_weights_keys(self, *args, **kwargs):
        shared, patterns = shared_weights(self), getattr(self, _CLASS, None)
        if not shared or not isinstance(patterns, dict):
            return original(self, *args, **kwargs)
        own = self.__dict__.get(_CLASS)
        kept = {
            target: source
            for target, source in patterns.items()
            if not any(re.match(pattern, name) for pattern in (target, source) for name in shared)
        }
        self.__dict__[_CLASS] = kept
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.__dict__[_CLASS]
            if own is not None:
                self.__dict__[_CLASS] = own

    return get_expanded_tied_weights_keys


def looking_first(original):
    """tie_weights of a transformers model: where it is called by itself, what can't be tied is refused."""

    def tie_weights(self, missing_keys=None, recompute_mapping=True):
        if recompute_mapping and missing_keys is None:
            for module in self.modules():
                if hasattr(module, "tie_weights"):
                    _check(module)
        return original(self, missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    return tie_weights


def _check(model: nn.Module) -> None:
    """Raise a ValueError where ``model`` is to tie a shared weight to one that is not the same slice."""
    patterns = getattr(model, _CLASS, None)
    if not isinstance(patterns, dict) or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    shared = shared_weights(model)
    for pair in patterns.items():
        one, other = ({weight for name, weight in shared.items() if re.match(end, name)} for end in pair)
        if (one or other) and not (one == other and len(one) == 1):
            raise ValueError(
                f"tie_weights() would tie {pair[0]!r} to {pair[1]!r}, of which one is made from a shared array by "
                f"itself. Call hf_rps.to_dense(model), tie, and compress with share_embeddings=True; or set "
                f"config.tie_word_embeddings=False to leave them as they are"
            )


def forget(model: nn.Module) -> None:
    """Take shared weights from what ``model`` and the models inside it say is tied."""
    for module in model.modules():
        tied = module.__dict__.get("all_tied_weights_keys")
        if tied:
            shared = shared_weights(module)
            module.all_tied_weights_keys = {n: s for n, s in tied.items() if n not in shared and s not in shared}


def remember(model: nn.Module) -> None:
    """Undo :func:`forget` in a model that is dense again."""
    for module in model.modules():
        if "all_tied_weights_keys" in module.__dict__:
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
