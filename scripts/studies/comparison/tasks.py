"""What the methods are compared on: real images and text, and a small model of transformers' own classes for each."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

FASHION_MNIST = "fashion-mnist"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CPYTHON = "cpython"
_NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
_VALIDATION = 5000  # images cut from the end of the training images
_EVALUATION_ROWS = 1000  # images or sequences in a batch without gradients

Batch = dict[str, Tensor]


class Data(NamedTuple):
    """A batch per split, whole: the tensors that the model is called with, labels among them, rows first."""

    train: Batch
    validation: Batch
    test: Batch


# ---- data


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format of MNIST: two zero bytes, type 8, rank, big-endian sizes, values."""
    with gzip.open(path) as file:
        content = file.read()
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _fashion_mnist(folder: Path) -> tuple[np.ndarray, ...]:
    """Images (rows, 28, 28, 1) and labels (rows,) to train on and to test on."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [folder / f"{name}-ubyte.gz" for name in names]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} not found; install Debian's package dataset-fashion-mnist, name the folder of its four "
            f"files with --fashion_mnist_dir, or another data set with --image_dataset"
        )
    images, labels, test_images, test_labels = map(_read_idx, files)
    return images[..., None], labels, test_images[..., None], test_labels


def _image_dataset(name: str) -> tuple[np.ndarray, ...]:
    """The same of a data set of the Hub, or of a folder of images, by the loader of finetune.py."""
    from finetuning.arguments.data import DataArguments
    from finetuning.data.columns import encode_labels, find_columns
    from finetuning.data.sources import load_splits

    arguments = DataArguments(dataset_name=name)
    splits = load_splits(arguments, "image-classification", seed=0)
    (image,), label = find_columns(splits["train"].features, "image-classification", arguments)
    splits, _ = encode_labels(splits, label)
    arrays = []
    for split in ("train", "test"):
        rows = splits[split if split in splits else "validation"]
        pictures = [np.asarray(picture) for picture in rows[image]]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise ValueError(f"--image_dataset {name!r} has images of {len(shapes)} sizes; expected one size")
        pixels = np.stack(pictures)
        arrays += [pixels if pixels.ndim == 4 else pixels[..., None], np.asarray(rows["labels"])]
    return tuple(arrays)


@cache
def load_images(name: str, folder: Path, train_size: int) -> Data:
    """The first ``train_size`` training images, 5,000 others to validate on, and the test images, standardised."""
    arrays = _fashion_mnist(folder) if name == FASHION_MNIST else _image_dataset(name)
    images, labels, test_images, test_labels = (torch.from_numpy(np.array(array)) for array in arrays)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # folders come sorted by class
    images, labels = images[order], labels[order]
    spare = min(_VALIDATION, len(images) // 10)
    if train_size > len(images) - spare:
        raise ValueError(f"--train_size {train_size}: {name} has {len(images) - spare} images to train on")
    kept = images[:train_size].double()
    mean, std = kept.mean((0, 1, 2)), kept.std((0, 1, 2))

    def batch(pixels, classes):
        pixels = ((pixels - mean) / std).float().permute(0, 3, 1, 2).contiguous()
        return {"pixel_values": pixels, "labels": classes.long()}

    return Data(
        batch(images[:train_size], labels[:train_size]),
        batch(images[-spare:], labels[-spare:]),
        batch(test_images, test_labels),
    )


@cache
def load_text(tokens: int, train_size: int) -> Data:
    """Sequences of ``tokens`` bytes of Python's documentation and standard library; a file is in one split only."""
    from pydoc_data.topics import topics

    root = sysconfig.get_paths()["stdlib"]
    files = {f"topics/{name}": text.encode() for name, text in topics.items()}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_READ]
        for name in names:
            if name.endswith(".py"):
                file = Path(folder, name)
                files[file.relative_to(root).as_posix()] = file.read_bytes()
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    # the hash decides on the split and on the order
    for digest, name in sorted((hashlib.sha256(name.encode()).digest(), name) for name in files):
        split = "test" if digest[-1] < 26 else "validation" if digest[-1] < 39 else "train"
        splits[split].append(files[name])
    rows = {}
    for split, size in (("train", train_size), ("validation", 500), ("test", 1500)):
        stream = np.frombuffer(b"\0".join(splits[split]), np.uint8)
        count = min(size, len(stream) // tokens)
        if split == "train" and count < size:
            raise ValueError(f"--train_size {size}: this Python's text has {count} sequences of {tokens} bytes")
        sequences = stream[: len(stream) // tokens * tokens].reshape(-1, tokens)
        chosen = np.random.default_rng(0).permutation(len(sequences))[:count]  # of all files, not of the first
        rows[split] = torch.from_numpy(sequences[chosen].astype(np.int64))
    return Data(*({"input_ids": rows[split], "labels": rows[split]} for split in ("train", "validation", "test")))


# ---- scores


def _predictions(model: nn.Module, split: Batch):
    """Logits and labels, a batch at a time."""
    device = next(model.parameters()).device
    for rows in zip(*(tensor.split(_EVALUATION_ROWS) for tensor in split.values()), strict=True):
        batch = {name: tensor.to(device) for name, tensor in zip(split, rows, strict=True)}
        labels = batch.pop("labels")
        yield model(**batch).logits, labels


@torch.inference_mode()
def accuracy(model: nn.Module, split: Batch) -> float:
    """Share of images whose largest logit is their class's."""
    right = sum(int((logits.argmax(-1) == labels).sum()) for logits, labels in _predictions(model, split))
    return right / len(split["labels"])


@torch.inference_mode()
def bits_per_byte(model: nn.Module, split: Batch) -> float:
    """Mean of -log2 of the probability of each byte but a sequence's first, given those before it."""
    nats = 0.0
    for logits, labels in _predictions(model, split):
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        nats += F.cross_entropy(logits.float(), labels, reduction="sum").item()
    rows, length = split["labels"].shape
    return nats / (rows * (length - 1)) / math.log(2)


# ---- tasks


@dataclass(frozen=True)
class Task:
    """A kind of model, its data and its score.

    Attributes:
        title, score: For tables and plots; ``percent``: whether the score is shown so.
        model_class: Of transformers.
        optimizer: What the field trains such models with: "adamw", or "sgd" (Nesterov momentum 0.9).
        evaluate: The score of a model on a split.
        higher: Whether a higher score is better.
    """

    title: str
    score: str
    percent: bool
    model_class: type[PreTrainedModel]
    optimizer: str
    evaluate: Callable[[nn.Module, Batch], float]
    higher: bool

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """A model with random weights of torch's generator."""
        return self.model_class(config)

    def chance(self, config: PretrainedConfig) -> float:
        """The score of a guess that knows nothing, which is that of a run that diverged."""
        return 1 / config.num_labels if self.percent else math.log2(config.vocab_size)

    def synflow_inputs(self, config: PretrainedConfig) -> Batch:
        """One input of ones."""
        if isinstance(config, GPT2Config):
            return {"inputs_embeds": torch.ones(1, config.n_positions, config.n_embd)}
        size = getattr(config, "image_size", 28)
        return {"pixel_values": torch.ones(1, config.num_channels, size, size)}


TASKS = {
    "vit": Task("ViT", "test accuracy", True, ViTForImageClassification, "adamw", accuracy, True),
    "convnet": Task("ResNet-20", "test accuracy", True, ResNetForImageClassification, "sgd", accuracy, True),
    "lm": Task("byte-level GPT-2", "test bits per byte", False, GPT2LMHeadModel, "adamw", bits_per_byte, False),
}


def make_config(task: str, overrides: dict, data: Data) -> PretrainedConfig:
    """The config of a task's model: sizes from ``overrides``, image size, channels and classes from the data."""
    if task == "lm":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        special = {"bos_token_id": None, "eos_token_id": None}
        return GPT2Config(vocab_size=256, **dropout, **special, **overrides)
    _, channels, height, width = data.train["pixel_values"].shape
    labels = int(data.train["labels"].max()) + 1
    if task == "convnet":
        # three stages of three basic blocks, as in 'Deep residual learning' (CVPR 2016), section 4.2
        stages = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3], "layer_type": "basic"}
        return ResNetConfig(num_channels=channels, num_labels=labels, **(stages | overrides))
    if height != width:
        raise ValueError(f"the ViT takes square images, got {height}x{width}")
    return ViTConfig(image_size=height, num_channels=channels, num_labels=labels, **overrides)
