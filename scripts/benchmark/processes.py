"""A subject in a process of its own: the process's memory, and how the benchmark talks with it.

Processes are forked from a server (multiprocessing's "forkserver") that has done the slow imports and nothing else, so
that each starts in no time and with an allocator that no other subject has used. Where an import starts CUDA (as with
torchao and bitsandbytes installed), which no fork survives, each process imports for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from benchmark.settings import Settings

# Not the benchmark itself: the server does not know where the scripts lie
_PRELOADED = (
    "hf_rps", "peft", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
    "transformers.models.resnet.modeling_resnet",
)  # fmt: skip

for _module in _PRELOADED:
    importlib.import_module(_module)
_METHOD = "spawn" if torch.cuda.is_initialized() else "forkserver"

# What serves a subject: called with settings, gauge and further arguments in the new process, it returns a description
# (to be pickled) and a function that answers requests
Factory = Callable[..., tuple[dict, Callable[[Any], Any]]]


class WorkerError(RuntimeError):
    """A worker raised an exception or died; the message names it and says how."""


class Gauge:
    """Memory of this process over what it held when the gauge was made, bytes.

    On the CPU: resident memory without that of mapped files (the code of libraries). On CUDA: allocated tensors.
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # threads and handles of the BLAS
        self.reset()
        self._before = torch.cuda.memory_allocated() if self._cuda else _status("RssAnon")

    def reset(self) -> None:
        """Start the high-water mark anew, freed memory given back to the system first."""
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def peak(self) -> int:
        """The highest value since the last reset."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._before
        return _status("VmHWM") - _status("RssFile") - _status("RssShmem") - self._before


def _status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def _attempt(function: Callable, *arguments) -> tuple[Any, str | None]:
    """The result of a call, or how it failed."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _serve(connection: Connection, settings: Settings, factory: Factory, arguments: tuple) -> None:
    """Send the description of what ``factory`` makes, then answer requests until the benchmark hangs up."""
    gc.freeze()  # what the imports made is not garbage, and looking through it takes long
    os.dup2(2, 1)  # standard output is for the report; the authors' code prints there
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made, error = _attempt(lambda: factory(settings, Gauge(settings.device), *arguments))
    description, answer = made if made else (None, None)
    connection.send((description, error))
    with contextlib.suppress(EOFError):
        while answer:
            connection.send(_attempt(answer, connection.recv()))


class Worker:
    """The benchmark's end of a process that serves one subject; a context manager.

    Args:
        name: Of the subject, for error messages.
        factory: See :data:`Factory`.
        arguments: Its further arguments.

    Raises:
        WorkerError: The factory raised or the process died.
    """

    def __init__(self, settings: Settings, name: str, factory: Factory, *arguments):
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # the BLAS reads it when the server starts
        context = multiprocessing.get_context(_METHOD)
        if _METHOD == "forkserver":
            context.set_forkserver_preload(list(_PRELOADED))
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, factory, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.description: dict = self._receive()
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def ask(self, request: Any = None) -> Any:
        """The answer to ``request``."""
        with contextlib.suppress(OSError):  # it has died: _receive says so
            self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            killed = ", killed: out of memory?" if code == -9 else ""
            error = f"the process ended with exit status {code}{killed}"
        if error is not None:
            raise WorkerError(f"{self.name}: {error}")
        return result

    def close(self) -> None:
        """Hang up, and wait until the process has ended and its memory is free."""
        self._connection.close()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
