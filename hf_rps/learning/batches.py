"""What a model is called with while a map is learned: a data loader's batches, or texts and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOST_TOKENS = 2048  # of one text


def batches_of(calibration: Any, model: nn.Module, tokenizer: Any = None) -> list:
    """What the model is to be called with, from a data loader's batches or from texts.

    Args:
        calibration: An iterable of batches (dictionaries of arguments, tensors or tuples), or of texts.
        model: Whose config names the tokenizer of the texts, unless ``tokenizer`` is given.

    Raises:
        ValueError: There is nothing in it, only texts without a token, or texts and no tokenizer for them.
    """
    if isinstance(calibration, (str, bytes, Mapping, Tensor)):
        raise ValueError(
            f"calibration must be a list of texts or of batches (a DataLoader), got one {type(calibration).__name__}"
        )
    batches = list(calibration)
    if batches and isinstance(batches[0], str):
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        tokens = [tokenizer(text, truncation=True, max_length=MOST_TOKENS, return_tensors="pt") for text in batches]
        batches = [batch for batch in tokens if batch["input_ids"].numel()]
    if not batches:
        raise ValueError("calibration is empty; give a few thousand tokens, as texts or as batches of a DataLoader")
    return batches


def _tokenizer_of(model: nn.Module):
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"calibration holds texts, and no tokenizer is found for this {type(model).__name__} (name {name!r}: "
            f"{error}). Pass tokenizer=..., or batches of a DataLoader"
        ) from error


def moved(batch: Any, device: torch.device) -> Any:
    """``batch`` with all its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    return type(batch)(moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch
