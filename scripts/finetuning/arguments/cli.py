"""All arguments of a run, read from the command line or a file, and checked against each other."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, get_type_hints

from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.hf_argparser import HfArgumentParser

from finetuning.arguments.data import DIGITS, FILE_FORMATS, DataArguments
from finetuning.arguments.model import HubArguments, ModelArguments, RPSArguments
from finetuning.arguments.parsing import read_mapping
from finetuning.arguments.training import ITSELF, CheckpointArguments, DistillationArguments, TrainArguments


class Arguments(NamedTuple):
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    checkpoint: CheckpointArguments
    distillation: DistillationArguments
    hub: HubArguments
    rps: RPSArguments

    def as_dict(self) -> dict[str, dict]:
        return {type(part).__name__: asdict(part) for part in self}


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read flags (default: the command line), which may follow a YAML or JSON file and then take precedence, and check
    them.

    Raises:
        ValueError: A value is of the wrong type or out of range, or two do not fit; with the remedy.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        tuple(get_type_hints(Arguments).values()),
        description="Fine-tune, or train from scratch, a transformers model: dense or compressed with RPS. All "
        "arguments may come from a YAML or JSON file, and flags after it change them: finetune.py config.yaml --seed 1",
        allow_abbrev=False,
    )
    given = {}
    if argv and not argv[0].startswith("-"):
        given, argv = read_mapping(Path(argv[0])), argv[1:]
    for action in parser._actions:  # so that only what is given comes out; the defaults are the dataclasses' own
        action.default = argparse.SUPPRESS
    arguments = Arguments(*parser.parse_dict(given | vars(parser.parse_args(argv))))
    _check_data(arguments)
    _check_training(arguments)
    _check_hub(arguments)
    _check_output(arguments)
    return arguments


def _check_data(arguments: Arguments) -> None:
    """Whether the task can read these data, in the way that is asked for."""
    model, data, train = arguments.model, arguments.data, arguments.train
    images, file = train.task == "image-classification", data.train_file
    if images and file:
        raise ValueError(f"{train.task} can't read train_file={file!r}; give --data_dir or --dataset_name")
    if not images and (data.data_dir or data.dataset_name == DIGITS):
        raise ValueError(
            f"{data.data_dir or DIGITS!r} holds images, and --task is {train.task}; give image-classification"
        )
    labelled = train.task in ("text-classification", "token-classification", "seq2seq")
    if labelled and file and FILE_FORMATS[Path(file).suffix.lower()] == "text":
        raise ValueError(f"train_file={file!r} has no labels; {train.task} needs csv, json or parquet")
    if not images and model.model_type and not model.tokenizer_name:
        raise ValueError(f"--model_type {model.model_type} brings no tokenizer; give --tokenizer_name (or 'bytes')")
    if data.streaming and not train.max_train_steps:
        raise ValueError("a stream has no known length; with --streaming give --max_train_steps")
    if data.group_by_length and (images or data.streaming):
        raise ValueError("group_by_length needs texts that are all there; leave it out for images and streams")
    if data.streaming and data.dataset_name == DIGITS:
        raise ValueError(f"{DIGITS!r} is held in memory and can't be streamed; leave --streaming out")


def _check_training(arguments: Arguments) -> None:
    """Whether the task has what its loss and its outputs need."""
    train = arguments.train
    if train.save_logits and train.task in ("token-classification", "masked-lm", "seq2seq", "feature-extraction"):
        raise ValueError(f"save_logits needs logits of one size, which {train.task} does not have; leave it out")
    if train.task == "feature-extraction" and not arguments.distillation.teacher:
        raise ValueError("feature-extraction learns the embeddings of a teacher; give --teacher")
    rps, pretrained = arguments.rps, arguments.model.model_name_or_path
    if rps.mode == "magnitude" and not pretrained:
        raise ValueError("pruning by magnitude needs trained weights; give --model_name_or_path")
    if rps.mode == "frozen" and not pretrained:
        raise ValueError("mode='frozen' keeps weights that are trained; give --model_name_or_path")
    if rps.mode == "rps" and rps.config(train.optimizer).is_learned and not pretrained:
        raise ValueError(
            f"mapping={rps.mapping!r} is learned from trained weights; give --model_name_or_path, or train from "
            f"scratch with --mapping fold"
        )
    _resolve_teacher(arguments.model, arguments.distillation)


def _resolve_teacher(model: ModelArguments, distillation: DistillationArguments) -> None:
    """The name of the teacher that is the model itself."""
    if distillation.teacher != ITSELF:
        return
    if not model.model_name_or_path:
        raise ValueError(
            f"teacher={ITSELF!r} without --model_name_or_path: a model that is trained from scratch knows nothing to "
            f"teach; name a trained --teacher"
        )
    if distillation.teacher_revision:
        raise ValueError(
            f"teacher_revision={distillation.teacher_revision!r} with teacher={ITSELF!r}, which is that of "
            f"--model_revision; leave it out, or name the teacher"
        )
    distillation.teacher, distillation.teacher_revision = model.model_name_or_path, model.model_revision


def _check_hub(arguments: Arguments) -> None:
    """Whether a push can succeed, as far as that can be known before training."""
    hub = arguments.hub
    if not hub.push_to_hub:
        return
    hub.hub_model_id = hub.hub_model_id or Path(arguments.train.output_dir).absolute().name
    try:
        validate_repo_id(hub.hub_model_id)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id={hub.hub_model_id!r} can't be a name on the Hub: {error}") from error
    if get_token() is None:
        raise ValueError("push_to_hub needs a token; log in with `hf auth login`, or set HF_TOKEN")


def _check_output(arguments: Arguments) -> None:
    """Whether the output folder may be written to."""
    train, resume = arguments.train, arguments.checkpoint.resume
    output = Path(train.output_dir)
    if output.is_dir() and any(output.iterdir()) and not (train.overwrite_output_dir or resume):
        raise ValueError(
            f"output_dir={train.output_dir!r} exists and is not empty; continue it with --resume, name another folder, "
            f"or give --overwrite_output_dir"
        )
    if train.overwrite_output_dir and resume:
        raise ValueError("--resume continues what --overwrite_output_dir deletes; give one of them")
