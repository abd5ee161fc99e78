"""A cost model of linear layers: operations, bytes and launches become seconds, dense and on views, for any machine.

A layer of R rows, C columns and k runs, on T tokens, in words of w bytes:

    product          max(2 T R C / flops, w R C / bandwidth), the bandwidth being that of where the weights lie: the
                     cache if the whole shared array fits (or all dense weights do), else memory
    backward pass    twice the product; the dense weight's gradient is w R C of fresh memory, ours is added to a buffer
    row scale        a pass over the outputs forward (2 w T R) and one backward (2 w T R): ours only
    further runs     k - 1 times launches of their own, and x is read and packed once more (2 w T C)
    made weights     3 passes over W (w R C each) forward, 4 backward, instead of row scale and further runs
    launches         operations issued one after the other
    folded inputs    the product with R C / c weights, in blocks; x is signed and mixed (4 w T C and 2 T C c operations)
                     once for each input, and its gradient again; row scale as above, or 3 passes over the R C / c
                     weights, whichever is less
    AdamW step       28 bytes per parameter in float32 (read four arrays, write three), and 12 for clipping

Whether a weight is made is asked of the library itself, and k of its map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmark.models import STACKS, Stack
from hf_rps import RPSConfig
from hf_rps.mappings.base import Target
from hf_rps.products.base import Made, Product, choose, products_of
from hf_rps.targets import find_targets


@dataclass(frozen=True)
class Machine:
    """What the model knows of a machine.

    Attributes:
        word: Bytes per number.
        flops: Of large matrix products, per second.
        memory, cache: Bandwidth, bytes per second.
        one_token: The same of the memory for a library's product with one token, which may be less.
        cache_size: Bytes that stay in the cache.
        fresh: Seconds per byte of memory that was not touched before, which blocks from ``fresh_from`` bytes on are.
        launch: Seconds per operation, at least.
        device: "cpu" or "cuda".
    """

    name: str
    word: int
    flops: float
    memory: float
    cache: float
    one_token: float
    cache_size: float
    fresh: float
    fresh_from: float
    launch: float
    device: str


MACHINES = (
    # two cores with 32 MB of L3, of which about 12 MB stay ours; each number from a measurement of its own
    Machine("CPU", 4, 195e9, 22e9, 70e9, 12.6e9, 12e6, 0.33e-9, 32e6, 3e-6, "cpu"),
    # data sheet (bandwidth, cache) and usual values (launch, reachable product rate); not measured
    Machine("H200", 2, 700e12, 4.8e12, 10e12, 4.8e12, 50e6, 0.0, 0.0, 5e-6, "cuda"),
)

# two cores with a large L3, of which 64 MB were tried; each number from a measurement of its own
XEON = Machine("Xeon", 4, 310e9, 26e9, 53e9, 31e9, 64e6, 0.14e-9, 32e6, 1.9e-6, "cpu")

SMALL = 1 << 20  # weights of a model in which Python's own time, of which the model knows nothing, is what counts


class Layer(NamedTuple):
    rows: int
    cols: int
    runs: int
    products: tuple[Product, ...]
    reads_new_input: bool = True  # not what the layer before it reads: keys and values read what queries do


def layers(name: str, ratio: float, form: str = "views") -> tuple[list[Layer], int]:
    """The linear layers of a stack of :mod:`benchmark.models`, and the size m of the array that they share."""
    with torch.device("meta"):
        found = find_targets(Stack(STACKS[name]), RPSConfig())
    targets = [Target(candidate.name, *candidate.weight.shape, 0.02) for candidate in found]
    weight_map = RPSConfig(ratio=ratio, input_fold="full" if form == "folded" else 1).weight_map(targets)
    result = []
    for target in targets:
        matrix = weight_map.matrix(target.name)
        inner = matrix.inner if form == "folded" else matrix
        new = target.name.rpartition(".")[2] not in ("key", "value", "up")  # as benchmark.models.Block calls them
        new = new or (target.name.endswith("up") and not STACKS[name].gated)
        result.append(Layer(matrix.rows, matrix.cols, len(inner.layout.runs), products_of(matrix), new))
    return result, weight_map.m


def _product(layer: Layer, tokens: int, machine: Machine, bandwidth: float) -> float:
    weights = layer.rows * layer.cols
    return max(2 * tokens * weights / machine.flops, machine.word * weights / bandwidth)


def dense_seconds(stack: list[Layer], tokens: int, machine: Machine, backward: bool) -> float:
    """Of a pass through dense layers: forward, or forward and backward."""
    size = machine.word * sum(layer.rows * layer.cols for layer in stack)
    memory = machine.one_token if tokens == 1 else machine.memory
    bandwidth = machine.cache if size <= machine.cache_size else memory
    total = 0.0
    for layer in stack:
        total += _product(layer, tokens, machine, bandwidth) + machine.launch
        if backward:
            gradient = machine.word * layer.rows * layer.cols
            total += 2 * _product(layer, tokens, machine, bandwidth) + 3 * machine.launch
            total += gradient / machine.memory + (machine.fresh * gradient if gradient >= machine.fresh_from else 0)
    return total


def shared_seconds(stack: list[Layer], m: int, tokens: int, machine: Machine, backward: bool) -> float:
    """The same of layers that share an array of ``m`` numbers."""
    inside = machine.word * m * (2 if backward else 1) <= machine.cache_size
    bandwidth = machine.cache if inside else machine.memory
    total = 0.0
    for layer in stack:
        weights, word = layer.rows * layer.cols, machine.word
        # the library asks where x is; nothing is computed, and what is not on a CPU it takes for a GPU's
        x = torch.empty(1, device="cpu" if machine.device == "cpu" else "meta").expand(tokens, layer.cols)
        further = layer.runs - 1
        made = isinstance(choose(layer.products, x), Made)
        passes = 2 if backward else 1
        total += (3 if backward else 1) * _product(layer, tokens, machine, bandwidth)
        if made:
            total += word * weights * (7 if backward else 3) / bandwidth + passes * (3 + further) * machine.launch
        else:
            total += passes * 2 * word * tokens * layer.rows / machine.memory
            total += (3 if backward else 1) * further * (2 * word * tokens * layer.cols / machine.memory)
            total += passes * (2 + 5 * further) * machine.launch
        if backward:
            total += word * weights / bandwidth + 2 * machine.launch
    return total


def folded_seconds(stack: list[Layer], m: int, tokens: int, machine: Machine, backward: bool) -> float:
    """The same where inputs are folded as far as the ratio allows."""
    inside = machine.word * m * (2 if backward else 1) <= machine.cache_size
    bandwidth = machine.cache if inside else machine.memory
    total = 0.0
    for layer in stack:
        word, fold = machine.word, layer.products[0].input_fold
        narrow = layer._replace(cols=layer.cols / fold.c)
        weights = narrow.rows * narrow.cols
        product = _product(narrow, tokens, machine, bandwidth)
        total += (3 if backward else 1) * product + (5 if backward else 2) * machine.launch
        scaled = min(2 * word * tokens * layer.rows / machine.memory, 3 * word * weights / bandwidth)
        total += (2 if backward else 1) * (scaled + machine.launch)
        if backward:
            total += word * weights / bandwidth  # added to a buffer
        if layer.reads_new_input:
            folding = 4 * word * tokens * layer.cols / machine.memory
            folding += 2 * tokens * fold.multiplications / machine.flops + 4 * machine.launch
            total += (2 if backward else 1) * folding
    return total


def optimizer_seconds(parameters: int, machine: Machine) -> float:
    """Of clipping and an AdamW step in float32, all from memory."""
    return 40 * parameters / machine.memory


def predict(name: str, ratio: float, tokens: int, machine: Machine, direction: str, form: str = "views") -> float:
    """Predicted time ratio of ours to dense; direction "forward", "forward + backward" or "training step"."""
    stack, m = layers(name, ratio, form)
    backward = direction != "forward"
    dense = dense_seconds(stack, tokens, machine, backward)
    ours = (folded_seconds if form == "folded" else shared_seconds)(stack, m, tokens, machine, backward)
    if direction == "training step":
        dense += optimizer_seconds(sum(layer.rows * layer.cols for layer in stack), machine)
        ours += optimizer_seconds(m, machine)
    return ours / dense


def table(rows: list[dict]) -> str:
    """The measured rows of layer stacks beside the predictions for the CPU that they are from, Markdown."""
    head = ["stack", "form", "ratio", "measured", "predicted for this CPU", "off by", "predicted for an H200"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        known = row["work"] == "stack" and row["form"] in ("views", "folded") and row["dtype"] == "float32"
        if not known or row["part"] != 1 or row["n"] <= SMALL:
            continue  # the model knows whole stacks only
        own = XEON if "Xeon" in row["device"] else MACHINES[0]
        asked = (row["model"], row["ratio"], row["tokens"])
        cpu, gpu = (predict(*asked, machine, row["direction"], row["form"]) for machine in (own, MACHINES[1]))
        off = f"{100 * (cpu / row['time_ratio'] - 1):+.0f} %"
        cells = [f"{row['model']}: {row['case']}", row["form"], f"{row['ratio']:g}", f"{row['time_ratio']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{cpu:.2f}", off, f"{gpu:.2f}"]) + " |")
    return "\n".join(lines)
