#!/usr/bin/env python
"""Time of one layer by each product beside the dense layer, in microseconds a call, the most telling cases first.

    python scripts/benchmark/products.py --device cuda --seconds 40 --output products.jsonl

A line of JSON per case, as it is measured; it stops at the time limit. For every way to read the weight:

- forward: without gradients, call by call, as Python issues them;
- graph: the same in a CUDA graph of many calls, which is the device's own time;
- both: forward and backward pass, call by call.

Dense layers take turns with as many others as overflow the device's cache, as the layers of a model do. The compressed
layer is always the same one: its array stays in the cache, as a model's does where it fits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import PRODUCTS, Made, always, choose
from hf_rps.products.triton.product import TritonProduct
from hf_rps.psi.bank import Bank

SHAPES = ((8192, 2048), (2048, 8192), (2048, 2048), (3072, 768), (768, 768))  # (rows, cols)
RUNS = (2, 8, 1)
TOKENS = (1, 8, 64, 512, 4096)
_CACHE = 128 << 20  # bytes, more than a device's cache has
_CALLS = 16  # in one graph
_SEEDS = 500  # tried for the wanted number of runs


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    result.add_argument("--seconds", type=float, default=40.0, help="when to stop, about")
    result.add_argument("--output", type=Path, help="a file to write to, beside what is printed")
    return result


def cases() -> Iterator[tuple[int, int, int, int]]:
    """(rows, cols, runs, tokens): all shapes with few tokens first, then all with more runs, then with more tokens."""
    few, many = TOKENS[:2], TOKENS[2:]
    for tokens, runs in (*itertools.product((few,), RUNS), *itertools.product((many,), RUNS)):
        for shape in SHAPES:
            for count in tokens:
                yield *shape, runs, count


def map_with(rows: int, cols: int, runs: int) -> WeightMap | None:
    """A map whose first matrix has that many runs; None where no seed gives it."""
    fillers = 1 if runs == 1 else 0
    targets = [Target(name, rows, cols, 0.02) for name in ("it", "filler")[: 1 + fillers]]
    for seed in range(_SEEDS):
        weight_map = WeightMap(targets, ratio=min(1.0, 2 / runs), seed=seed)
        group, span = weight_map._places["it"]
        if len(group.runs(span.start, span.stop)) == runs:
            return weight_map
    return None


class Case:
    """One shape, number of runs and number of tokens, with the layers to be timed."""

    def __init__(self, rows: int, cols: int, runs: int, tokens: int, device: str, dtype: torch.dtype):
        weight_map = map_with(rows, cols, runs)
        self.missing = weight_map is None
        if self.missing:
            return
        options = {"device": device, "dtype": dtype}
        size = rows * cols * dtype.itemsize
        copies = max(1, min(_CALLS, _CACHE // size)) if device == "cuda" else 1
        self.dense = [nn.Linear(cols, rows, **options) for _ in range(copies)]
        self.bank = Bank(weight_map, "none", **options)
        nn.init.normal_(self.bank.psi)
        self.layer = RPSLinear("it", self.bank, self.dense[0])
        self.x = torch.randn(tokens, cols, **options)
        self.device = device

    def ways(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Names, and what to call to have the layer's weight read so."""
        yield "dense", lambda: None
        array, available = self.bank.array, [type(product) for product in self.layer.shared.products]
        for kind in dict.fromkeys((*PRODUCTS, Made)):
            if kind in available and (self.device == "cuda" or kind is not TritonProduct):
                yield kind.__name__, lambda kind=kind: setattr(array, "choose", always(kind))

    def chosen(self) -> str:
        return type(choose(self.layer.shared.products, self.x)).__name__

    def measure(self) -> dict:
        row = {"chosen": self.chosen()}
        for name, take in self.ways():
            take()
            layers = itertools.cycle(self.dense if name == "dense" else [self.layer])
            try:
                row |= {f"{name} {what}": value for what, value in self._times(layers)}
            except Exception as error:  # the other ways are worth having
                row[f"{name} error"] = f"{type(error).__name__}: {error}"[:200]
        return row

    def _times(self, layers: Iterator[nn.Module]) -> Iterator[tuple[str, float]]:
        inputs = self.x.clone().requires_grad_()

        def forward():
            with torch.no_grad():
                next(layers)(self.x)

        def both():
            layer = next(layers)
            layer(inputs).sum().backward()
            inputs.grad = None
            for parameter in (*layer.parameters(), self.bank.psi):
                parameter.grad = None

        yield "forward", _microseconds(forward, self.device)
        if self.device == "cuda":
            yield "graph", _microseconds(_graph(forward), self.device) / _CALLS
        yield "both", _microseconds(both, self.device)


def _graph(work: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            work()
    return graph.replay


def _microseconds(work: Callable[[], None], device: str, rounds: int = 3) -> float:
    """Median over rounds of the time of one call. A round is some six milliseconds long."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        return (time.perf_counter() - start) / calls

    timed(1)
    first = timed(2)
    if first > 0.05:
        return round(first * 1e6, 2)
    calls = max(3, min(200, int(0.006 / first)))
    return round(statistics.median(timed(calls) for _ in range(rounds)) * 1e6, 2)


def main() -> None:
    args = parser().parse_args()
    end = time.monotonic() + args.seconds
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    output = args.output.open("a", encoding="utf-8") if args.output else None
    for rows, cols, runs, tokens in cases():
        if time.monotonic() > end:
            break
        case = Case(rows, cols, runs, tokens, args.device, getattr(torch, args.dtype))
        if case.missing:
            continue
        row = {"rows": rows, "cols": cols, "runs": runs, "tokens": tokens, "dtype": args.dtype, "device": name}
        line = json.dumps(row | case.measure())
        for file in filter(None, (sys.stdout, output)):
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
