"""Arguments of finetune.py: one dataclass per concern, read from flags or from one YAML or JSON file, and checked."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArg, HfArgumentParser

from hf_rps import RPSConfig

DIGITS = "sklearn/digits"
TASKS = ("text-classification", "image-classification", "causal-lm")
FILE_FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
_REGEX = set("*+?()[]{}|\\^$")


class CheckedArguments:
    """Checks every field against its type, so that a value from a YAML file is as safe as one from a flag."""

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for item in fields(self):
            setattr(self, item.name, _coerce(item.name, getattr(self, item.name), hints[item.name]))


def _coerce(name: str, value, hint):
    """``value`` as the type ``hint`` (a class, Literal, list[...] or a union of them), or a ValueError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin = get_origin(option) or option
        if origin is Literal:
            if value in get_args(option):
                return value
        elif origin is float:
            try:  # YAML reads 1e-3 as a string
                return float(value) if not isinstance(value, bool) else _fail(name, value, "a number")
            except (TypeError, ValueError):
                continue
        elif origin is list:
            if isinstance(value, list) and all(isinstance(entry, get_args(option)[0]) for entry in value):
                return value
        elif isinstance(value, origin) and not (isinstance(value, bool) and origin is int):
            return value
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    expected = " or ".join("nothing" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    return _fail(name, value, f"one of {choices}" if choices else expected)


def _fail(name: str, value, expected: str):
    raise ValueError(f"{name}={value!r} is not valid; expected {expected}")


_RANGES = {
    "a positive number": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "a number between 0 and 1": lambda x: 0 < x < 1,
}


def _require(arguments, expected: str, *names: str) -> None:
    """Check that numbers, where they are given, lie in the range ``expected`` (a key of _RANGES)."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and _RANGES[expected](value)):
            _fail(name, value, expected)


@dataclass
class ModelArguments(CheckedArguments):
    """Which model: a checkpoint to fine-tune, or a configuration to train from scratch."""

    model_name_or_path: str | None = HfArg(default=None, help="Checkpoint to fine-tune, dense or RPS.")
    config_name: str | None = HfArg(
        default=None, help="Configuration (Hub id, folder or config.json) of a model to train from scratch."
    )
    model_type: str | None = HfArg(
        default=None, help="Model type (vit, gpt2, bert, ...) to train from scratch with its default sizes."
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, as key=value,key=value (in YAML also a mapping)."},
    )
    tokenizer_name: str | None = HfArg(
        default=None, help="Tokenizer, if not the model's; 'bytes' is a byte-level one that needs no files."
    )
    image_processor_name: str | None = HfArg(
        default=None, help="Image processor, if not the model's. From scratch: resize and scale to [-1, 1]."
    )
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the checkpoint.")
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Replace a head of another size than the number of labels by a fresh one."
    )

    def __post_init__(self):
        super().__post_init__()
        sources = ("model_name_or_path", "config_name", "model_type")
        given = [name for name in sources if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"got {' and '.join(given) or 'no model'}; give exactly one of --model_name_or_path (fine-tune a "
                f"checkpoint), --config_name or --model_type (train from scratch)"
            )
        if not isinstance(self.config_overrides, dict):
            self.config_overrides = _parse_overrides(self.config_overrides or "")


def _parse_overrides(text: str) -> dict:
    """'a=1,b=[2,3],c=gelu' as a dict; values are read as YAML."""
    pairs, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            pairs.append("")
        else:
            pairs[-1] += character
    overrides = {}
    for pair in filter(None, map(str.strip, pairs)):
        key, equals, value = pair.partition("=")
        if not (key.isidentifier() and equals and value):
            raise ValueError(
                f"config_overrides={text!r}: {pair!r} is not key=value; write e.g. hidden_size=64,dropout=0.1"
            )
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string
                parsed = float(parsed)
        overrides[key] = parsed
    return overrides


@dataclass
class DataArguments(CheckedArguments):
    """Which data, and what its columns mean."""

    dataset_name: str | None = HfArg(
        default=None, help=f"Dataset on the Hub, a folder, or '{DIGITS}' (real 8x8 images, no download)."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset.")
    train_file: str | None = HfArg(
        default=None, help=f"Training file; its extension tells the format: {', '.join(FILE_FORMATS)}."
    )
    validation_file: str | None = HfArg(default=None, help="Validation file, like train_file.")
    test_file: str | None = HfArg(default=None, help="Test file, like train_file.")
    data_dir: str | None = HfArg(
        default=None, help="Folder of images, one subfolder per class (optionally under train/, test/)."
    )
    train_split: str | None = HfArg(default=None, help="Name of the training split; default: inferred.")
    validation_split: str | None = HfArg(
        default=None, help="Name of the validation split; default: inferred, else cut from training."
    )
    test_split: str | None = HfArg(default=None, help="Name of the test split; default: inferred.")
    validation_fraction: float = HfArg(
        default=0.1, help="Share of the training split to validate on, if there is no validation split."
    )
    text_column: str | None = HfArg(default=None, help="Column of the text; default: inferred.")
    text_pair_column: str | None = HfArg(
        default=None, help="Column of the second text, for tasks on pairs; default: inferred."
    )
    image_column: str | None = HfArg(default=None, help="Column of the image; default: inferred.")
    label_column: str | None = HfArg(default=None, help="Column of the label; default: inferred.")
    max_train_samples: int | None = HfArg(default=None, help="Train on at most so many samples.")
    max_eval_samples: int | None = HfArg(default=None, help="Validate and test on at most so many each.")
    max_length: int | None = HfArg(
        default=None, help="Truncate texts to so many tokens; default: what model and tokenizer take, <= 512."
    )
    block_size: int | None = HfArg(
        default=None, help="Tokens a block for causal-lm; default: what model and tokenizer take, <= 1024."
    )
    image_size: int | None = HfArg(
        default=None, help="Side of an image in pixels, from scratch; default: the configuration's."
    )
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes for tokenization.")
    dataloader_num_workers: int = HfArg(default=0, help="Processes that load batches.")

    def __post_init__(self):
        super().__post_init__()
        counts = ("max_train_samples", "max_eval_samples", "max_length", "block_size", "image_size")
        _require(self, "a positive number", *counts, "preprocessing_num_workers")
        _require(self, "0 or more", "dataloader_num_workers")
        _require(self, "a number between 0 and 1", "validation_fraction")
        given = [name for name in ("dataset_name", "train_file", "data_dir") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"got {' and '.join(given) or 'no data'}; give exactly one of --dataset_name, --train_file (with "
                f"--validation_file, --test_file) and --data_dir"
            )
        formats = {}
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is None:
                continue
            if not self.train_file:
                raise ValueError(f"{name}={path!r} was given without train_file; give --train_file too")
            if Path(path).suffix.lower() not in FILE_FORMATS:
                raise ValueError(f"{name}={path!r} has an unknown extension; expected one of {list(FILE_FORMATS)}")
            if not Path(path).is_file():
                raise ValueError(f"{name}={path!r} does not exist or is not a file; check the path")
            formats[path] = Path(path).suffix.lower()
        if len(set(formats.values())) > 1:
            raise ValueError(f"the data files have different formats: {formats}; convert them to one")
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise ValueError(f"data_dir={self.data_dir!r} does not exist or is not a folder; check the path")


@dataclass
class TrainArguments(CheckedArguments):
    """What to train for, how, and where the results go."""

    task: Literal["text-classification", "image-classification", "causal-lm"] | None = HfArg(
        default=None, help=f"One of {', '.join(TASKS)}."
    )
    output_dir: str | None = HfArg(
        default=None, help="Folder for model/, metrics.jsonl and results.json; must be new or empty."
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Replace an earlier run in output_dir.")
    seed: int = HfArg(default=0, help="Seed of initialisation, data order and dropout.")
    num_train_epochs: int = HfArg(default=3, help="Passes over the training data.")
    max_train_steps: int | None = HfArg(default=None, help="Stop after so many optimizer steps.")
    per_device_train_batch_size: int = HfArg(default=8, help="Training samples a process and a pass.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation samples a process and a pass.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Passes an optimizer step.")
    optimizer: Literal["adamw", "sgd"] = HfArg(default="adamw", help="AdamW, or SGD with momentum.")
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Weight decay of all but biases and norms.")
    momentum: float = HfArg(default=0.9, help="Momentum of SGD.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient to this norm; 0 turns it off.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = HfArg(
        default="linear", help="Shape of the learning rate after warmup."
    )
    warmup_steps: float = HfArg(default=0.0, help="Optimizer steps of linear warmup; below 1 a fraction of all steps.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = HfArg(
        default=None, help="Compute dtype of autocast; default: as accelerate is configured."
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="Recompute activations in the backward pass: less memory, more time."
    )
    torch_compile: bool = HfArg(default=False, help="Compile the model with torch.compile (inductor).")
    ddp_find_unused_parameters: bool = HfArg(
        default=False, help="With several processes: allow parameters that a pass does not use."
    )
    eval_steps: int | None = HfArg(
        default=None, help="Evaluate every so many optimizer steps as well as after every epoch."
    )
    logging_steps: int = HfArg(default=10, help="Optimizer steps between log entries, and between checks of the loss.")
    report_to: Literal["none", "tensorboard"] = HfArg(default="none", help="Tracker to log to as well.")
    save_logits: int = HfArg(default=0, help="Save the logits of the first so many test samples to logits.safetensors.")

    def __post_init__(self):
        super().__post_init__()
        if self.task is None or not self.output_dir:
            missing = "task" if self.task is None else "output_dir"
            raise ValueError(f"no {missing} was given; give --task (one of {list(TASKS)}) and --output_dir")
        counts = ("num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "eval_steps", "logging_steps")
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
        _require(self, "a positive number", *counts, *batches, "learning_rate")
        _require(self, "0 or more", "seed", "weight_decay", "momentum", "max_grad_norm")
        _require(self, "0 or more", "warmup_steps", "save_logits")
        output = Path(self.output_dir)
        if output.exists() and not output.is_dir():
            raise ValueError(f"output_dir={self.output_dir!r} is a file; name a folder")
        if output.is_dir() and any(output.iterdir()) and not self.overwrite_output_dir:
            raise ValueError(
                f"output_dir={self.output_dir!r} exists and is not empty; name another folder or give "
                f"--overwrite_output_dir"
            )


@dataclass
class RPSArguments(CheckedArguments):
    """How far to compress; see hf_rps.RPSConfig."""

    mode: Literal["rps", "dense"] = HfArg(default="rps", help="Share parameters, or train the dense model.")
    ratio: float = HfArg(default=0.1, help="Stored numbers over shared weights, in (0, 1].")
    rps_seed: int = HfArg(default=0, help="Seed of the mapping of weights to stored numbers.")
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "help": "Modules to share: names, one regex, 'all-linear'; default: attention and MLP.",
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"nargs": "+", "help": "Names, or one regex, of modules to leave dense."}
    )
    sharing: Literal["global", "block", "module"] = HfArg(
        default="global", help="What shares one array: the whole model, each block, or each module."
    )
    mapping: Literal["fold", "roast", "hash"] = HfArg(
        default="fold", help="RANDOMFOLD; roast and hash are slow forms, for comparison."
    )
    sign: Literal["row", "element", "none"] = HfArg(default="row", help="Random signs: a row, a weight, none.")
    grad_scaling: Literal["auto", "projection", "norm", "none"] = HfArg(
        default="auto", help="Divisor of the shared gradient; auto: norm with AdamW, projection with SGD."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1 and (value[0] == "all-linear" or _REGEX & set(value[0])):
                setattr(self, name, value[0])
        self.config("adamw")

    def config(self, optimizer: str) -> RPSConfig:
        """The RPSConfig for training with ``optimizer``. Adam-like optimizers want gradients of the usual size."""
        automatic = "projection" if optimizer == "sgd" else "norm"
        return RPSConfig(
            ratio=self.ratio,
            seed=self.rps_seed,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            sharing=self.sharing,
            mapping=self.mapping,
            sign=self.sign,
            grad_scaling=automatic if self.grad_scaling == "auto" else self.grad_scaling,
        )


Arguments = tuple[ModelArguments, DataArguments, TrainArguments, RPSArguments]


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read flags, or the one YAML or JSON file that ``argv`` (default: the command line) names, and check them.

    Raises:
        ValueError: A value is of the wrong type or out of range, or two do not fit; with the remedy.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainArguments, RPSArguments),
        description="Fine-tune, or train from scratch, a transformers model: dense or compressed with RPS. All "
        "arguments may instead come from one YAML or JSON file: finetune.py config.yaml",
        allow_abbrev=False,
    )
    if len(argv) == 1 and not argv[0].startswith("-"):
        model, data, train, rps = parser.parse_dict(_read_mapping(Path(argv[0])))
    else:
        model, data, train, rps = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    _check_together(model, data, train)
    return model, data, train, rps


def _read_mapping(path: Path) -> dict:
    if path.suffix.lower() not in (".yaml", ".yml", ".json") or not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a flag nor an existing .yaml, .yml or .json file of arguments")
    try:
        content = json.loads(path.read_text()) if path.suffix.lower() == ".json" else yaml.safe_load(path.read_text())
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be parsed: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a mapping of argument names to values")
    return content


def _check_together(model: ModelArguments, data: DataArguments, train: TrainArguments) -> None:
    images, file = train.task == "image-classification", data.train_file
    if images and file:
        raise ValueError(f"{train.task} can't read train_file={file!r}; give --data_dir or --dataset_name")
    if not images and (data.data_dir or data.dataset_name == DIGITS):
        raise ValueError(
            f"{data.data_dir or DIGITS!r} holds images, and --task is {train.task}; give image-classification"
        )
    if train.task == "text-classification" and file and FILE_FORMATS[Path(file).suffix.lower()] == "text":
        raise ValueError(f"train_file={file!r} has no labels; text-classification needs csv, json or parquet")
    if not images and model.model_type and not model.tokenizer_name:
        raise ValueError(f"--model_type {model.model_type} brings no tokenizer; give --tokenizer_name (or 'bytes')")
