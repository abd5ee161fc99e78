"""The model of a run: its configuration, the dense model, and what ``--mode`` makes of it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from finetuning.arguments.cli import Arguments
from finetuning.arguments.model import ModelArguments
from finetuning.calibration import calibration_batches
from finetuning.files import COMPRESSED, save_folder
from finetuning.tasks import TASKS, Data
from hf_rps import RPSConfig, SizeReport, get_rps_model, size_report
from hf_rps.targets import find_targets
from studies.methods.magnitude import prune_by_magnitude

logger = logging.getLogger(__name__)


def load_config(args: ModelArguments):
    """The model's configuration with ``config_overrides`` applied."""
    source = args.model_name_or_path or args.config_name
    if source:
        build = partial(AutoConfig.from_pretrained, source, revision=args.model_revision)
    else:
        build = partial(AutoConfig.for_model, args.model_type)
    config = build()
    unknown = [key for key in args.config_overrides if not hasattr(config, key)]
    if unknown:
        known = sorted(key for key in config.to_dict() if not key.startswith("_"))
        raise ValueError(f"config_overrides names {unknown}, which {config.model_type!r} does not have; it has {known}")
    try:
        return build(**args.config_overrides)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"config_overrides={args.config_overrides} does not fit {config.model_type!r}: {error}"
        ) from error


def load_model(args: ModelArguments, task: str, config) -> nn.Module:
    """The dense model: pretrained, in float32 (autocast casts in the forward pass), or randomly initialised."""
    auto = TASKS[task].auto_class
    if not args.model_name_or_path:
        return auto.from_config(config)
    return auto.from_pretrained(
        args.model_name_or_path,
        config=config,
        revision=args.model_revision,
        dtype=torch.float32,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
    )


def compress(
    model: nn.Module, arguments: Arguments, data: Data, accelerator: Accelerator, is_resumed: bool
) -> tuple[nn.Module, SizeReport]:
    """What ``--mode`` makes of the dense ``model``, mostly in place, and the report of its sizes."""
    args, name, teacher = arguments.rps, arguments.model.model_name_or_path, arguments.distillation
    compressed = size_report(model).n > 0
    if compressed and args.mode != "rps":
        raise ValueError(
            f"model_name_or_path={name!r} is compressed and --mode is {args.mode}; give "
            f"--mode rps to train it as it is, or decompress it with hf_rps.to_dense first"
        )
    if compressed and (teacher.teacher, teacher.teacher_revision) == (name, arguments.model.model_revision):
        raise ValueError(
            f"model_name_or_path={name!r} is compressed already, so that it has nothing to teach itself; name the "
            f"dense checkpoint that it was made from with --teacher"
        )
    # ---- RPS begins
    config = args.config(arguments.train.optimizer)
    if compressed:
        logger.warning("the checkpoint is compressed already: its own ratio and mapping are kept")
    elif args.mode == "rps" and config.is_learned:
        model = _learn(model, config, arguments, data, accelerator, is_resumed)
    elif args.mode == "rps":
        get_rps_model(model, config)
    # ---- RPS ends
    elif args.mode == "magnitude":
        prune_by_magnitude(model, args.ratio, config)
    elif args.mode == "frozen":
        for target in find_targets(model, config):
            target.stored.requires_grad_(False)
    return model, size_report(model)


# ---- RPS, learned


def _learn(
    model: nn.Module, config: RPSConfig, arguments: Arguments, data: Data, accelerator: Accelerator, is_resumed: bool
) -> nn.Module:
    """``model`` with a learned map: learned by one process, read from its file by the others and by a resumed run.

    So all have the same codes to the bit, whatever their devices are and however these round.
    """
    folder, main = Path(arguments.train.output_dir) / COMPRESSED, accelerator.is_main_process

    def learn(temporary: Path) -> None:
        if main:
            batches = calibration_batches(data, arguments.rps.calibration_samples, arguments.train.seed)
            logger.info(f"learning codebooks on {len(batches)} batches of the training data")
            get_rps_model(model.to(accelerator.device), config, batches or None)
            model.cpu().save_pretrained(temporary)

    if not is_resumed:
        save_folder(folder, learn, main, accelerator.wait_for_everyone)
        if main:
            return model
    elif not folder.is_dir():
        raise ValueError(
            f"{folder} is not there, which has the learned map of the run that is to be resumed; put it back, or start "
            f"anew with another --output_dir"
        )
    auto, attention = TASKS[arguments.train.task].auto_class, model.config._attn_implementation
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
