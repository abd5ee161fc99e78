"""From rows to what a model reads: texts to token ids, images to pixels, blocks to a batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from datasets import IterableDataset
from transformers import DataCollatorForLanguageModeling

from finetuning.data.sources import Splits


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
    """Lists of words, each with a label, to token ids; a word's first token has its label, the others have -100."""

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
