"""The runs that are done: one JSON line each, written as they come, so that a study resumes and grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from studies import lines

EMBEDDINGS = "embedding trained"  # how the variant of such a run begins


@dataclass(frozen=True)
class Run:
    """The settings of one run, which name it.

    Attributes:
        stage: What was done: untrained, rates, distilled, arithmetic, finetuned.
        row: A row of the comparison, or a method of fine-tuning.
        steps, rate, seed: Of training.
        variant: What else is not as ever, such as "float32"; a table says it.
        batch_size: Sequences of a training step.
    """

    stage: str
    row: str
    steps: int = 0
    rate: float = 0.0
    seed: int = 0
    variant: str = ""
    batch_size: int = 8


class Runs:
    """Results by run, in a file of JSON lines: a run's settings and what was found."""

    def __init__(self, file: Path):
        self.file, self.results = file, {Run(**record.pop("run")): record for record in lines.read(file)}

    def __call__(self, run: Run, execute: Callable[[], dict]) -> dict:
        """The result of ``run``: the known one, else what ``execute`` returns, which is written down."""
        if run not in self.results:
            result = execute()
            lines.add(self.file, {"run": asdict(run)} | result)
            self.results[run] = result
            print(
                json.dumps(asdict(run) | {k: v for k, v in result.items() if k not in ("losses", "samples")}),
                flush=True,
            )
        return self.results[run]

    def of(self, stage: str, row: str | None = None) -> dict[Run, dict]:
        """Those of one stage and, if it is given, one row."""
        return {r: result for r, result in self.results.items() if r.stage == stage and row in (None, r.row)}
