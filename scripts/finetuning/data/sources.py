"""Where the data of finetune.py come from: a name, files or a folder become the splits train, validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, load_dataset, load_from_disk

from finetuning.arguments.data import DIGITS, FILE_FORMATS, DataArguments

# tasks that read running text, without labels; its rows may be lines in order
TEXT_ONLY = ("causal-lm", "masked-lm", "feature-extraction")
_STREAMED_EVAL_SAMPLES = 1000
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing", "test_matched"),
}
Splits = dict[str, Dataset | IterableDataset]


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


def load_splits(args: DataArguments, task: str, seed: int) -> Splits:
    """The splits "train", "validation" and, where the source has one, "test".

    A missing validation split is cut from the training split: at random, or for running text, whose rows may be lines
    in order, from its end. With streaming only the training split is a stream, and without a validation split its
    first rows are that.
    """
    splits = _find_splits(_read(args), args)
    if args.streaming:
        return _open_streams(splits, args, seed)
    if "validation" not in splits:
        splits = _cut_validation(splits, args, task, seed)
    for split, dataset in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit and limit < len(dataset):  # classification data is often sorted by class, texts are in order
            splits[split] = (dataset if task in TEXT_ONLY else dataset.shuffle(seed=seed)).select(range(limit))
        if len(dataset) == 0:
            raise ValueError(f"the {split} split is empty; check the data")
    return splits


def _read(args: DataArguments) -> Mapping[str, Dataset | IterableDataset]:
    """All splits of the source, under its own names."""
    if args.dataset_name == DIGITS:
        return load_digits()
    if args.dataset_name and (Path(args.dataset_name) / "dataset_dict.json").is_file():
        return load_from_disk(args.dataset_name)
    if args.dataset_name:
        return load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    if args.data_dir:
        return load_dataset("imagefolder", data_dir=args.data_dir, streaming=args.streaming)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    suffix = Path(args.train_file).suffix.lower()
    options = {"keep_linebreaks": True} if suffix == ".txt" else {"sep": "\t"} if suffix == ".tsv" else {}
    files = {split: file for split, file in files.items() if file}
    return load_dataset(FILE_FORMATS[suffix], data_files=files, streaming=args.streaming, **options)


def _find_splits(raw: Mapping[str, Dataset | IterableDataset], args: DataArguments) -> Splits:
    """Training, validation and test split under our names, nested columns made flat."""
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
    return {name: dataset.flatten() if _is_nested(dataset) else dataset for name, dataset in splits.items()}


def _cut_validation(splits: Splits, args: DataArguments, task: str, seed: int) -> Splits:
    """A validation split out of the training split."""
    train, count = splits["train"], round(args.validation_fraction * len(splits["train"]))
    if not 0 < count < len(train):
        raise ValueError(
            f"the training split has {len(train)} rows, too few to cut a validation split from with "
            f"validation_fraction={args.validation_fraction}; give --validation_file or --validation_split"
        )
    order = np.arange(len(train)) if task in TEXT_ONLY else np.random.default_rng(seed).permutation(len(train))
    splits["train"], splits["validation"] = train.select(order[:-count]), train.select(order[-count:])
    return {name: splits[name] for name in _SPLIT_NAMES if name in splits}


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
