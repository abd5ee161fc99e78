"""The data of scripts/finetune.py: columns, labels, blocks of text, and the digits."""

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
from finetuning.data import columns as _data  # noqa: E402
from finetuning.data import encoding as _tasks  # noqa: E402
from finetuning.data.sources import load_digits  # noqa: E402


def columns(features: list[str], task="text-classification", **given):
    rows = datasets.Dataset.from_dict({name: [1] if name in ("label", "id") else ["x"] for name in features})
    names = ("text_column", "text_pair_column", "image_column", "label_column", "target_column")
    args = type("Given", (), dict.fromkeys(names) | given)
    return _data.find_columns(rows.features, task, args)


def test_columns_are_inferred_or_refused():
    assert columns(["id", "text", "label"]) == (["text"], "label")
    assert columns(["premise", "hypothesis", "label"]) == (["premise", "hypothesis"], "label")
    assert columns(["words", "label"]) == (["words"], "label")
    assert columns(["a", "b", "label"], text_column="b", text_pair_column="a") == (["b", "a"], "label")
    assert columns(["id", "text"], task="causal-lm") == (["text"], None)
    with pytest.raises(ValueError, match=r"can't tell the text from the columns \['a', 'b', 'label'\]"):
        columns(["a", "b", "label"])
    with pytest.raises(ValueError, match="give --label_column"):
        columns(["a", "b"])
    with pytest.raises(ValueError, match=r"text_column='c' is not a column of the data; it has \['a', 'label'\]"):
        columns(["a", "label"], text_column="c")


def test_labels_are_encoded_or_refused():
    def splits(**labels):
        rows = {name: {"label": values, "text": ["x"] * len(values)} for name, values in labels.items()}
        return {name: datasets.Dataset.from_dict(columns) for name, columns in rows.items()}

    encoded, names = _data.encode_labels(splits(train=["b", "a", "b"], test=["a"]), "label")
    assert names == ["a", "b"]
    assert list(encoded["train"]["labels"]) == [1, 0, 1]
    assert list(_data.encode_labels(splits(train=[10, 2], test=[-1]), "label")[0]) == ["train"]
    with pytest.raises(ValueError, match=r"row 1 of the test split has the label 'c', which is none of \['a', 'b'\]"):
        _data.encode_labels(splits(train=["a", "b"], test=["a", "c"]), "label")
    with pytest.raises(ValueError, match="one class only"):
        _data.encode_labels(splits(train=["a"]), "label")
    with pytest.raises(ValueError, match=r"holds 0.5; labels must be strings or integers"):
        _data.encode_labels(splits(train=[0.5, 1.5]), "label")


def test_blocks_keep_the_text():
    """Lines run on, documents are closed with the end-of-sequence token, empty rows vanish."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = datasets.Dataset.from_dict({"text": ["one\n", "", "two\n", "three", "four"]})
    blocks = _tasks.tokenize_blocks({"train": rows}, "text", tokenizer, 5, None)["train"]
    assert tokenizer.decode([i for row in blocks["input_ids"] for i in row]) == "one\ntwo\nthree</s>f"
    with pytest.raises(ValueError, match="has 19 tokens, less than one block of 64; lower --block_size"):
        _tasks.tokenize_blocks({"train": rows}, "text", tokenizer, 64, None)


def test_digits_are_always_the_same():
    digits = load_digits()
    assert {name: len(split) for name, split in digits.items()} == {"train": 1197, "validation": 150, "test": 450}
    assert digits["test"]["label"][:8] == [2, 0, 4, 9, 4, 1, 2, 4]
    assert digits["test"]["image"][0].size == (8, 8)
