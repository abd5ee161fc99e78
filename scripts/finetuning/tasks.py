"""The tasks of finetune.py: for each the model class, and how its data become batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import transformers
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from finetuning.arguments.cli import Arguments
from finetuning.data.columns import encode_labels, find_columns
from finetuning.data.encoding import (
    MaskTokens,
    collate_blocks,
    tokenize_blocks,
    tokenize_pairs,
    tokenize_texts,
    tokenize_words,
    transform_images,
)
from finetuning.data.processors import length_limit, load_image_processor, load_tokenizer
from finetuning.data.sources import Splits, load_splits


@dataclass(frozen=True)
class Task:
    """What distinguishes a task.

    Attributes:
        auto_class: The Auto class of its models.
        hub_tag: Its name on the Hub.
        per_token: Whether the loss is a mean over tokens, and throughput is counted in them, not in samples.
        shifted: Whether the logits at one position predict the label at the next.
    """

    auto_class: type
    hub_tag: str
    per_token: bool = True
    shifted: bool = False


TASKS = {
    "text-classification": Task(
        transformers.AutoModelForSequenceClassification, "text-classification", per_token=False
    ),
    "image-classification": Task(transformers.AutoModelForImageClassification, "image-classification", per_token=False),
    "token-classification": Task(transformers.AutoModelForTokenClassification, "token-classification"),
    "causal-lm": Task(transformers.AutoModelForCausalLM, "text-generation", shifted=True),
    "masked-lm": Task(transformers.AutoModelForMaskedLM, "fill-mask"),
    "seq2seq": Task(transformers.AutoModelForSeq2SeqLM, "text2text-generation"),
    "feature-extraction": Task(transformers.AutoModel, "feature-extraction", per_token=False),
}


@dataclass
class Data:
    """Splits that a model can read, and what goes with them.

    Attributes:
        splits: "train", "validation" and perhaps "test".
        processor: The tokenizer or image processor.
        collate: Makes a batch of rows.
        augment: Random change of one row, given a seed; see Batches.
    """

    splits: Splits
    processor: object
    collate: Callable[[list[dict]], dict]
    augment: Callable[[dict, int], dict] | None = field(default=None)


def prepare_data(arguments: Arguments, config) -> Data:
    """Load and encode the data; ``config``, the model's, gets the classes and, from scratch, the vocabulary."""
    task, args = arguments.train.task, arguments.data
    processor = _load_processor(arguments, config)
    splits = load_splits(args, task, arguments.train.seed)
    inputs, label = find_columns(splits["train"].features, task, args)
    workers = args.preprocessing_num_workers
    if task == "causal-lm":
        block_size = length_limit(args.block_size, "block_size", 1024, config, processor)
        return Data(tokenize_blocks(splits, inputs[0], processor, block_size, workers), processor, collate_blocks)
    if label and task != "seq2seq":
        splits, names = encode_labels(splits, label)
        config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    if task == "image-classification":
        splits = transform_images(splits, inputs[0], processor, getattr(config, "num_channels", 3))
        return Data(splits, processor, default_data_collator)
    max_length = length_limit(args.max_length, "max_length", 512, config, processor)
    if task == "token-classification":
        splits = tokenize_words(splits, inputs[0], processor, max_length, workers)
        return Data(splits, processor, DataCollatorForTokenClassification(processor))
    if task == "masked-lm":
        splits = tokenize_texts(splits, inputs, processor, max_length, workers, overflow=True)
        mask = MaskTokens(processor, args.mlm_probability)
        return Data(splits, processor, DataCollatorForTokenClassification(processor), mask)
    if task == "seq2seq":
        lengths = max_length, args.max_target_length
        splits = tokenize_pairs(splits, inputs[0], label, args.source_prefix, processor, lengths, workers)
        return Data(splits, processor, DataCollatorForSeq2Seq(processor))
    splits = tokenize_texts(splits, inputs, processor, max_length, workers)
    return Data(splits, processor, DataCollatorWithPadding(processor))


def _load_processor(arguments: Arguments, config):
    """The image processor, or a tokenizer that has what the task needs."""
    task = arguments.train.task
    if task == "image-classification":
        return load_image_processor(arguments.model, config, arguments.data.image_size)
    tokenizer = load_tokenizer(arguments.model, config)
    if task in ("token-classification", "masked-lm") and not tokenizer.is_fast:
        raise ValueError(f"{task} needs a fast tokenizer, and {type(tokenizer).__name__} is none; use another one")
    if task == "masked-lm" and tokenizer.mask_token is None:
        raise ValueError(f"{type(tokenizer).__name__} has no mask token, which masked-lm needs; use another tokenizer")
    return tokenizer
