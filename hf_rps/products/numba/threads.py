"""Ranges of rows for as many threads as torch may use.

Numba's own parallel loops are of no use beside torch: one of its threading layers ends the process when two Python
threads call at once, another in a forked child. Here kernels run without Python's lock, in the calling thread and in a
few threads that wait for work. Nothing has to be waited for that nobody has begun: whoever calls does that work itself,
so a pool that is busy, or has died in a fork, costs time at most.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

_LEAST = 1 << 20  # weights that a thread must be given: to wake one costs up to 60 µs (docs/design.md)
_RANGES = 4  # for each thread, so that one whose core is taken by others does fewer

Work = Callable[[int, int], None]  # on rows first to stop - 1


class _Pool:
    """The waiting threads of this process, made on first use."""

    def __init__(self):
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def start(self, task: Callable[[], None], times: int) -> list[Future]:
        """Have ``task`` run by up to ``times`` threads; none where no thread can be had."""
        with self._lock:
            try:
                if self._size < times:
                    if self._executor is not None:
                        self._executor.shutdown(wait=False)  # what it has been given is done
                    self._executor, self._size = ThreadPoolExecutor(times, "hf_rps"), times
                return [self._executor.submit(task) for _ in range(times)]
            except RuntimeError:  # the interpreter is ending, or the system gives no more threads
                return []


_pool = _Pool()


def _renew() -> None:
    """Forget threads, and a lock that one of them may have held: a forked child has none of them."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def share_out(work: Work, rows: int, weights: int) -> None:
    """Do ``work`` on all rows, in parallel where that pays; done when this returns.

    Args:
        work: Of a range of rows, not depending on the others. It should give Python's lock back while it runs.
        rows: How many there are.
        weights: What work there is, as numbers to be looked up.
    """
    threads = min(torch.get_num_threads(), rows, weights // _LEAST)
    if threads <= 1:
        work(0, rows)
        return
    size = -(-rows // (threads * _RANGES) // 2) * 2  # kernels do two rows at a time
    ranges = iter([(first, min(rows, first + size)) for first in range(0, rows, size)])

    def help_out() -> None:
        _work_off(work, ranges)

    futures = _pool.start(help_out, threads - 1)
    try:
        _work_off(work, ranges)
    finally:
        for future in futures:
            if not future.cancel():
                future.result()


def _work_off(work: Work, ranges: Iterator[tuple[int, int]]) -> None:
    for first, stop in ranges:  # a list's iterator gives each range to one thread
        work(first, stop)
