"""Whether a run can go on from a checkpoint: it must be the same run, but for how it is launched and logged."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from finetuning.arguments.cli import Arguments

logger = logging.getLogger(__name__)

# arguments that a resumed run may change without becoming another run
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "dataloader_num_workers", "preprocessing_num_workers", "per_device_eval_batch_size", "eval_steps", "save_logits",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
}  # fmt: skip
# another value changes what is trained, so that the checkpoint does not fit or stands for something else
_FIXED = ("ModelArguments", "DataArguments", "RPSArguments")


def read_run(checkpoint: Path | None) -> dict:
    """What the checkpoint says of its run; of a run that has none yet, its start."""
    if checkpoint is None:
        return {"step": 0, "epoch": 0, "position": 0, "processes": 0, "arguments": {}}
    return json.loads((checkpoint / "run.json").read_text())


def check_resumable(run: dict, arguments: Arguments, checkpoint: Path | None, processes: int, zero: bool) -> None:
    """Compare the run of a checkpoint with ``arguments``.

    Args:
        run: From :func:`read_run`.
        arguments: Those of this run.
        checkpoint: For the message.
        processes: How many there are now.
        zero: Whether DeepSpeed shards the optimizer's state.

    Raises:
        ValueError: Model, data, compression, task, seed or optimizer are others, or DeepSpeed's shards are of another
            number of processes.
    """
    changed, now = {}, arguments.as_dict()
    for part, values in run["arguments"].items():
        for name, value in values.items():
            if name not in FREE_TO_CHANGE and now[part].get(name) != value:
                changed[name] = (part, value, now[part].get(name))
    fixed = [
        f"{name}={new!r} (it was {old!r})"
        for name, (part, old, new) in changed.items()
        if part in _FIXED or name in ("task", "seed", "optimizer")
    ]
    if fixed:
        raise ValueError(
            f"{checkpoint} is of another run: {', '.join(fixed)}. Give the arguments it was started with, or another "
            f"--output_dir"
        )
    for name, (_, old, new) in changed.items():
        logger.warning(f"resuming with {name}={new!r}, which was {old!r}")
    if checkpoint and run["processes"] != processes:
        if zero:
            raise ValueError(
                f"{checkpoint} was saved by {run['processes']} processes and there are {processes}; DeepSpeed shards "
                f"the optimizer's state by process, so resume with {run['processes']}"
            )
        logger.warning(
            f"{checkpoint.name} was saved by {run['processes']} processes and there are {processes}: no sample is "
            f"skipped or repeated, but the run is not bit-equal to an uninterrupted one"
        )
    if arguments.checkpoint.resume and checkpoint is None:
        logger.warning("there is no checkpoint to resume from, so the run starts at its beginning")


def clear(output: Path, keep_checkpoints: bool) -> None:
    """Make the output folder, and delete what an earlier run left there and this one writes anew."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "logits.safetensors") + (() if keep_checkpoints else ("metrics.jsonl",)):
        (output / name).unlink(missing_ok=True)
    for pattern in ("*.tmp", "checkpoint-*.old") if keep_checkpoints else ("*.tmp", "checkpoint-*"):
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
