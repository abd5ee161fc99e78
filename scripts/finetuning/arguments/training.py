"""Arguments that say how to train: the task, the optimizer, checkpoints, and what to learn from a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from finetuning.arguments.parsing import CheckedArguments

TASKS = (
    "text-classification",
    "token-classification",
    "image-classification",
    "causal-lm",
    "masked-lm",
    "seq2seq",
    "feature-extraction",
)

ITSELF = "itself"  # as a teacher


@dataclass
class TrainArguments(CheckedArguments):
    """What to train for, how, and where the results go."""

    task: Literal[TASKS] | None = HfArg(
        default=None, help=f"One of {', '.join(TASKS)} (the last learns a --teacher's embeddings)."
    )
    output_dir: str | None = HfArg(
        default=None,
        help="Folder for model/, checkpoints, metrics.jsonl and results.json; must be new or empty. On many nodes one "
        "that all of them share.",
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Replace an earlier run in output_dir.")
    seed: int = HfArg(default=0, help="Seed of initialisation, data order and dropout.")
    num_train_epochs: int = HfArg(default=3, help="Passes over the training data.")
    max_train_steps: int | None = HfArg(default=None, help="Stop after this many optimizer steps.")
    per_device_train_batch_size: int = HfArg(default=8, help="Training samples per process and pass.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation samples per process and pass.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward and backward passes per optimizer step.")
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
    save_logits: int = HfArg(
        default=0, help="Save the logits of this many test samples, the first ones, to logits.safetensors."
    )

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
    save_total_limit: int = HfArg(default=2, help="Keep this many checkpoints, the newest, and the best one besides.")
    resume: bool = HfArg(
        default=False, help="Continue from the newest checkpoint in output_dir; from the start if it has none."
    )
    load_best_model_at_end: bool = HfArg(
        default=False, help="Save a checkpoint at every best validation, and take the best one as the result."
    )
    metric_for_best_model: str = HfArg(default="loss", help="Validation metric that tells which model is best.")
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after this many validations in a row without a better one; the best one is the result."
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

    teacher: str | None = HfArg(
        default=None,
        help=f"Checkpoint whose outputs the model learns to reproduce; '{ITSELF}' is the one that --model_name_or_path "
        f"names, as it is before it is compressed.",
    )
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the teacher.")
    distill_temperature: float = HfArg(default=2.0, help="Temperature of both models' logits.")
    distill_alpha: float | None = HfArg(
        default=None,
        help=f"Weight of the teacher's logits; the labels have the rest of 1. Default 0.5, of --teacher {ITSELF} 1.",
    )
    distill_hidden_states: float = HfArg(
        default=0.0, help="Weight of the hidden states' mean squared error; hidden sizes must be equal."
    )
    distill_attentions: float = HfArg(
        default=0.0, help="Weight of the attention weights' squared error; numbers of heads must be equal."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.distill_alpha is None:
            self.distill_alpha = 1.0 if self.teacher == ITSELF else 0.5
        self.require("a positive number", "distill_temperature")
        self.require("a number from 0 to 1", "distill_alpha")
        self.require("0 or more", "distill_hidden_states", "distill_attentions")
        given = [name for name in ("distill_hidden_states", "distill_attentions") if getattr(self, name)]
        if given and not self.teacher:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} was given without a teacher; give --teacher")
