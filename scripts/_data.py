"""Where the data of finetune.py come from: from a name, files or a folder to splits, their columns and classes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    load_dataset,
    load_from_disk,
)

from _arguments import DIGITS, FILE_FORMATS, DataArguments

logger = logging.getLogger(__name__)

# tasks that read running text, without labels; its rows may be lines in order
TEXT_ONLY = ("causal-lm", "masked-lm", "feature-extraction")
_STREAMED_EVAL_SAMPLES = 1000
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
_WORD_NAMES = ("tokens", "words")
_TAG_NAMES = ("ner_tags", "pos_tags", "chunk_tags", "tags", "labels")
_SOURCE_AND_TARGET = (
    ("article", "highlights"), ("document", "summary"), ("dialogue", "summary"), ("text", "summary"),
    ("question", "answer"), ("source", "target"), ("input", "output"), ("input", "target"), ("src", "tgt"),
)  # fmt: skip


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


Splits = dict[str, Dataset | IterableDataset]


def load_splits(args: DataArguments, task: str, seed: int) -> Splits:
    """The splits "train", "validation" and, where the source has one, "test".

    A missing validation split is cut from the training split: at random, or for running text, whose rows may be lines
    in order, from its end. With streaming only the training split is a stream, and without a validation split its
    first rows are that.
    """
    if args.dataset_name == DIGITS:
        raw = load_digits()
    elif args.dataset_name and (Path(args.dataset_name) / "dataset_dict.json").is_file():
        raw = load_from_disk(args.dataset_name)
    elif args.dataset_name:
        raw = load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    elif args.data_dir:
        raw = load_dataset("imagefolder", data_dir=args.data_dir, streaming=args.streaming)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        suffix = Path(args.train_file).suffix.lower()
        options = {"keep_linebreaks": True} if suffix == ".txt" else {"sep": "\t"} if suffix == ".tsv" else {}
        files = {split: file for split, file in files.items() if file}
        raw = load_dataset(FILE_FORMATS[suffix], data_files=files, streaming=args.streaming, **options)

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
    splits = {name: dataset.flatten() if _is_nested(dataset) else dataset for name, dataset in splits.items()}
    if args.streaming:
        return _open_streams(splits, args, seed)
    if "validation" not in splits:
        train, count = splits["train"], round(args.validation_fraction * len(splits["train"]))
        if not 0 < count < len(train):
            raise ValueError(
                f"the training split has {len(train)} rows, too few to cut a validation split from with "
                f"validation_fraction={args.validation_fraction}; give --validation_file or --validation_split"
            )
        order = np.arange(len(train)) if task in TEXT_ONLY else np.random.default_rng(seed).permutation(len(train))
        splits["train"], splits["validation"] = train.select(order[:-count]), train.select(order[-count:])
        splits = {name: splits[name] for name in _SPLIT_NAMES if name in splits}
    for split, dataset in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit and limit < len(dataset):  # classification data is often sorted by class, texts are in order
            splits[split] = (dataset if task in TEXT_ONLY else dataset.shuffle(seed=seed)).select(range(limit))
        if len(dataset) == 0:
            raise ValueError(f"the {split} split is empty; check the data")
    return splits


def _is_nested(dataset) -> bool:
    """Whether a column holds columns of its own, as those of translations do: {"de": ..., "en": ...}."""
    return any(
        isinstance(feature, dict) or hasattr(feature, "languages") for feature in (dataset.features or {}).values()
    )


def _open_streams(splits: Splits, args: DataArguments, seed: int) -> Splits:
    """A stream to train on; validation and test rows are read into memory."""
    count = args.max_eval_samples or _STREAMED_EVAL_SAMPLES
    if "validation" not in splits:
        splits["validation"], splits["train"] = splits["train"].take(count), splits["train"].skip(count)
    opened: Splits = {"train": splits["train"]}
    for split in ("validation", "test"):
        if split in splits:
            rows = list(splits[split].take(count))
            if not rows:
                raise ValueError(f"the {split} split of the stream has no rows; check the data")
            opened[split] = Dataset.from_list(rows, features=splits[split].features)
    if opened["train"].features is None:
        opened["train"] = opened["train"].cast(opened["validation"].features)
    if args.max_train_samples:
        opened["train"] = opened["train"].take(args.max_train_samples)
    if args.shuffle_buffer_size:
        opened["train"] = opened["train"].shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
    return opened


# ---- columns and labels


def find_columns(features: Features, task: str, args: DataArguments) -> tuple[list[str], str | None]:
    """The input columns (a text, two texts, words or an image) and the column of labels or target texts, if any."""
    for flag in ("text_column", "text_pair_column", "image_column", "label_column", "target_column"):
        name = getattr(args, flag)
        if name and name not in features:
            raise ValueError(f"{flag}={name!r} is not a column of the data; it has {list(features)}")
    if task == "token-classification":
        return _find_words(features, args)
    if task == "seq2seq":
        return _find_source_and_target(features, args)
    label = None
    if task not in TEXT_ONLY:
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


def _find_words(features: Features, args: DataArguments) -> tuple[list[str], str]:
    lists = {name: feature.feature for name, feature in features.items() if isinstance(feature, List)}
    words = [args.text_column] if args.text_column else [name for name in _WORD_NAMES if name in lists]
    tags = [args.label_column] if args.label_column else [name for name in _TAG_NAMES if name in lists]
    if not words or not tags or not {words[0], tags[0]} <= set(lists) or not _is_text(lists[words[0]]):
        raise ValueError(
            f"token-classification needs a column of lists of words and one of lists of labels; the lists among the "
            f"columns {list(features)} are {list(lists)}; give --text_column and --label_column"
        )
    return [words[0]], tags[0]


def _find_source_and_target(features: Features, args: DataArguments) -> tuple[list[str], str]:
    texts = [name for name, feature in features.items() if _is_text(feature)]
    known = [pair for pair in _SOURCE_AND_TARGET if set(pair) <= set(texts)] or [(None, None)]
    source, target = args.text_column or known[0][0], args.target_column or known[0][1]
    if source is None or target is None or source == target or not {source, target} <= set(texts):
        raise ValueError(
            f"can't tell source and target texts from the columns {list(features)}, of which {texts} are texts; give "
            f"--text_column and --target_column"
        )
    return [source], target


def _is_text(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def encode_labels(splits: Splits, column: str) -> tuple[Splits, list[str]]:
    """Replace ``column`` by "labels", integers from 0 (lists of them, where it holds lists), and return the names of
    the classes.

    Classes come from the feature's names or else from the sorted values of the training split. A test split without
    labels, as benchmarks have them, is left out with a warning.
    """
    feature = splits["train"].features[column]
    nested = isinstance(feature, List)
    feature = feature.feature if nested else feature
    if isinstance(feature, ClassLabel):
        names = feature.names
        ids = {index: index for index in range(len(names))}
    else:
        values = _distinct(splits["train"], column, nested)
        odd = next((value for value in values if not isinstance(value, (str, int))), 0)
        if not isinstance(odd, (str, int)):
            raise ValueError(f"label column {column!r} holds {odd!r}; labels must be strings or integers, none missing")
        ids = {value: index for index, value in enumerate(sorted(values))}
        names = [str(value) for value in ids]
    if len(names) < 2:
        raise ValueError(f"label column {column!r} has one class only, {names}; classification needs two")

    def encode(labels, number: int, split: str):
        for label in labels if nested else [labels]:
            if label not in ids:
                raise ValueError(
                    f"row {number} of the {split} split has the label {label!r}, which is none of {names}; "
                    f"correct the row, or add the class to the training split"
                )
        return [ids[label] for label in labels] if nested else ids[labels]

    encoded, kind = {}, List(Value("int64")) if nested else Value("int64")
    for split, dataset in splits.items():
        if split == "test" and _is_unlabelled(dataset, column):
            logger.warning("the test split has no labels and is left out")
            continue
        others = {name: known for name, known in dataset.features.items() if name not in (column, "labels")}
        if isinstance(dataset, IterableDataset):
            encoded[split] = dataset.map(
                lambda row, number, split=split: {"labels": encode(row[column], number, split)},
                with_indices=True,
                remove_columns=[column],
                features=Features(others | {"labels": kind}),
            )
        else:  # not by map, which would copy the images
            labels = [encode(label, number, split) for number, label in enumerate(dataset[column])]
            encoded[split] = dataset.select_columns(list(others)).add_column("labels", labels, feature=kind)
    return encoded, names


def _distinct(dataset: Dataset | IterableDataset, column: str, nested: bool) -> set:
    if isinstance(dataset, Dataset) and not nested:
        return set(dataset.unique(column))
    if isinstance(dataset, IterableDataset):
        logger.info("the stream declares no classes: it is read once to collect those of column %r", column)
    labels = (row[column] for row in dataset.select_columns(column))
    return {label for row in labels for label in row} if nested else set(labels)


def _is_unlabelled(dataset: Dataset, column: str) -> bool:
    return column not in dataset.features or all(label in (None, -1) for label in dataset[column])
