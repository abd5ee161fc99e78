"""Does a function that is given to ``model.apply`` draw weights? Its name tells, or its code."""

from __future__ import annotations

import dis
import functools
import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType

from torch import nn

# init, init_weights, _initialize_weights, weights_init, xavier_weight_init, reset_parameters; not _init_hooks
_NAME = re.compile(
    r"_*(re)?init(iali[sz]er?)?|\w*init(iali[sz]e)?_*(weight|param(eter)?)\w*|\w*(weight|param(eter)?)s?_*(re)?init\w*"
    r"|_*reset_parameters"
)
_DRAWS = frozenset(
    {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    | {name for name in dir(nn.init) if name.startswith(("xavier_", "kaiming_"))}  # the old ones without "_"
    | {"normal_", "uniform_", "zero_", "fill_", "copy_", "bernoulli_", "log_normal_", "cauchy_", "random_"}
)
_WEIGHTS = frozenset({"weight", "parameters", "named_parameters"})
_DEPTH = 2  # how far calls of other functions are followed


def is_initialiser(function: Callable) -> bool:
    """True where ``function`` (of a module) is an initialiser of weights, as far as its name and its code tell.

    By its code: it reads ``weight`` or ``parameters()`` and calls an in-place initialiser (``nn.init.normal_``,
    ``tensor.normal_``), assigns to ``weight`` or ``.data``, or calls ``reset_parameters``; itself, or in functions that
    it calls by name.
    """
    return any(_NAME.fullmatch(f.__name__) or _draws(f.__code__) for f in _functions(function, _DEPTH))


def _functions(function, depth: int) -> Iterator[FunctionType]:
    """The Python function behind ``function``, and those that it calls by name, ``depth`` calls deep."""
    if isinstance(function, functools.partial):
        yield from _functions(function.func, depth)
    elif isinstance(function, MethodType):
        yield from _functions(function.__func__, depth)
        for name in function.__func__.__code__.co_names if depth else ():  # its own methods
            if isinstance(method := getattr(type(function.__self__), name, None), FunctionType):
                yield from _functions(method, depth - 1)
    elif isinstance(function, FunctionType):
        yield function
        known = function.__globals__ | _enclosed(function)
        for name in (*function.__code__.co_names, *function.__code__.co_freevars) if depth else ():
            if isinstance(called := known.get(name), (FunctionType, functools.partial)):
                yield from _functions(called, depth - 1)
    elif isinstance(method := vars(type(function)).get("__call__"), FunctionType):  # an object that can be called
        yield from _functions(MethodType(method, function), depth)


def _enclosed(function: FunctionType) -> dict:
    """The variables that ``function`` takes from the functions around it, those that have a value."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {}
    for name, cell in cells:
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return values


def _draws(code: CodeType) -> bool:
    """True where ``code``, or a function or comprehension inside it, initialises a weight."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = {*code.co_names}
    for constant in code.co_consts:  # getattr(module, "weight"), for name in ("weight", "bias")
        names |= {constant} if isinstance(constant, str) else {*constant} if isinstance(constant, tuple) else set()
    for constant in inner:
        names |= {*constant.co_names}
    assigned = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    reads = not _WEIGHTS.isdisjoint(names)
    writes = not _DRAWS.isdisjoint(names) or "data" in assigned
    if (reads and writes) or "weight" in assigned or "reset_parameters" in names:
        return True
    return any(_draws(constant) for constant in inner)
