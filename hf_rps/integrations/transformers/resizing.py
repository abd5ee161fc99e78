"""resize_token_embeddings of a compressed model: refused before anything changes where the output head is shared."""

from __future__ import annotations

import inspect
import math

from torch import nn

from hf_rps.layers.base import RPSLayer


def resize_token_embeddings(new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs):
    """In the place of a marked model's ``_resize_token_embeddings``, which swaps the input embedding before it looks at
    the head: look first.

    It is an attribute of the model that must not hold the model (a cycle, and a copy would resize the original), so it
    finds the model in the frame of the method that calls it.

    Raises:
        ValueError: The output head is a layer with a shared weight, whose number of rows the map records.
    """
    frame = inspect.currentframe().f_back
    model = frame.f_locals["self"]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, RPSLayer):
        wanted = _wanted(embedding, new_num_tokens, pad_to_multiple_of)
        if wanted not in (None, head.weight_shape[0]):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) needs an output head of {wanted} rows, but the head "
                f"{head.name.removeprefix('/')!r} of this {type(model).__name__} has a shared weight of "
                f"{head.weight_shape[0]} rows, which its map records. Resize the dense model before get_rps_model, "
                f"leave the head out of target_modules, or call hf_rps.to_dense(model), resize, and compress anew"
            )
    return type(model)._resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _wanted(embedding: nn.Module, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int | None:
    """How many rows transformers would give to the embedding and the head; None where it changes nothing."""
    if pad_to_multiple_of is None:
        return new_num_tokens
    wanted = embedding.weight.shape[0] if new_num_tokens is None else new_num_tokens
    return math.ceil(wanted / pad_to_multiple_of) * pad_to_multiple_of
