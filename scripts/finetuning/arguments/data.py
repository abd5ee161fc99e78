"""Arguments that say which data, what its columns mean, and how much of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from finetuning.arguments.parsing import CheckedArguments

DIGITS = "sklearn/digits"
FILE_FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip


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
        default=0, help="With streaming: draw at random from a buffer of this many rows; 0 keeps the order."
    )
    max_train_samples: int | None = HfArg(default=None, help="Train on at most this many samples.")
    max_eval_samples: int | None = HfArg(default=None, help="Validate and test on at most this many each.")
    max_length: int | None = HfArg(
        default=None, help="Truncate texts to this many tokens; default: what model and tokenizer take, <= 512."
    )
    max_target_length: int = HfArg(default=128, help="Truncate the target texts of seq2seq to this many tokens.")
    mlm_probability: float = HfArg(default=0.15, help="Share of the tokens that masked-lm hides.")
    block_size: int | None = HfArg(
        default=None, help="Tokens per block for causal-lm; default: what model and tokenizer take, <= 1024."
    )
    image_size: int | None = HfArg(
        default=None, help="Side of an image in pixels, from scratch; default: the configuration's."
    )
    group_by_length: bool = HfArg(
        default=False, help="Put texts of similar length into one batch: less padding, less time."
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
        self._check_files()
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise ValueError(f"data_dir={self.data_dir!r} does not exist or is not a folder; check the path")

    def _check_files(self) -> None:
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
