"""Where a run is, and under which names a checkpoint holds its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from accelerate import Accelerator


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


def keep_plain_names(accelerator: Accelerator) -> None:
    """Save weights under the model's own names, whatever wraps it: another number of processes can then load them."""

    def unwrap_weights(models: list, weights: list, folder: str) -> None:
        if weights:  # FSDP and DeepSpeed save their own
            weights[:] = [accelerator.unwrap_model(model, keep_torch_compile=False).state_dict() for model in models]

    def unwrap_models(models: list, folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]

    accelerator.register_save_state_pre_hook(unwrap_weights)
    accelerator.register_load_state_pre_hook(unwrap_models)
