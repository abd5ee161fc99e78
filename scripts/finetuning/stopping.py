"""SIGTERM and Ctrl-C, noted for the end of the optimizer step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Signals:
    """Which signal this process got: ``number``, None before there is any."""

    def __init__(self):
        self.number: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the context SIGTERM and Ctrl-C are noted. A second one acts as usual."""

        def note(number, frame) -> None:
            self.number = number
            signal.signal(number, before[number])
            logger.info(
                f"{signal.Signals(number).name}: saving a checkpoint after this step; once more to quit at once"
            )

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
