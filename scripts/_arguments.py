"""Arguments of finetune.py: one dataclass per concern, read from flags or from one YAML or JSON file, and checked."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.hf_argparser import HfArg, HfArgumentParser

from _parsing import CheckedArguments, parse_overrides, read_mapping
from hf_rps import RPSConfig

DIGITS = "sklearn/digits"
TASKS = (
    "text-classification",
    "token-classification",
    "image-classification",
    "causal-lm",
    "masked-lm",
    "seq2seq",
    "feature-extraction",
)
FILE_FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
_REGEX = set("*+?()[]{}|\\^$")
# arguments that a resumed run may change without becoming another run
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "dataloader_num_workers", "preprocessing_num_workers", "per_device_eval_batch_size", "eval_steps", "save_logits",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
}  # fmt: skip


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
            self.config_overrides = parse_overrides(self.config_overrides or "")


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
    label_column: str | None = HfArg(
        default=None, help="Column of the label, or of each word's label (token-classification); default: inferred."
    )
    target_column: str | None = HfArg(
        default=None, help="Column of the text to write, for seq2seq; nested ones as translation.de; default: inferred."
    )
    source_prefix: str = HfArg(default="", help="Put before every source text of seq2seq, e.g. 'summarize: ' for T5.")
    streaming: bool = HfArg(
        default=False, help="Read the training data while training, in its own order; needs --max_train_steps."
    )
    shuffle_buffer_size: int = HfArg(
        default=0, help="With streaming: draw at random from a buffer of so many rows; 0 keeps the order."
    )
    max_train_samples: int | None = HfArg(default=None, help="Train on at most so many samples.")
    max_eval_samples: int | None = HfArg(default=None, help="Validate and test on at most so many each.")
    max_length: int | None = HfArg(
        default=None, help="Truncate texts to so many tokens; default: what model and tokenizer take, <= 512."
    )
    max_target_length: int = HfArg(default=128, help="Truncate the target texts of seq2seq to so many tokens.")
    mlm_probability: float = HfArg(default=0.15, help="Share of the tokens that masked-lm hides.")
    block_size: int | None = HfArg(
        default=None, help="Tokens a block for causal-lm; default: what model and tokenizer take, <= 1024."
    )
    image_size: int | None = HfArg(
        default=None, help="Side of an image in pixels, from scratch; default: the configuration's."
    )
    group_by_length: bool = HfArg(
        default=False, help="Put texts of about one length into a batch: less padding, less time."
    )
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes for tokenization.")
    dataloader_num_workers: int = HfArg(default=0, help="Processes that load batches.")

    def __post_init__(self):
        super().__post_init__()
        counts = ("max_train_samples", "max_eval_samples", "max_length", "block_size", "image_size")
        self.require("a positive number", *counts, "preprocessing_num_workers", "max_target_length")
        self.require("0 or more", "dataloader_num_workers", "shuffle_buffer_size")
        self.require("a number between 0 and 1", "validation_fraction", "mlm_probability")
        if self.streaming and self.dataloader_num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={self.dataloader_num_workers} with streaming: several workers would read "
                f"the stream in another order; give 0 or 1"
            )
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

    task: Literal[TASKS] | None = HfArg(
        default=None, help=f"One of {', '.join(TASKS)} (which learns a --teacher's embeddings)."
    )
    output_dir: str | None = HfArg(
        default=None,
        help="Folder for model/, checkpoints, metrics.jsonl and results.json; must be new or empty. On many nodes one "
        "that all of them share.",
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
    report_to: Literal["tensorboard", "wandb", "all", "none"] = HfArg(
        default="tensorboard", help="Tracker to log to as well; 'all' is every one that is installed."
    )
    predict_with_generate: bool = HfArg(
        default=False, help="With seq2seq: generate when evaluating, for BLEU, chrF and exact matches."
    )
    save_logits: int = HfArg(default=0, help="Save the logits of the first so many test samples to logits.safetensors.")

    def __post_init__(self):
        super().__post_init__()
        if self.task is None or not self.output_dir:
            missing = "task" if self.task is None else "output_dir"
            raise ValueError(f"no {missing} was given; give --task (one of {list(TASKS)}) and --output_dir")
        counts = ("num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "eval_steps", "logging_steps")
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
        self.require("a positive number", *counts, *batches, "learning_rate")
        self.require("0 or more", "seed", "weight_decay", "momentum", "max_grad_norm")
        self.require("0 or more", "warmup_steps", "save_logits")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"output_dir={self.output_dir!r} is a file; name a folder")
        if self.predict_with_generate and self.task != "seq2seq":
            raise ValueError(f"predict_with_generate is for --task seq2seq, and the task is {self.task}; leave it out")


@dataclass
class CheckpointArguments(CheckedArguments):
    """Checkpoints to resume from, and which of them becomes the model."""

    save_steps: int | None = HfArg(
        default=None, help="Save a checkpoint every so many optimizer steps; one is saved on SIGTERM and Ctrl-C anyway."
    )
    save_total_limit: int = HfArg(default=2, help="Keep so many checkpoints, the newest, and the best one besides.")
    resume: bool = HfArg(
        default=False, help="Continue from the newest checkpoint in output_dir; from the start if it has none."
    )
    load_best_model_at_end: bool = HfArg(
        default=False, help="Save a checkpoint at every best validation, and take the best one as the result."
    )
    metric_for_best_model: str = HfArg(default="loss", help="Validation metric that tells which model is best.")
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many validations in a row without a better one; the best one is the result."
    )

    def __post_init__(self):
        super().__post_init__()
        self.require("a positive number", "save_steps", "save_total_limit", "early_stopping_patience")

    @property
    def keep_best(self) -> bool:
        """Whether the best checkpoint becomes the result, and not the last."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None


@dataclass
class DistillationArguments(CheckedArguments):
    """Learn from a teacher. Weights of the terms of the loss; terms of weight 0 cost nothing."""

    teacher: str | None = HfArg(default=None, help="Checkpoint whose outputs the model learns to reproduce.")
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the teacher.")
    distill_temperature: float = HfArg(default=2.0, help="Temperature of both models' logits.")
    distill_alpha: float = HfArg(default=0.5, help="Weight of the teacher's logits; the labels have what is left of 1.")
    distill_hidden_states: float = HfArg(
        default=0.0, help="Weight of the hidden states' mean squared error; hidden sizes must be equal."
    )
    distill_attentions: float = HfArg(
        default=0.0, help="Weight of the attention weights' squared error; numbers of heads must be equal."
    )

    def __post_init__(self):
        super().__post_init__()
        self.require("a positive number", "distill_temperature")
        self.require("a number from 0 to 1", "distill_alpha")
        self.require("0 or more", "distill_hidden_states", "distill_attentions")
        given = [name for name in ("distill_hidden_states", "distill_attentions") if getattr(self, name)]
        if given and not self.teacher:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} was given without a teacher; give --teacher")


@dataclass
class HubArguments(CheckedArguments):
    """Publishing. The token is the one of `hf auth login`, or HF_TOKEN."""

    push_to_hub: bool = HfArg(default=False, help="Push the model, its card and its tokenizer when training is over.")
    hub_model_id: str | None = HfArg(default=None, help="Repository, user/name; default: the output folder's name.")
    hub_private_repo: bool = HfArg(default=False, help="Make the repository private, if it is new.")
    hub_revision: str | None = HfArg(default=None, help="Branch to push to; made if it does not exist.")


@dataclass
class RPSArguments(CheckedArguments):
    """How far to compress; see hf_rps.RPSConfig."""

    mode: Literal["rps", "dense", "magnitude"] = HfArg(
        default="rps", help="Share parameters; or the baselines: the dense model, or one pruned by magnitude."
    )
    ratio: float = HfArg(
        default=0.1, help="Stored numbers over shared weights, in (0, 1]; with magnitude of the bytes of both."
    )
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
    _check_together(arguments)
    return arguments


def _check_together(arguments: Arguments) -> None:
    model, data, train, checkpoint, distillation, hub, rps = arguments
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
    if train.save_logits and train.task in ("token-classification", "masked-lm", "seq2seq", "feature-extraction"):
        raise ValueError(f"save_logits needs logits of one size, which {train.task} does not have; leave it out")
    if data.streaming and data.dataset_name == DIGITS:
        raise ValueError(f"{DIGITS!r} is held in memory and can't be streamed; leave --streaming out")
    if train.task == "feature-extraction" and not distillation.teacher:
        raise ValueError("feature-extraction learns the embeddings of a teacher; give --teacher")
    if rps.mode == "magnitude" and not model.model_name_or_path:
        raise ValueError("pruning by magnitude needs trained weights; give --model_name_or_path")
    if hub.push_to_hub:  # all that can be known before training is
        hub.hub_model_id = hub.hub_model_id or Path(train.output_dir).absolute().name
        try:
            validate_repo_id(hub.hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={hub.hub_model_id!r} can't be a name on the Hub: {error}") from error
        if get_token() is None:
            raise ValueError("push_to_hub needs a token; log in with `hf auth login`, or set HF_TOKEN")
    output = Path(train.output_dir)
    if output.is_dir() and any(output.iterdir()) and not (train.overwrite_output_dir or checkpoint.resume):
        raise ValueError(
            f"output_dir={train.output_dir!r} exists and is not empty; continue it with --resume, name another folder, "
            f"or give --overwrite_output_dir"
        )
    if train.overwrite_output_dir and checkpoint.resume:
        raise ValueError("--resume continues what --overwrite_output_dir deletes; give one of them")
