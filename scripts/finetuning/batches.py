"""Which samples make which batch: the order of an epoch, dealt out to the processes, from any position on.

The order depends on the seed and the epoch only. A global batch is the next ``batch_size * num_processes`` samples of
it, and every process takes an equal part of that. So any number of processes sees the same global batches, a run can
continue at any sample, and nothing is skipped or repeated. What is left at the end of an epoch makes a smaller batch; a
process for which nothing is left gets one sample that does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from datasets import IterableDataset as Stream
from torch.utils.data import DataLoader, Dataset, IterableDataset

COUNT, NUMBERS = "num_samples", "numbers"  # keys of a batch that the model does not see
_SORTED_TOGETHER = 3200  # a number of its own: were it a number of batches, the order would depend on the processes


def model_inputs(batch: dict) -> dict:
    """What of a batch the model sees."""
    return {name: value for name, value in batch.items() if name not in (COUNT, NUMBERS)}


@dataclass
class Batches:
    """Batches of a split for one process; ``epoch(...)`` iterates over one epoch of them, on the CPU.

    Args:
        dataset: Rows, or a stream of rows.
        collate: Makes a batch, a dict of tensors, of a list of rows.
        batch_size: Samples per process and batch.
        process_index, num_processes: Of all the processes, which one this is.
        seed: Of the order and of ``augment``.
        shuffle: Whether the order is random; a stream keeps the order that it has.
        num_workers: Processes that load batches.
        augment: Random change of one row, given the row and a seed that depends on the run's seed, the epoch and the
            number of the row, and thus neither on the number of processes nor on where a run was resumed.
        lengths: Tokens of each row; with them the random order is sorted by length within 3,200 rows at a time, so
            that batches hold rows of about one length and little padding.

    A batch also has under "num_samples" how many samples count (0 or all of them) and under "numbers" which rows.
    """

    dataset: Dataset | Stream
    collate: Callable[[list[dict]], dict]
    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    seed: int = 0
    shuffle: bool = False
    num_workers: int = 0
    augment: Callable[[dict, int], dict] | None = None
    lengths: np.ndarray | None = None

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.num_processes

    @property
    def num_samples(self) -> int | None:
        """Samples per epoch; None for a stream."""
        return None if isinstance(self.dataset, Stream) else len(self.dataset)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[dict]:
        """Batches of ``epoch`` from its sample number ``start`` on."""
        options = {
            "num_workers": self.num_workers,
            "collate_fn": _Collate(self.collate, self.augment, self.seed, epoch),
            "pin_memory": torch.cuda.is_available(),
            # the loader draws a seed for its workers; from here, it leaves the global generator as it was
            "generator": torch.Generator().manual_seed(epoch),
        }
        if isinstance(self.dataset, Stream):
            return iter(DataLoader(_StreamBatches(self, epoch, start), batch_size=None, **options))
        order = self.order(epoch)
        globals_ = (order[i : i + self.global_batch_size] for i in range(start, len(order), self.global_batch_size))
        sampler = [self.part(list(map(int, samples))) for samples in globals_]
        return iter(DataLoader(_Numbered(self.dataset), batch_sampler=sampler, **options))

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the rows in the order of ``epoch``."""
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        if self.lengths is not None:
            parts = np.split(order, range(_SORTED_TOGETHER, len(order), _SORTED_TOGETHER))
            order = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])
        return order

    def part(self, samples: list) -> list:
        """This process's part of a global batch, as (sample, whether it counts)."""
        size, rest = divmod(len(samples), self.num_processes)
        start = self.process_index * size + min(self.process_index, rest)
        mine = samples[start : start + size + (self.process_index < rest)]
        return [(sample, True) for sample in mine] or [(samples[-1], False)]

    def steps_per_epoch(self, accumulation: int, start: int = 0) -> int:
        """Optimizer steps of ``accumulation`` batches from sample ``start`` to the end of the epoch."""
        return math.ceil((len(self.dataset) - start) / (self.global_batch_size * accumulation))


class _Numbered(Dataset):
    """Rows of a dataset, each with its number and whether it counts."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, items: list[tuple[int, bool]]) -> list[tuple[int, dict, bool]]:
        rows = self.dataset.__getitems__([number for number, _ in items])
        return [(number, row, counts) for (number, counts), row in zip(items, rows, strict=True)]


class _StreamBatches(IterableDataset):
    """Every process reads the whole stream and keeps its own parts; what is before ``start`` is passed over."""

    def __init__(self, batches: Batches, epoch: int, start: int):
        self.batches, self.epoch, self.start = batches, epoch, start

    def __iter__(self):
        self.batches.dataset.set_epoch(self.epoch)
        rows = islice(zip(count(), self.batches.dataset), self.start, None)
        while samples := list(islice(rows, self.batches.global_batch_size)):
            yield [(number, row, counts) for (number, row), counts in self.batches.part(samples)]


@dataclass
class _Collate:
    collate: Callable
    augment: Callable | None
    seed: int
    epoch: int

    def __call__(self, items: list[tuple[int, dict, bool]]) -> dict:
        rows = [row for _, row, _ in items]
        if self.augment:
            generators = (np.random.SeedSequence([self.seed, self.epoch, number]) for number, _, _ in items)
            rows = [
                self.augment(row, int(g.generate_state(1, np.uint64)[0] >> 1))
                for row, g in zip(rows, generators, strict=True)
            ]
        batch = dict(self.collate(rows))
        batch[COUNT] = sum(counts for _, _, counts in items)
        batch[NUMBERS] = [number for number, _, _ in items]
        return batch
