"""The works that are timed: for each, the cases of one model, as functions to call again and again."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from benchmark.processes import Gauge
from benchmark.settings import Settings
from benchmark.subjects import QUANTISERS, Built, Subject, build

DECODED_AFTER = 64  # tokens in the cache when one more is decoded
IMAGES = 8


@dataclass(frozen=True)
class Case:
    """What is timed: ``direction`` names the operation, the rest its size where it has one."""

    direction: str
    tokens: int | None = None
    batch: int = 1
    pixels: int | None = None

    def __str__(self) -> str:
        sizes = [f"batch {self.batch}"] if self.batch > 1 else []
        if self.tokens is not None:
            sizes.insert(0, f"{self.tokens} token{'s' if self.tokens > 1 else ''}")
        if self.pixels is not None:
            sizes.append(f"{self.pixels} x {self.pixels} pixels")
        return ", ".join([self.direction, *sizes])


Cases = dict[Case, Callable[[], object]]


class Request(NamedTuple):
    """Run ``case`` ``runs`` times; with ``warm`` once more before, after which the memory's peak starts anew."""

    case: Case
    runs: int
    warm: bool = False


class Answer(NamedTuple):
    """Seconds of a run, the peak of memory in bytes since the last warming up, and a warming run's operations."""

    seconds: float
    peak: int
    flops: int | None = None


def stack(built: Built, settings: Settings) -> Cases:
    """Forward, and forward + backward, of a stack of linear layers. Its input needs no gradient, inner ones do.

    On CUDA the forward pass in a CUDA graph, too.
    """
    model, cases = built.model, {}
    for tokens in settings.tokens:
        x = torch.randn(tokens, model.hidden, dtype=settings.torch_dtype, device=settings.device)
        cases |= _both_directions(model, lambda x=x: model(x), {"tokens": tokens})
        if settings.device == "cuda":
            cases[Case("forward in a CUDA graph", tokens)] = _replay(lambda x=x: model(x))
    return cases


@torch.no_grad()
def _replay(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """``forward`` captured in a CUDA graph: the device's own time, without that of Python and of launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


def convolution(built: Built, settings: Settings) -> Cases:
    """The same of a convolutional network on images of two sizes; its normalisation is that of evaluation."""
    model, cases = built.model.eval(), {}
    for pixels in (64, 224):
        images = torch.randn(IMAGES, 3, pixels, pixels, dtype=settings.torch_dtype, device=settings.device)
        size = {"batch": IMAGES, "pixels": pixels}
        cases |= _both_directions(model, lambda images=images: model(images).logits, size)
    return cases


def _both_directions(model: torch.nn.Module, output: Callable[[], Tensor], size: dict) -> Cases:
    def backward() -> None:
        output().sum().backward()
        model.zero_grad()

    return {Case("forward", **size): torch.no_grad()(output), Case("forward + backward", **size): backward}


class Training:
    """Training steps of a language model: forward, backward, clipping to norm 1, AdamW, gradients dropped.

    A loop of its own, which nothing but its steps is in: what finetune.py does around a step would be timed with it.
    """

    def __init__(self, built: Built, settings: Settings):
        self.built, self.model = built, built.model
        self.trained = [p for p in built.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=settings.fused or None)

    def loss(self, ids: Tensor) -> Tensor:
        """Of token ids (batch, tokens)."""
        return self.model(input_ids=ids, labels=ids).loss

    def update(self, loss: Tensor) -> None:
        """All of a step after the forward pass but dropping the gradients."""
        loss.backward()
        self.built.after_backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def step(self, ids: Tensor) -> None:
        self.update(self.loss(ids))
        self.optimizer.zero_grad()


def random_ids(built: Built, settings: Settings, batch: int, tokens: int) -> Tensor:
    """Token ids (batch, tokens)."""
    return torch.randint(0, built.model.config.vocab_size, (batch, tokens), device=settings.device)


def step(built: Built, settings: Settings, kind: str = "AdamW step") -> Cases:
    """A whole training step on one sequence, for each of the settings' ``step_tokens``."""
    training, kind = Training(built, settings), f"fused {kind}" if settings.fused else kind
    batches = {tokens: random_ids(built, settings, 1, tokens) for tokens in settings.step_tokens}
    return {Case(kind, tokens): lambda ids=ids: training.step(ids) for tokens, ids in batches.items()}


def adapter(built: Built, settings: Settings) -> Cases:
    """The same of a model with an adapter, beside full fine-tuning."""
    return step(built, settings, "fine-tuning step")


def prefill(built: Built, settings: Settings) -> Cases:
    """The prompt's forward pass into an empty KV cache; logits of the last token only, as ``generate`` asks for."""
    model = built.model.eval()
    ids = random_ids(built, settings, 1, settings.prompt)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    return {Case("prefill", settings.prompt): run}


def decode(built: Built, settings: Settings) -> Cases:
    """One more token of each of a batch of sequences, with a KV cache of DECODED_AFTER tokens before it."""
    return {Case("decode", 1, batch): _decoding(built, settings, batch) for batch in settings.batches}


def compiled(built: Built, settings: Settings) -> Cases:
    """Decoding at batch 1 with the model's forward under torch.compile; it is compiled here, before any timing."""
    built.model.forward = torch.compile(built.model.forward)
    run = _decoding(built, settings, 1)
    for _ in range(3):  # the first runs compile, for a cache that was just filled and for one that was cropped
        run()
    return {Case("compiled decode", 1): run}


def _decoding(built: Built, settings: Settings, batch: int) -> Callable[[], None]:
    model, caches = built.model.eval(), []
    ids = random_ids(built, settings, batch, DECODED_AFTER + 1)

    @torch.no_grad()
    def run() -> None:
        if not caches:  # filled by the first run, so that no case's memory holds the cache of one that is yet to come
            cache = DynamicCache()
            model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            caches.append(cache)
        model(input_ids=ids[:, -1:], past_key_values=caches[0], use_cache=True)
        caches[0].crop(-1)

    return run


UNCOUNTED = ("compiled",)  # a counter would keep the compiler away
# forms whose products torch's counter can't see
OWN_KERNELS = {"cpu": ("codebook", *QUANTISERS), "cuda": ("codebook", "views", *QUANTISERS)}
TIMED = {f.__name__: f for f in (stack, convolution, step, adapter, prefill, decode, compiled)}


def timed(settings: Settings, gauge: Gauge, work: str, name: str, subject: Subject):
    """Serve one subject of a work in TIMED: answers a :class:`Request` with an :class:`Answer`."""
    built = build(work, name, subject, settings)
    cases = TIMED[work](built, settings)
    finish = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    counted = work not in UNCOUNTED and subject.form not in OWN_KERNELS[settings.device]

    def answer(request: Request) -> Answer:
        run, flops = cases[request.case], None
        if request.warm:
            run()  # makes what is made once
            if counted:
                flops = count_flops(run) or None
            gauge.reset()
        finish()
        start = time.perf_counter()
        for _ in range(request.runs):
            run()
        finish()
        return Answer((time.perf_counter() - start) / request.runs, gauge.peak(), flops)

    return {"n": built.n, "m": built.m, "sizes": built.sizes(), "cases": list(cases)}, answer


def _product_flops(into: torch.Size, a: torch.Size, b: torch.Size, out_shape=None, **kwargs) -> int:
    """Of a product (..., rows, k) (..., k, cols), from the shapes of the operation's arguments."""
    return 2 * math.prod(a) * b[-1]


def count_flops(run: Callable[[], object]) -> int | None:
    """Floating-point operations of the matrix products, convolutions and attention of a run, by torch's counter.

    Products that are added in place, which it does not know by itself, are counted, too. None where it gives up, as
    torch 2.11's does on attention whose heads share keys; the run may have stopped there.
    """
    in_place = (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_)
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(in_place, _product_flops)) as counter:
        try:
            run()
        except AssertionError:
            return None
    return counter.get_total_flops()


# ---- checkpoints


def save(settings: Settings, gauge: Gauge, work: str, name: str, subject: Subject, folder: str | None = None):
    """Serve save_pretrained, every time into a fresh folder that is then removed; a :class:`Request` as in `timed`.

    The description holds the size of the files on disk. With ``folder`` one checkpoint is left there.
    """
    built = build(work, name, subject, settings)

    def once(folder: str) -> float:
        start = time.perf_counter()
        built.model.save_pretrained(folder)
        return time.perf_counter() - start

    def answer(request: Request) -> Answer:
        if request.warm:
            gauge.reset()
        seconds = 0.0
        for _ in range(request.runs):
            with tempfile.TemporaryDirectory() as fresh:
                seconds += once(fresh)
        return Answer(seconds / request.runs, gauge.peak())

    with tempfile.TemporaryDirectory() as fresh:
        once(folder or fresh)
        size = sum(file.stat().st_size for file in Path(folder or fresh).iterdir())
    description = {"n": built.n, "m": built.m, "sizes": built.sizes(), "file_bytes": size}
    return description | {"cases": [Case("save_pretrained")]}, answer


def load(settings: Settings, gauge: Gauge, folder: str):
    """Serve one from_pretrained of the checkpoint in ``folder``, without mapping its file into memory."""

    def answer(_: object) -> Answer:
        gauge.reset()
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.torch_dtype, disable_mmap=True)
        model.to(settings.device)
        return Answer(time.perf_counter() - start, gauge.peak())

    return {}, answer
