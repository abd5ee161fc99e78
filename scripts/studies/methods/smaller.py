"""A smaller dense model of the same family: the plainest way to have fewer numbers, narrower or less deep."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers import PretrainedConfig

from studies.methods import BudgetError

_SLACK = 1.25  # a model with more than this many times the wanted parameters is no answer
_HEAD = 2  # smallest size of an attention head
_CHANNELS = 4  # fewest channels of a convolution: a ResNet's bottleneck divides them by 4
_SCALED = ("intermediate_size", "n_inner", "embedding_size", "pooler_output_size")


def count_parameters(build: Callable[[PretrainedConfig], nn.Module], config: PretrainedConfig) -> int:
    """How many parameters ``build(config)`` has, tied ones once. Nothing is allocated: it is built on meta."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(copy.deepcopy(config)).parameters())


def smaller_config(
    build: Callable[[PretrainedConfig], nn.Module], config: PretrainedConfig, parameters: int, how: str
) -> PretrainedConfig:
    """The config of the same family whose model has as near as possible to ``parameters`` parameters in all.

    "width" scales the hidden size and the MLP's (``intermediate_size`` or ``n_inner``; None, a multiple of the hidden
    size, stays None), or the ``embedding_size`` and ``hidden_sizes`` of a ResNet, by one factor. The number of heads
    stays, so that the hidden size is a multiple of it (heads of an even size where positions are rotary); only below
    two numbers per head are there fewer heads, of two. Key-value heads keep their share of the heads as far as that
    divides. A ResNet's sizes are at least 4.

    "depth" takes layers away; of a ResNet, block by block from the stage with the most (the last among equals), down to
    one per stage.

    Args:
        build: Config to model, such as ``ViTForImageClassification``.
        config: The largest model considered; it is not changed.
        parameters: Total number wanted. Of two models equally near the smaller is chosen.
        how: "width" or "depth".

    Raises:
        ValueError: ``how`` is unknown; the config does not have the fields to scale.
        BudgetError: The nearest model has over 25 % more than ``parameters``.
    """
    if how not in _CHANGES:
        raise ValueError(f"how={how!r} is not valid; expected one of {list(_CHANGES)}")
    changes = _CHANGES[how](config)  # the numbers of parameters ascend

    @cache
    def count(index: int) -> int:
        return count_parameters(build, _changed(config, changes[index]))

    above = bisect_left(range(len(changes)), parameters, key=count)
    around = [index for index in (above - 1, above) if 0 <= index < len(changes)]
    nearest = min(around, key=lambda index: abs(count(index) - parameters))
    if count(nearest) > _SLACK * parameters:
        raise BudgetError(
            f"{how} can't bring {type(config).__name__} to parameters={parameters:,}: the nearest has "
            f"{count(nearest):,}, and the smallest count that can be reached is {count(0):,}. Ask for more, or scale "
            f"{' or '.join(repr(other) for other in _CHANGES if other != how)} instead."
        )
    return _changed(config, changes[nearest])


def _changed(config: PretrainedConfig, changes: dict) -> PretrainedConfig:
    """A copy with ``changes``, which go through the config's ``attribute_map``: hidden_size is GPT-2's n_embd."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _widths(config: PretrainedConfig) -> list[dict]:
    """What to change for every width, ascending, ``config``'s own last."""
    if _has(config, "hidden_sizes", "embedding_size"):
        sizes = {"hidden_sizes": config.hidden_sizes, "embedding_size": [config.embedding_size]}
        widest = max(config.hidden_sizes)
        scaled = [
            {name: [max(round(s * width / widest), min(s, _CHANNELS)) for s in each] for name, each in sizes.items()}
            for width in range(min(widest, _CHANNELS), widest + 1)
        ]
        return [change | {"embedding_size": change["embedding_size"][0]} for change in scaled]
    if not _has(config, "hidden_size", "num_attention_heads") or not {"intermediate_size", "n_inner"} & _fields(config):
        wanted = "hidden_size, num_attention_heads and intermediate_size or n_inner; or hidden_sizes and embedding_size"
        raise _unknown(config, wanted)
    heads = config.num_attention_heads
    step = heads * (2 if hasattr(config, "rope_parameters") else 1)  # rotary positions turn pairs of numbers
    fewer = [(size, size // _HEAD) for size in range(_HEAD, _HEAD * heads, _HEAD)]
    same = [(size, heads) for size in range(_HEAD * heads, config.hidden_size + 1, step)]
    return [_width(config, size, count) for size, count in fewer + same]


def _width(config: PretrainedConfig, hidden_size: int, heads: int) -> dict:
    """The fields of a transformer of this hidden size and number of heads."""
    factor = hidden_size / config.hidden_size
    change = {"hidden_size": hidden_size, "num_attention_heads": heads}
    for name in _SCALED:
        if getattr(config, name, None) is not None:
            change[name] = max(1, round(getattr(config, name) * factor))
    if getattr(config, "num_key_value_heads", None) is not None:
        most = config.num_key_value_heads * heads // config.num_attention_heads
        change["num_key_value_heads"] = next((k for k in range(most, 0, -1) if heads % k == 0), 1)
    if getattr(config, "head_dim", None) is not None:  # of its own where it is not hidden_size / heads
        pairs = config.head_dim * factor * config.num_attention_heads / heads / 2
        change["head_dim"] = 2 * max(1, round(pairs))
    return change


def _depths(config: PretrainedConfig) -> list[dict]:
    """What to change for every depth, ascending, ``config``'s own last."""
    if _has(config, "depths"):
        depths = [list(config.depths)]
        while max(depths[-1]) > 1:
            last = depths[-1]
            stage = max(range(len(last)), key=lambda i: (last[i], i))
            depths.append([depth - (i == stage) for i, depth in enumerate(last)])
        return [{"depths": each} for each in reversed(depths)]
    if not _has(config, "num_hidden_layers"):
        raise _unknown(config, "num_hidden_layers, or depths")
    kinds = getattr(config, "layer_types", None)  # where layers differ, one name per layer
    return [
        {"num_hidden_layers": depth} | ({"layer_types": kinds[:depth]} if kinds else {})
        for depth in range(1, config.num_hidden_layers + 1)
    ]


def _fields(config: PretrainedConfig) -> set[str]:
    return set(config.to_dict()) | set(config.attribute_map)


def _has(config: PretrainedConfig, *names: str) -> bool:
    return _fields(config).issuperset(names)


def _unknown(config: PretrainedConfig, fields: str) -> ValueError:
    return ValueError(
        f"a {type(config).__name__} does not have the fields to scale: looked for {fields}; it has "
        f"{sorted(_fields(config))}"
    )


_CHANGES = {"width": _widths, "depth": _depths}
