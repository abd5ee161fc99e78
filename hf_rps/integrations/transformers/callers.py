"""What transformers knows and does not tell: local variables of those of its functions that call hf_rps.

A quantizer is asked for its part without the arguments of from_pretrained and save_pretrained that matter for it. There
is a test for each variable that is read here. Where one is not found, its default stands.
"""

from __future__ import annotations

import inspect
from typing import Any


def local_of(function: str, name: str, default: Any = None) -> Any:
    """The value of the variable ``name`` in the innermost running call of ``function`` (its bare name)."""
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code.co_name != function or name not in frame.f_locals):
        frame = frame.f_back
    return default if frame is None else frame.f_locals[name]
