"""Arguments as dataclasses: read from flags or from one YAML or JSON file, and checked against their types."""

from __future__ import annotations

import contextlib
import json
import math
import types
from dataclasses import fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml

RANGES = {
    "a positive number": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "a number between 0 and 1": lambda x: 0 < x < 1,
    "a number from 0 to 1": lambda x: 0 <= x <= 1,
}


class CheckedArguments:
    """Checks every field against its type, so that a value from a YAML file is as safe as one from a flag."""

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for item in fields(self):
            setattr(self, item.name, _coerce(item.name, getattr(self, item.name), hints[item.name]))

    def require(self, expected: str, *names: str) -> None:
        """Check that numbers, where they are given, lie in the range ``expected`` (a key of RANGES)."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and RANGES[expected](value)):
                _fail(name, value, expected)


def _coerce(name: str, value, hint):
    """``value`` as the type ``hint`` (a class, Literal, list[...] or a union of them), or a ValueError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin = get_origin(option) or option
        if origin is Literal:
            if value in get_args(option):
                return value
        elif origin is float:
            try:  # YAML reads 1e-3 as a string
                return float(value) if not isinstance(value, bool) else _fail(name, value, "a number")
            except (TypeError, ValueError):
                continue
        elif origin is list:
            if isinstance(value, list) and all(isinstance(entry, get_args(option)[0]) for entry in value):
                return value
        elif isinstance(value, origin) and not (isinstance(value, bool) and origin is int):
            return value
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    expected = " or ".join("nothing" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    return _fail(name, value, f"one of {choices}" if choices else expected)


def _fail(name: str, value, expected: str):
    raise ValueError(f"{name}={value!r} is not valid; expected {expected}")


def parse_overrides(text: str) -> dict:
    """'a=1,b=[2,3],c=gelu' as a dict; values are read as YAML."""
    pairs, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            pairs.append("")
        else:
            pairs[-1] += character
    overrides = {}
    for pair in filter(None, map(str.strip, pairs)):
        key, equals, value = pair.partition("=")
        if not (key.isidentifier() and equals and value):
            raise ValueError(
                f"config_overrides={text!r}: {pair!r} is not key=value; write e.g. hidden_size=64,dropout=0.1"
            )
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string
                parsed = float(parsed)
        overrides[key] = parsed
    return overrides


def read_mapping(path: Path) -> dict:
    """The arguments that a YAML or JSON file holds."""
    if path.suffix.lower() not in (".yaml", ".yml", ".json") or not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a flag nor an existing .yaml, .yml or .json file of arguments")
    try:
        content = json.loads(path.read_text()) if path.suffix.lower() == ".json" else yaml.safe_load(path.read_text())
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be parsed: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a mapping of argument names to values")
    return content
