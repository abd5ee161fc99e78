"""Where a run is: what a checkpoint holds besides the model, the optimizer and the generators."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class State:
    """Where a run is; saved with every checkpoint.

    Attributes:
        step: Optimizer steps done.
        epoch, position: The epoch, and how many of its samples were seen.
        seconds: Time spent in steps.
        losses: Of the steps since the last log entry.
        epoch_losses: Of the logged steps of this epoch.
        evaluated: The last step that was evaluated, and its metrics.
        best: The best value of the metric, its step, and all metrics there.
        worse: Evaluations since then.
        rows: Rows of the history. A row of this very step may be missing or there: it is written after the checkpoint.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    evaluated: tuple[int, dict] = (-1, {})
    best: tuple[float, int, dict] | None = None
    worse: int = 0
    rows: int = 0
