"""The works that are counted, in bytes: memory of a training step against a formula, and gradients reduced."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmark.processes import Gauge
from benchmark.settings import Settings
from benchmark.subjects import Subject, build
from benchmark.works import Training, random_ids


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory(settings: Settings, gauge: Gauge, name: str, subject: Subject, tokens: int):
    """Serve the account of one training step on a sequence of ``tokens``, bytes.

    targets_ratio: What the targeted weights need (weights, gradients, AdamW's moments, and what the form keeps for
        them), over weight, gradient and two moments of each of the n weights of the dense model.
    state: The same of the whole model.
    saved: What autograd keeps from the forward to the backward pass: distinct storages, those of the state left out.
    predicted: state + saved, as if everything saved were still there when the last gradient arrives.
    measured: Peak of a step once the optimizer has its state.
    transients: measured - predicted; below zero where saved tensors are freed before gradients take their place.
    """
    built = build("memory", name, subject, settings)
    training = Training(built, settings)
    ids = random_ids(built, settings, 1, tokens)
    training.step(ids)  # makes what is made once: AdamW's moments, divisors
    parameters, kept = list(built.model.parameters()), built.kept()
    own = {t.untyped_storage().data_ptr() for t in [*parameters, *built.model.buffers(), *kept]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.loss(ids)
    training.update(loss)
    del loss

    def trained(tensors: list[Tensor]) -> int:
        gradients = [p.grad for p in tensors if p.grad is not None]
        moments = [moment for p in tensors for moment in training.optimizer.state.get(p, {}).values()]
        return size([*tensors, *gradients, *moments])

    state, saved = trained(parameters) + size(kept) + size(built.model.buffers()), sum(storages.values())
    targets_ratio = (trained(built.stored) + size(kept)) / (4 * built.n * settings.torch_dtype.itemsize)
    training.optimizer.zero_grad()

    def answer(_: object) -> dict:
        gauge.reset()
        training.step(ids)
        measured, predicted = gauge.peak(), state + saved
        return {
            "targets_ratio": targets_ratio, "state": state, "saved": saved, "predicted": predicted,
            "measured": measured, "transients": measured - predicted,
        }  # fmt: skip

    return {"n": built.n, "m": built.m}, answer


def reduced(settings: Settings, gauge: Gauge, name: str, subject: Subject, tokens: int):
    """Serve the bytes that DistributedDataParallel reduces in one step, counted in a world of one process (gloo)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    built = build("reduced", name, subject, settings)
    buckets: list[int] = []

    def count(_, bucket):  # annotations that are strings are refused
        buckets.append(size([bucket.buffer()]))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(built.model)
    model.register_comm_hook(None, count)
    ids = random_ids(built, settings, 1, tokens)

    def answer(_: object) -> dict:
        buckets.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        return {"reduced": sum(buckets)}

    return {"n": built.n, "m": built.m}, answer
