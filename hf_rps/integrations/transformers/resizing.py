"""resize_token_embeddings of a compressed model: refused before anything changes where a table it resizes is shared."""

from __future__ import annotations

import math

from torch import nn

from hf_rps.layers.base import RPSLayer
from hf_rps.names import outer_name


def looking_first(original):
    """resize_token_embeddings of a transformers model, which swaps the input embedding before it looks at the head."""

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, *args, **kwargs):
        check_tables(self, new_num_tokens, pad_to_multiple_of)
        return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return resize_token_embeddings


def check_tables(model: nn.Module, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> None:
    """Refuse another number of tokens where the map records the rows of the input embedding or of the output head.

    Raises:
        ValueError: One of them is a layer with a shared weight, of another number of rows.
    """
    embedding = model.get_input_embeddings()
    for what, layer in (("an input embedding", embedding), ("an output head", model.get_output_embeddings())):
        if not isinstance(layer, RPSLayer):
            continue
        wanted = _wanted(embedding, new_num_tokens, pad_to_multiple_of)
        if wanted not in (None, layer.weight_shape[0]):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) needs {what} of {wanted} rows, but "
                f"{outer_name(layer.name)!r} of this {type(model).__name__} has a shared weight of "
                f"{layer.weight_shape[0]} rows, which its map records. Resize the dense model before get_rps_model, "
                f"leave the layer out with exclude_modules, or call hf_rps.to_dense(model), resize, and compress anew"
            )


def _wanted(embedding: nn.Module, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int | None:
    """How many rows transformers would give to the embedding and the head; None where it changes nothing."""
    if pad_to_multiple_of is None:
        return new_num_tokens
    wanted = embedding.weight.shape[0] if new_num_tokens is None else new_num_tokens
    return math.ceil(wanted / pad_to_multiple_of) * pad_to_multiple_of
