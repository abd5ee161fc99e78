"""The tasks of finetune.py: for each the model class, and how its data become batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
import transformers
from datasets import IterableDataset
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from _arguments import Arguments, ModelArguments
from _data import Splits, encode_labels, find_columns, load_splits

logger = logging.getLogger(__name__)

# the one without torchvision; before it got a name of its own it was ViTImageProcessor
ImageProcessor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor


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
    if task == "image-classification":
        processor = load_image_processor(arguments.model, config, args.image_size)
    else:
        processor = load_tokenizer(arguments.model, config)
    if task in ("token-classification", "masked-lm") and not processor.is_fast:
        raise ValueError(f"{task} needs a fast tokenizer, and {type(processor).__name__} is none; use another one")
    if task == "masked-lm" and processor.mask_token is None:
        raise ValueError(f"{type(processor).__name__} has no mask token, which masked-lm needs; use another tokenizer")
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


# ---- tokenizer and image processor


def load_tokenizer(args: ModelArguments, config):
    """The tokenizer, with a padding token. A configuration to train from scratch takes over its vocabulary."""
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    if name == "bytes":
        tokenizer = ByT5Tokenizer(extra_ids=0)  # 256 bytes and 3 special tokens
    else:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=None if args.tokenizer_name else args.model_revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"tokenizer {name!r} has neither a padding nor an end-of-sequence token; use another one")
        tokenizer.pad_token = tokenizer.eos_token
    if not args.model_name_or_path:
        config.vocab_size = args.config_overrides.get("vocab_size", len(tokenizer))
        for token in ("bos_token_id", "eos_token_id"):
            setattr(config, token, getattr(tokenizer, token))
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, but the model's vocab_size is {config.vocab_size}; use "
            f"the model's own tokenizer, or a larger vocab_size"
        )
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def load_image_processor(args: ModelArguments, config, size: int | None):
    """The image processor; from scratch one that resizes to the configuration's size and scales to [-1, 1]."""
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; only grey (1) and RGB (3) images can be read")
    name = args.image_processor_name or args.model_name_or_path
    if name:
        return AutoImageProcessor.from_pretrained(name)
    if size and hasattr(config, "image_size"):
        config.image_size = size
    size = size or getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    middle = [0.5] * channels
    return ImageProcessor(size={"height": height, "width": width}, image_mean=middle, image_std=middle)


def length_limit(wanted: int | None, flag: str, cap: int, config, tokenizer) -> int:
    """Tokens a sequence: ``wanted``, or as many as model and tokenizer take, at most ``cap``."""
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    if wanted and positions and wanted > positions:
        raise ValueError(f"{flag}={wanted} is more than the {positions} positions of the model; lower it")
    return wanted or min(cap, tokenizer.model_max_length, positions or cap)


# ---- from rows to model inputs


def _map(splits: Splits, function: Callable, workers: int | None, verb: str, keep: tuple[str, ...] = ()) -> Splits:
    """``function`` over batches of rows, with their numbers and the split's name; columns not in ``keep`` go."""
    mapped = {}
    for split, dataset in splits.items():
        options = {} if isinstance(dataset, IterableDataset) else {"num_proc": workers, "desc": f"{verb} {split}"}
        mapped[split] = dataset.map(
            function,
            batched=True,
            with_indices=True,
            fn_kwargs={"split": split},
            remove_columns=[name for name in dataset.features if name not in keep],
            **options,
        )
    return mapped


def _require(batch, columns: list[str], numbers: list[int], split: str) -> None:
    for column in columns:
        row = next((number for number, value in zip(numbers, batch[column], strict=True) if value is None), None)
        if row is not None:
            raise ValueError(f"row {row} of the {split} split has no text in column {column!r}; remove or fill it")


def tokenize_texts(
    splits: Splits, columns: list[str], tokenizer, max_length: int, workers: int | None, overflow: bool = False
) -> Splits:
    """Texts, or pairs of texts, to token ids, truncated to ``max_length``; keeps "labels".

    With ``overflow`` (no labels then) long texts are not truncated but cut into several rows.
    """

    def tokenize(batch, numbers, split):
        _require(batch, columns, numbers, split)
        texts = [batch[column] for column in columns]
        tokens = tokenizer(*texts, truncation=True, max_length=max_length, return_overflowing_tokens=overflow)
        tokens.pop("overflow_to_sample_mapping", None)
        return tokens

    return _map(splits, tokenize, workers, "tokenize", keep=() if overflow else ("labels",))


def tokenize_words(splits: Splits, column: str, tokenizer, max_length: int, workers: int | None) -> Splits:
    """Lists of words with a label each to token ids; a word's first token has its label, the others have -100."""

    def tokenize(batch, numbers, split):
        _require(batch, [column], numbers, split)
        tokens = tokenizer(batch[column], is_split_into_words=True, truncation=True, max_length=max_length)
        tokens["labels"] = []
        for row, labels in enumerate(batch["labels"]):
            if len(labels) != len(batch[column][row]):
                raise ValueError(
                    f"row {numbers[row]} of the {split} split has {len(batch[column][row])} words and {len(labels)} "
                    f"labels; correct or remove it"
                )
            words = tokens.word_ids(row)
            first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            tokens["labels"].append(
                [labels[word] if begins else -100 for word, begins in zip(words, first, strict=True)]
            )
        return tokens

    return _map(splits, tokenize, workers, "tokenize")


def tokenize_pairs(
    splits: Splits, source: str, target: str, prefix: str, tokenizer, lengths: tuple[int, int], workers: int | None
) -> Splits:
    """Source texts to token ids and target texts to labels, truncated to ``lengths``."""

    def tokenize(batch, numbers, split):
        _require(batch, [source, target], numbers, split)
        tokens = tokenizer([prefix + text for text in batch[source]], truncation=True, max_length=lengths[0])
        labels = tokenizer(text_target=batch[target], truncation=True, max_length=lengths[1])
        return {**tokens, "labels": labels["input_ids"]}

    return _map(splits, tokenize, workers, "tokenize")


def tokenize_blocks(splits: Splits, column: str, tokenizer, block_size: int, workers: int | None) -> Splits:
    """Texts to one stream of token ids, cut into blocks of ``block_size``; what is left at the end is dropped.

    A row that ends in a line break continues in the next row, as in text files; any other row is a document and is
    closed with the end-of-sequence token. Rows without text are skipped.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch, numbers, split):
        texts = [text for text in batch[column] if text]
        if not texts:
            return {"input_ids": []}
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [ids if text.endswith("\n") else ids + end for text, ids in zip(texts, rows, strict=True)]}

    def cut(batch):
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]}

    blocks = {}
    for split, tokens in _map(splits, tokenize, workers, "tokenize").items():
        options = {"batched": True, "batch_size": 10_000}
        if isinstance(tokens, IterableDataset):
            blocks[split] = tokens.map(cut, **options)
            continue
        blocks[split] = tokens.map(cut, num_proc=workers, desc=f"cut {split}", **options)
        if len(blocks[split]) == 0:
            raise ValueError(
                f"the {split} split has {sum(map(len, tokens['input_ids']))} tokens, less than one block of "
                f"{block_size}; lower --block_size or give more text"
            )
    return blocks


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks of equal length to a batch; the model shifts the labels itself."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


class MaskTokens:
    """BERT's masking of one row of token ids: the same tokens for the same seed; "labels" are the hidden ones."""

    def __init__(self, tokenizer, probability: float):
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    def __call__(self, row: dict, seed: int) -> dict:
        self.collator.generator = torch.Generator().manual_seed(seed)
        ids, labels = self.collator.torch_mask_tokens(torch.tensor([row["input_ids"]]))
        return row | {"input_ids": ids[0].tolist(), "labels": labels[0].tolist()}


def transform_images(splits: Splits, column: str, processor, channels: int) -> Splits:
    """Images to "pixel_values" of ``channels`` channels, made by the image processor when a batch is read."""
    mode = {1: "L", 3: "RGB"}[channels]

    def transform(batch):
        images = [image.convert(mode) for image in batch[column]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return {
        split: dataset.map(transform, batched=True, remove_columns=list(dataset.features))
        if isinstance(dataset, IterableDataset)
        else dataset.with_transform(transform)
        for split, dataset in splits.items()
    }
