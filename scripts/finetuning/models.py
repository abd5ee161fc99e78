"""The model of a run: its configuration, the dense model, and what ``--mode`` makes of it."""

from __future__ import annotations

import logging
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from finetuning.arguments.cli import Arguments
from finetuning.arguments.model import ModelArguments
from finetuning.tasks import TASKS
from hf_rps import SizeReport, get_rps_model, size_report
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


def compress(model: nn.Module, arguments: Arguments) -> SizeReport:
    """Turn the dense ``model`` into what ``--mode`` says, in place; returns the report of its sizes."""
    args = arguments.rps
    compressed = size_report(model).n > 0
    if compressed and args.mode != "rps":
        raise ValueError(
            f"model_name_or_path={arguments.model.model_name_or_path!r} is compressed and --mode is {args.mode}; give "
            f"--mode rps to train it as it is, or decompress it with hf_rps.to_dense first"
        )
    # ---- RPS begins
    if compressed:
        logger.warning("the checkpoint is compressed already: its own ratio and mapping are kept")
    elif args.mode == "rps":
        get_rps_model(model, args.config(arguments.train.optimizer))
    # ---- RPS ends
    elif args.mode == "magnitude":
        prune_by_magnitude(model, args.ratio, args.config(arguments.train.optimizer))
    return size_report(model)
