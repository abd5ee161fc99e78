"""What a learned map is calibrated on: rows of the training split, as the task reads them, without augmentation."""

from __future__ import annotations

from datasets import IterableDataset as Stream

from finetuning.arguments.model import SAMPLES, TOKENS
from finetuning.batches import Batches, model_inputs
from finetuning.tasks import Data

_BATCH_SIZE = 8  # a number of its own: what is learned must not depend on how a run is launched


def calibration_batches(data: Data, samples: int | None, seed: int) -> list[dict]:
    """Batches on which the model is to be called, the same for the same data, seed and ``samples``.

    Args:
        data: Whose training split is read, in an order that depends on ``seed``; of a stream the beginning.
        samples: Rows; None: of texts as many whole batches of 8 as hold 8,192 tokens, of other data 64 rows.
        seed: Of the order.
    """
    rows = data.splits["train"]
    rows = rows if isinstance(rows, Stream) else rows.shuffle(seed=seed)
    if samples is not None:
        rows = rows.take(min(samples, len(rows)) if not isinstance(rows, Stream) else samples)
        if samples == 0:
            return []
    batches, tokens = [], 0
    for batch in Batches(rows, data.collate, _BATCH_SIZE).epoch():
        inputs = model_inputs(batch)
        batches.append(inputs)
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        tokens += int(mask.sum()) if mask is not None else 0 if ids is None else ids.numel()
        enough = tokens >= TOKENS if ids is not None else len(batches) * _BATCH_SIZE >= SAMPLES
        if samples is None and enough:
            break
    return batches
