"""Numba's kernels, and doing without them where they can't be had."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

logger = logging.getLogger(__name__)

DISABLE = "HF_RPS_DISABLE_NUMBA"  # set to 1, it keeps Numba out; read once, at the first product of a codebook matrix


@cache
def loaded() -> ModuleType | None:
    """The module of kernels, or None where Numba is not to be used: disabled, not installed, or broken.

    Only the last is worth a warning. Numba is imported here, on first use: it takes a third of a second, and the
    kernels a few seconds where its cache does not have them.
    """
    if os.environ.get(DISABLE) == "1" or find_spec("numba") is None:
        return None
    try:
        if importlib.import_module("numba").config.DISABLE_JIT:  # kernels would run as Python, some of them not at all
            return None
        return importlib.import_module("hf_rps.products.numba.kernels")
    except Exception as error:  # whatever a broken installation or its compiler raises
        logger.warning(
            "the Numba kernels of hf_rps can't be used (%s: %s). torch's own products take over, which are slower for "
            "codebooks on a CPU; set %s=1 to do without Numba knowingly", type(error).__name__, error, DISABLE,
        )  # fmt: skip
        return None
