"""finetuning/batches.py: any number of processes, resumed anywhere, sees each sample of an epoch once, in one order."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

datasets = pytest.importorskip("datasets")
from finetuning.batches import COUNT, NUMBERS, Batches  # noqa: E402


def collate(rows):
    return {"x": torch.tensor([row["x"] for row in rows])}


def dataset(length, stream=False):
    rows = datasets.Dataset.from_dict({"x": [10 * i for i in range(length)]})
    return rows.to_iterable_dataset() if stream else rows


def seen(length, size, processes, epoch=0, start=0, stop=None, stream=False, **options):
    """Global batches from sample ``start`` on, ``stop`` of them: the numbers that count, over all processes."""
    rows = dataset(length, stream)
    parts = [
        list(Batches(rows, collate, size, index, processes, **options).epoch(epoch, start))
        for index in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1  # every process takes part in as many passes
    batches = []
    for together in list(zip(*parts, strict=True))[:stop]:
        assert all(batch["x"].tolist() == [10 * number for number in batch[NUMBERS]] for batch in together)
        batches.append([number for batch in together if batch[COUNT] for number in batch[NUMBERS]])
    return batches


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40), size=st.integers(1, 5), processes=st.integers(1, 4), stream=st.booleans(),
    epoch=st.integers(0, 2), seed=st.integers(0, 3),
)  # fmt: skip
def test_every_sample_once_in_the_same_order(length, size, processes, stream, epoch, seed):
    options = {"seed": seed, "shuffle": not stream, "stream": stream}
    batches = seen(length, size, processes, epoch, **options)
    one = seen(length, size * processes, 1, epoch, **options)
    assert batches == one
    assert sorted(chain(*batches)) == list(range(length))


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40), sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    processes=st.tuples(st.integers(1, 4), st.integers(1, 4)), done=st.integers(0, 8), stream=st.booleans(),
)  # fmt: skip
def test_resumed_with_other_processes_and_batches(length, sizes, processes, done, stream):
    options = {"seed": 1, "shuffle": not stream, "stream": stream}
    before = seen(length, sizes[0], processes[0], 3, stop=done, **options)
    position = min(done * sizes[0] * processes[0], length)
    after = seen(length, sizes[1], processes[1], 3, start=position, **options)
    whole = seen(length, 40, 1, 3, **options)
    assert [*chain(*before), *chain(*after)] == list(chain(*whole))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(seen(20, 20, 1, epoch, seed=seed, shuffle=True)[0]) for epoch in (0, 1) for seed in (0, 1)}
    assert len(orders) == 4


def test_grouped_by_length_every_sample_once_and_like_with_like():
    lengths = np.random.default_rng(0).integers(1, 100, 5000)
    batches = Batches(dataset(5000), collate, 10, seed=0, shuffle=True, lengths=lengths)
    order = batches.order(0)
    assert sorted(order.tolist()) == list(range(5000))
    assert not np.array_equal(order, batches.order(1))
    spread = np.ptp(lengths[order].reshape(-1, 10), axis=1)
    assert np.median(spread) <= 1


@pytest.mark.parametrize("stream", [False, True])
def test_augmentation_depends_on_the_sample_not_on_the_processes(stream):
    def augment(row, seed):
        return {"x": [row["x"], seed]}

    def collate_pairs(rows):
        return {"x": torch.tensor([row["x"] for row in rows])}

    def drawn(size, processes, start=0, epoch=0):
        seeds = {}
        for index in range(processes):
            rows = Batches(dataset(11, stream), collate_pairs, size, index, processes, augment=augment)
            for batch in rows.epoch(epoch, start):
                seeds |= {number: seed for number, (_, seed) in zip(batch[NUMBERS], batch["x"].tolist(), strict=True)}
        return seeds

    alone = drawn(4, 1)
    assert len(set(alone.values())) == 11
    assert drawn(2, 3) == alone
    assert drawn(3, 1, start=5) == {number: seed for number, seed in alone.items() if number in drawn(3, 1, start=5)}
    assert set(drawn(4, 1, epoch=1).values()).isdisjoint(alone.values())


def test_loading_leaves_the_random_generator_alone():
    state = torch.get_rng_state()
    list(Batches(dataset(9), collate, 2, shuffle=True).epoch())
    assert torch.equal(state, torch.get_rng_state())


def test_workers_load_the_same_batches():
    alone, helped = (
        [batch[NUMBERS] for batch in Batches(dataset(9), collate, 2, shuffle=True, num_workers=n).epoch()]
        for n in (0, 2)
    )
    assert alone == helped
