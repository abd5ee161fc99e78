"""Data that tests of several files start from: images as Fashion-MNIST has them, and files for finetune.py."""

import csv
import gzip
import json
import keyword
import pydoc_data.topics
import re
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import DIGITS, SIZES, make_tokenizer


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(head + array.tobytes())


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder in the form of Fashion-MNIST's: ten classes, each a bright square at a place of its own, with noise."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 800), ("t10k", 200)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        pixels = random.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 180
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, dict]:
    """Common arguments of each task; writes the data files: documentation topics of Python, and which topic it is."""
    folder = tmp_path_factory.mktemp("data")
    words = [(name, text.split()) for name, text in sorted(pydoc_data.topics.topics.items())[:40]]
    rows = [(" ".join(text[i : i + 8]), "early" if name < "c" else "late") for name, text in words for i in (0, 8, 16)]
    for split, part in (("train", rows[:80]), ("validation", rows[20:40]), ("test", rows[40:60])):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        with open(folder / f"{split}.jsonl", "w") as file:
            for text, _ in part:
                found = re.findall(r"\w+", text) or ["none"]
                tags = ["B-KEYWORD" if keyword.iskeyword(word) else "O" for word in found]
                file.write(json.dumps({"tokens": found, "tags": tags, "source": text, "target": found[0]}) + "\n")
    text = pydoc_data.topics.topics["if"] + pydoc_data.topics.topics["while"]
    (folder / "train.txt").write_text(text)
    (folder / "test.txt").write_text(pydoc_data.topics.topics["for"])
    make_tokenizer(folder / "tokenizer", [text for text, _ in rows])
    common = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "logging_steps": 2, "report_to": "none"}
    bert = {"model_type": "bert", "config_overrides": f"{SIZES},intermediate_size=64,hidden_dropout_prob=0.0,"
            "attention_probs_dropout_prob=0.0"}  # fmt: skip
    files = {f"{split}_file": folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {
        "digits": DIGITS | {"save_logits": 40},
        "text": common | bert | {
            "task": "text-classification",
            "train_file": folder / "train.csv",
            "validation_file": folder / "validation.csv",
            "test_file": folder / "test.csv",
            "tokenizer_name": "bytes",
            "save_logits": 8,
        },
        "lm": common | {
            "task": "causal-lm",
            "train_file": folder / "train.txt",
            "test_file": folder / "test.txt",
            "block_size": 64,
            "model_type": "gpt2",
            "config_overrides": f"{SIZES},resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
            "tokenizer_name": "bytes",
            "save_logits": 3,
        },
        "mlm": common | bert | {
            "task": "masked-lm", "tokenizer_name": folder / "tokenizer", "max_length": 24,
            "train_file": folder / "train.csv", "text_column": "text", "validation_file": folder / "test.csv",
        },
        "words": common | bert | files | {"task": "token-classification", "tokenizer_name": folder / "tokenizer"},
        "seq2seq": common | files | {
            "task": "seq2seq", "tokenizer_name": "bytes", "model_type": "t5", "source_prefix": "first: ",
            "config_overrides": "d_model=32,d_ff=64,d_kv=16,num_layers=2,num_heads=2,dropout_rate=0.0",
            "max_target_length": 16,
        },
    }  # fmt: skip
