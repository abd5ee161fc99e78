"""Sequences: drawn from a seed, run, and made shorter where they fail."""

from __future__ import annotations

import random
import shutil
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

from sequences.adapters import adapter
from sequences.compression import COMPRESSION
from sequences.containers import wrap
from sequences.models import KINDS
from sequences.operations import ALIKE
from sequences.refusals import refused
from sequences.training import TRAINING
from sequences.world import Ended, World

OPERATIONS = ALIKE | COMPRESSION | TRAINING | {"wrap": wrap, "refused": refused, "adapter": adapter}
_WEIGHTS = {"convert": 3, "step": 2, "save_and_load": 2, "refused": 2, "cast": 2}


class Sequence(NamedTuple):
    """A kind of model and operations, each with the seed of its own choices, so that it can be left out alone."""

    kind: str
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def drawn(cls, seed: int) -> Sequence:
        """Of 3 to 8 operations; most begin with a conversion, soon or later."""
        rng = random.Random(seed)
        names, weights = list(OPERATIONS), [_WEIGHTS.get(name, 1) for name in OPERATIONS]
        chosen = rng.choices(names, weights, k=rng.randint(3, 8))
        if rng.random() < 0.8:
            chosen.insert(rng.choice([0, 0, 0, 1, 2]), "convert")
        return cls(rng.choice(list(KINDS)), tuple((name, rng.randrange(10**6)) for name in chosen[:8]))

    def run(self, folder: Path) -> World:
        """Do all operations and compare after each; ``folder`` is emptied afterwards."""
        world = World(self.kind, folder, random.Random(0))
        try:
            for name, seed in self.steps:
                world.rng = random.Random(seed)
                OPERATIONS[name](world, world.rng)
            world.end()
        except Ended:
            pass
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return world

    def failure(self, folder: Path) -> str | None:
        """What is wrong, in one line with the place, or None."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run(folder)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        return None

    def shortest(self, folder: Path) -> Sequence:
        """A sequence that fails, too, and would not without any one of its operations."""
        failure = self.failure(folder) or ""
        for i in range(len(self.steps)):
            shorter = self._replace(steps=self.steps[:i] + self.steps[i + 1 :])
            if (shorter.failure(folder) or "")[:30] == failure[:30]:
                return shorter.shortest(folder)
        return self
