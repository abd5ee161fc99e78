"""What the columns of a dataset mean: which are inputs, which is the label, and the integers that stand for classes."""

from __future__ import annotations

import logging

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value

from finetuning.arguments.data import DataArguments
from finetuning.data.sources import TEXT_ONLY, Splits

logger = logging.getLogger(__name__)

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
    nested = isinstance(splits["train"].features[column], List)
    ids, names = _classes(splits["train"], column, nested)

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


def _classes(dataset: Dataset | IterableDataset, column: str, nested: bool) -> tuple[dict, list[str]]:
    """The integer of each label, and the names of the classes in this order."""
    feature = dataset.features[column]
    feature = feature.feature if nested else feature
    if isinstance(feature, ClassLabel):
        names = feature.names
        ids = {index: index for index in range(len(names))}
    else:
        values = _distinct(dataset, column, nested)
        odd = next((value for value in values if not isinstance(value, (str, int))), 0)
        if not isinstance(odd, (str, int)):
            raise ValueError(f"label column {column!r} holds {odd!r}; labels must be strings or integers, none missing")
        ids = {value: index for index, value in enumerate(sorted(values))}
        names = [str(value) for value in ids]
    if len(names) < 2:
        raise ValueError(f"label column {column!r} has one class only, {names}; classification needs two")
    return ids, names


def _distinct(dataset: Dataset | IterableDataset, column: str, nested: bool) -> set:
    if isinstance(dataset, Dataset) and not nested:
        return set(dataset.unique(column))
    if isinstance(dataset, IterableDataset):
        logger.info("the stream declares no classes: it is read once to collect those of column %r", column)
    labels = (row[column] for row in dataset.select_columns(column))
    return {label for row in labels for label in row} if nested else set(labels)


def _is_unlabelled(dataset: Dataset, column: str) -> bool:
    return column not in dataset.features or all(label in (None, -1) for label in dataset[column])
