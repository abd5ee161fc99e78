"""Launching Triton kernels at little cost, and doing without them where they can't be had.

Triton's own launcher looks at every argument anew on each call, to find the variant that was compiled for it. Here a
kernel's variant is found once for a matrix, dtype and device; after that a launch is a call of the compiled function.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from hf_rps import internals

logger = logging.getLogger(__name__)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python, on tensors of any device: for tests
DISABLE = "HF_RPS_DISABLE_TRITON"  # set to 1, it keeps Triton out; read once, at the first product on a GPU
_failures: list[Exception] = []  # the first one only


@cache
def loaded(name: str = "kernels") -> ModuleType | None:
    """A module of kernels, or None where Triton is not to be used: disabled, not to be imported, or failed before."""
    if _failures or os.environ.get(DISABLE) == "1":
        return None
    try:
        return importlib.import_module(f"hf_rps.products.triton.{name}")
    except Exception as error:  # whatever a broken installation raises
        give_up(error)
        return None


def give_up(error: Exception) -> None:
    """Do without Triton from now on, and say so once."""
    if _failures:
        return
    _failures.append(error)
    loaded.cache_clear()
    logger.warning(
        "the Triton kernels of hf_rps can't be used (%s: %s). torch's own products take over, which are slower on a "
        "GPU; set %s=1 to do without Triton knowingly", type(error).__name__, error, DISABLE,
    )  # fmt: skip


class Launcher:
    """A kernel for one matrix, device and combination of dtypes.

    Args:
        kernel: Its arguments are tensors and scalars that change from call to call, and after them what is ``fixed``.
        grid: Numbers of programs.
        fixed: The remaining arguments, tensors first.
        device: Where all tensors are.
        options: Of Triton's compiler.
    """

    __slots__ = ("_device", "_fixed", "_fixed_values", "_function", "_grid", "_kernel", "_options", "_packed", "_run")

    def __init__(self, kernel, grid: tuple[int, int, int], fixed: tuple, device: torch.device, **options):
        self._kernel, self._grid, self._fixed, self._options = kernel, grid, fixed, options
        self._fixed_values = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in fixed)
        self._device = device.index  # None where it is not a GPU, which only the interpreter takes
        self._run = None  # until the variant for aligned tensors is compiled

    def __call__(self, tensors: tuple[Tensor | None, ...], *scalars: int) -> bool:
        """Launch on the current stream of the device, which waits for nothing; the first call compiles.

        Returns:
            True. Where Triton fails, False: nothing was launched, and Triton is not used again.
        """
        try:
            if self._device is None or torch.cuda.current_device() == self._device:
                self._launch(tensors, scalars)
            else:
                with torch.cuda.device(self._device):
                    self._launch(tensors, scalars)
        except Exception as error:  # no compiler, a Triton whose insides changed, a kernel too large for the device
            give_up(error)
            return False
        return True

    def _launch(self, tensors: tuple[Tensor | None, ...], scalars: tuple[int, ...]) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        aligned = not bits % 16
        if aligned and self._run is not None:
            self._run(
                *self._grid, internals.current_stream(self._device), self._function, self._packed, None, None, None,
                *addresses, *scalars, *self._fixed_values,
            )  # fmt: skip
            return
        compiled = self._kernel[self._grid](*tensors, *scalars, *self._fixed, **self._options)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self._function, self._packed, self._run = compiled.function, compiled.packed_metadata, compiled.run
