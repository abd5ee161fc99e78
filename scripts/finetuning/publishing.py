"""What a run publishes: the model card with its learning curve, and the push to the Hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import hf_rps
from finetuning.arguments.cli import Arguments
from finetuning.arguments.data import DataArguments
from finetuning.arguments.model import HubArguments
from finetuning.tasks import TASKS
from hf_rps.integrations.model_card import write_model_card

logger = logging.getLogger(__name__)

_CURVE = "learning_curve.png"


def write_card(folder: Path, results: dict, arguments: Arguments, history: list[dict]) -> None:
    """Write README.md and the learning curve of the model in ``folder``."""
    hub, model = arguments.hub, arguments.model
    split = "test" if "test" in results["metrics"] else "validation"
    write_model_card(
        folder,
        model_name=(hub.hub_model_id or arguments.train.output_dir).rstrip("/").split("/")[-1],
        task=TASKS[arguments.train.task].hub_tag,
        dataset=name_of(arguments.data),
        metrics={f"{split}_{name}": value for name, value in results["metrics"][split].items()},
        base_model=model.model_name_or_path,
        teacher=arguments.distillation.teacher,
        learning_curve=_CURVE if draw_learning_curve(folder / _CURVE, history) else None,
        command=results["command"],
    )


def name_of(args: DataArguments) -> str:
    """The data's name for a card; of a local path its last part only."""
    source = args.dataset_name or args.train_file or args.data_dir
    name = Path(source).name if os.path.exists(source) else source
    return f"{name} ({args.dataset_config_name})" if args.dataset_config_name else name


def draw_learning_curve(path: Path, history: list[dict]) -> bool:
    """Draw the losses of training and validation over steps; returns False if there is nothing to draw."""
    import matplotlib.pyplot as plt  # only here: it takes a second

    curves = {
        split: [(row["step"], row["loss"]) for row in history if row["split"] == split]
        for split in ("train", "validation")
    }
    if not any(curves.values()):
        return False
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for split, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=split, marker="." if split == "validation" else None)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def publish(folder: Path, args: HubArguments) -> None:
    """Push the model in ``folder``."""
    commit = hf_rps.push_to_hub(
        folder, args.hub_model_id, private=args.hub_private_repo or None, revision=args.hub_revision
    )
    logger.info(f"pushed to {commit.commit_url}")
