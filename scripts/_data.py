"""Data of finetune.py: from a name, files or a folder to splits, and from splits to what a model reads."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from _arguments import DIGITS, FILE_FORMATS, DataArguments
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing", "test_matched"),
}
_TEXT_NAMES = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text",), ("sentence",), ("content",), ("review",),
)  # fmt: skip
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


# ---- from a source to splits


def load_digits() -> DatasetDict:
    """scikit-learn's digits, 1797 real grey images of 8x8 pixels in 10 classes: 1197 to train, 150, and 450 to test.

    The split is stratified and always the same.
    """
    from PIL.Image import fromarray
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0..16 to 0..255
    rest, test = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=150, stratify=labels[rest], random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return DatasetDict({
        name: Dataset.from_dict({"image": [fromarray(pixels[i]) for i in rows], "label": labels[rows]}, features)
        for name, rows in (("train", train), ("validation", validation), ("test", test))
    })  # fmt: skip


def load_splits(args: DataArguments, task: str, seed: int) -> dict[str, Dataset]:
    """The splits "train", "validation" and, where the source has one, "test".

    A missing validation split is cut from the training split: at random, or for causal-lm, whose rows may be lines of
    one text, from its end.
    """
    if args.dataset_name == DIGITS:
        raw = load_digits()
    elif args.dataset_name and (Path(args.dataset_name) / "dataset_dict.json").is_file():
        raw = load_from_disk(args.dataset_name)
    elif args.dataset_name:
        raw = load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.data_dir:
        raw = load_dataset("imagefolder", data_dir=args.data_dir)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        suffix = Path(args.train_file).suffix.lower()
        options = {"keep_linebreaks": True} if suffix == ".txt" else {"sep": "\t"} if suffix == ".tsv" else {}
        raw = load_dataset(FILE_FORMATS[suffix], data_files={k: v for k, v in files.items() if v}, **options)

    splits = {}
    for split, known in _SPLIT_NAMES.items():
        wanted = getattr(args, f"{split}_split")
        if wanted and wanted not in raw:
            raise ValueError(f"{split}_split={wanted!r} is not a split of the data; it has {list(raw)}")
        found = wanted or next((name for name in known if name in raw), None)
        if found:
            splits[split] = raw[found]
    if "train" not in splits:
        raise ValueError(f"the data has no training split, only {list(raw)}; name one with --train_split")
    if "validation" not in splits:
        train, count = splits["train"], round(args.validation_fraction * len(splits["train"]))
        if not 0 < count < len(train):
            raise ValueError(
                f"the training split has {len(train)} rows, too few to cut a validation split from with "
                f"validation_fraction={args.validation_fraction}; give --validation_file or --validation_split"
            )
        order = np.arange(len(train)) if task == "causal-lm" else np.random.default_rng(seed).permutation(len(train))
        splits["train"], splits["validation"] = train.select(order[:-count]), train.select(order[-count:])
        splits = {name: splits[name] for name in _SPLIT_NAMES if name in splits}
    for split, dataset in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit and limit < len(dataset):  # classification data is often sorted by class, texts are in order
            splits[split] = (dataset if task == "causal-lm" else dataset.shuffle(seed=seed)).select(range(limit))
        if len(dataset) == 0:
            raise ValueError(f"the {split} split is empty; check the data")
    return splits


# ---- columns and labels


def find_columns(features: Features, task: str, args: DataArguments) -> tuple[list[str], str | None]:
    """The input columns (a text, two texts or an image) and the label column (causal-lm: None)."""
    for flag in ("text_column", "text_pair_column", "image_column", "label_column"):
        name = getattr(args, flag)
        if name and name not in features:
            raise ValueError(f"{flag}={name!r} is not a column of the data; it has {list(features)}")
    label = None
    if task != "causal-lm":
        classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        candidates = [name for name in _LABEL_NAMES if name in features] or (classes if len(classes) == 1 else [])
        label = args.label_column or next(iter(candidates), None)
        if label is None:
            raise ValueError(f"can't tell which of the columns {list(features)} is the label; give --label_column")
    if task == "image-classification":
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        if args.image_column not in images and (args.image_column or len(images) != 1):
            raise ValueError(f"the data's image columns are {images}; name one of them with --image_column")
        return [args.image_column or images[0]], label
    texts = [name for name, feature in features.items() if name != label and _is_text(feature)]
    if args.text_column:
        inputs = [args.text_column]
    else:
        known = [names for names in _TEXT_NAMES if set(names) <= set(texts) and (label or len(names) == 1)]
        inputs = list(known[0]) if known else texts if len(texts) == 1 else []
    if inputs and args.text_pair_column:
        inputs = [inputs[0], args.text_pair_column]
    if not inputs or not set(inputs) <= set(texts):
        raise ValueError(
            f"can't tell the text from the columns {list(features)}, of which {texts} are texts; give --text_column"
            + (" (and --text_pair_column for pairs)" if label else "")
        )
    return inputs, label


def _is_text(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def encode_labels(splits: dict[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """Replace ``column`` by "labels", integers from 0, and return the names of the classes.

    Classes come from the feature's names or else from the sorted values of the training split. A test split without
    labels, as benchmarks have them, is left out with a warning.
    """
    feature = splits["train"].features[column]
    if isinstance(feature, ClassLabel):
        names = feature.names
        ids = {index: index for index in range(len(names))}
    else:
        values = splits["train"].unique(column)
        if not all(isinstance(value, (str, int)) for value in values):
            odd = next(value for value in values if not isinstance(value, (str, int)))
            raise ValueError(f"label column {column!r} holds {odd!r}; labels must be strings or integers, none missing")
        ids = {value: index for index, value in enumerate(sorted(values))}
        names = [str(value) for value in ids]
    if len(names) < 2:
        raise ValueError(f"label column {column!r} has one class only, {names}; classification needs two")
    encoded = {}
    for split, dataset in splits.items():
        labels = list(dataset[column]) if column in dataset.features else [None] * len(dataset)
        if split == "test" and all(label in (None, -1) for label in labels):
            logger.warning("the test split has no labels and is left out")
            continue
        unknown = next((row for row, label in enumerate(labels) if label not in ids), None)
        if unknown is not None:
            raise ValueError(
                f"row {unknown} of the {split} split has the label {labels[unknown]!r}, which is none of {names}; "
                f"correct the row, or add the class to the training split"
            )
        labels = [ids[label] for label in labels]
        dataset = dataset.remove_columns(list({column, "labels"} & set(dataset.features)))
        encoded[split] = dataset.add_column("labels", labels, feature=Value("int64"))
    return encoded, names


# ---- from splits to model inputs


def length_limit(wanted: int | None, flag: str, cap: int, config, tokenizer) -> int:
    """Tokens a sequence: ``wanted``, or as many as model and tokenizer take, at most ``cap``."""
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    if wanted and positions and wanted > positions:
        raise ValueError(f"{flag}={wanted} is more than the {positions} positions of the model; lower it")
    return wanted or min(cap, tokenizer.model_max_length, positions or cap)


def tokenize_texts(splits: dict[str, Dataset], columns: list[str], tokenizer, max_length: int, workers: int | None):
    """Texts, or pairs of texts, to token ids, truncated to ``max_length``; keeps "labels"."""
    for split, dataset in splits.items():
        for column in columns:
            row = next((row for row, text in enumerate(dataset[column]) if text is None), None)
            if row is not None:
                raise ValueError(f"row {row} of the {split} split has no text in column {column!r}; remove or fill it")

    def tokenize(batch):
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

    return {
        split: dataset.map(
            tokenize,
            batched=True,
            num_proc=workers,
            remove_columns=[name for name in dataset.column_names if name != "labels"],
            desc=f"tokenize {split}",
        )
        for split, dataset in splits.items()
    }


def tokenize_blocks(splits: dict[str, Dataset], column: str, tokenizer, block_size: int, workers: int | None):
    """Texts to one stream of token ids, cut into blocks of ``block_size``; what is left at the end is dropped.

    A row that ends in a line break continues in the next row, as in text files; any other row is a document and is
    closed with the end-of-sequence token. Rows without text are skipped.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch):
        texts = [text for text in batch[column] if text]
        if not texts:
            return {"input_ids": []}
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [ids if text.endswith("\n") else ids + end for text, ids in zip(texts, rows, strict=True)]}

    def cut(batch):
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]}

    blocks = {}
    for split, dataset in splits.items():
        tokens = dataset.map(
            tokenize, batched=True, num_proc=workers, remove_columns=dataset.column_names, desc=f"tokenize {split}"
        )
        blocks[split] = tokens.map(cut, batched=True, batch_size=10_000, num_proc=workers, desc=f"cut {split}")
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


def transform_images(splits: dict[str, Dataset], column: str, processor, channels: int):
    """Images to "pixel_values" of ``channels`` channels, made by the image processor when a batch is read."""
    mode = {1: "L", 3: "RGB"}[channels]

    def transform(batch):
        images = [image.convert(mode) for image in batch[column]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return {split: dataset.with_transform(transform) for split, dataset in splits.items()}
