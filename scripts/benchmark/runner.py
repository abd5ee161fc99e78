"""The measurements: every subject beside the dense model, in strict alternation, one row per case."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmark.accounts import memory, reduced
from benchmark.models import CONVOLUTIONAL, LANGUAGE_MODELS, STACKS
from benchmark.processes import Worker, WorkerError
from benchmark.settings import Settings
from benchmark.subjects import ADAPTERS, DENSE, FORMS, PEERS, Subject
from benchmark.works import Answer, Case, Request, load, save, timed

MIB = 2**20


@dataclass(frozen=True)
class Work:
    """What a work can measure: models, the default ones, compressed forms, the default ones."""

    help: str
    models: tuple[str, ...] = LANGUAGE_MODELS
    default_models: tuple[str, ...] = ("gpt2",)
    forms: tuple[str, ...] = FORMS + PEERS
    default_forms: tuple[str, ...] = ("views",)


WORKS = {
    "stack": Work("linear layers: forward, forward + backward", tuple(STACKS), ("bert",), default_forms=FORMS),
    "step": Work("a training step: forward, backward, clip, AdamW", default_models=("gpt2", "llama-1b")),
    "prefill": Work("a prompt into a KV cache"),
    "decode": Work("one token with a KV cache"),
    "load": Work("from_pretrained in a fresh process, and file sizes", forms=("views", "folded", "codebook", "gather")),
    "save": Work("save_pretrained, and file sizes", forms=("views", "folded", "codebook", "gather")),
    "memory": Work("peak of a training step against a formula"),
    "reduced": Work("bytes that DistributedDataParallel reduces in a step"),
    "convolution": Work(
        "a ResNet: forward, forward + backward",
        CONVOLUTIONAL,
        ("resnet-18",),
        ("views", "folded", "codebook", "gather", "fakeroast"),
    ),
    "compiled": Work("decode under torch.compile", forms=("views", "folded", "codebook")),
    "adapter": Work("a fine-tuning step: full, LoRA, ours", default_models=("llama-97m",), forms=()),
}
DEFAULT_WORKS = ("stack", "step", "prefill", "decode", "load", "save", "memory", "reduced")


@dataclass(frozen=True)
class Job:
    """One work on one model, for subjects beside the dense one."""

    work: str
    model: str
    subjects: tuple[Subject, ...]


def subjects(
    work: str, forms: list[str] | None, ratios: list[float], peers: list[str], bits: Sequence[int] = ()
) -> tuple[Subject, ...]:
    """The subjects of ``work``: ``forms`` and ``peers``, as far as it knows them, at all ``ratios``; codebooks, which
    have none, at all ``bits`` of a code.

    With ``forms`` None they are the work's default ones, and those other than ours come at the first ratio only: they
    take most of the time, and depend on the ratio little.
    """
    if work == "adapter":
        return ADAPTERS
    chosen = [*(WORKS[work].default_forms if forms is None else forms), *peers]
    known = [form for form in chosen if form in WORKS[work].forms]
    drawn = [
        Subject(form, ratio)
        for ratio in ratios
        for form in known
        if form != "codebook" and (form in ("views", "folded") or ratio == ratios[0] or forms is not None)
    ]
    return (*drawn, *(Subject("codebook", number) for number in bits if "codebook" in known))


def measure(job: Job, settings: Settings) -> Iterator[dict]:
    """The rows of ``job``, each as soon as it is known."""
    kinds = {"load": _load, "memory": _count, "reduced": _count}
    fixed = {
        "threads": settings.threads, "device": settings.device_name(), "dtype": settings.dtype,
        "part": settings.part if job.model == "llama-1b" else 1.0, "rounds": settings.rounds,
        "torch": torch.__version__, "command": settings.command,
    }  # fmt: skip
    for subject, row in kinds.get(job.work, _alternate)(job, settings):
        named = {"work": job.work, "model": job.model, "form": subject.form, "ratio": subject.ratio}
        yield named | row | fixed


def _case(case: Case) -> dict:
    return {"case": str(case)} | asdict(case)


def paired_ratios(answers: list[Answer], dense: list[Answer]) -> dict:
    """Times and memory over those of the dense model: median and quartiles of the rounds, and the peaks' ratio."""
    rounds = [a.seconds / d.seconds for a, d in zip(answers, dense, strict=True)]
    quartiles = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    peak, dense_peak = (max(a.peak for a in series) for series in (answers, dense))
    return {
        "time_ratio": quartiles[1], "time_ratio_low": quartiles[0], "time_ratio_high": quartiles[2],
        "milliseconds": 1e3 * statistics.median(a.seconds for a in answers),
        "dense_milliseconds": 1e3 * statistics.median(d.seconds for d in dense),
        "memory_ratio": peak / dense_peak if dense_peak > 0 else None,
        "peak_mib": peak / MIB, "dense_peak_mib": dense_peak / MIB,
    }  # fmt: skip


def _described(worker: Worker, dense: Worker) -> dict:
    """Sizes of a subject: n, m, its parameters (with a learned map, codes and codebooks) and, where it was saved, its
    files."""
    row = {"n": worker.description["n"], "m": worker.description["m"]}
    sizes, other = worker.description["sizes"], dense.description["sizes"]["parameters"]
    row |= {"parameters_ratio": sizes["parameters"] / other, "dense_parameters_mib": other / MIB}
    row |= {f"{name}_mib": size / MIB for name, size in sizes.items() if size}
    if "file_bytes" in worker.description:
        own, other = worker.description["file_bytes"], dense.description["file_bytes"]
        row |= {"file_ratio": own / other, "file_mib": own / MIB, "dense_file_mib": other / MIB}
    return row


def _alternate(job: Job, settings: Settings) -> Iterator[tuple[Subject, dict]]:
    """The dense model stays; the subjects come one at a time, and the two work in turn."""
    factory, dense = save if job.work == "save" else timed, None
    try:
        for subject in job.subjects:
            case = None
            try:
                if dense is None or not dense.alive:
                    dense = Worker(settings, DENSE.name, factory, job.work, job.model, DENSE)
                with Worker(settings, subject.name, factory, job.work, job.model, subject) as worker:
                    for case in worker.description["cases"]:
                        row = _pair(worker, dense, case, settings)
                        yield subject, _case(case) | _described(worker, dense) | row
            except WorkerError as error:
                yield subject, ({} if case is None else _case(case)) | {"error": str(error)}
    finally:
        if dense is not None:
            dense.close()


def _pair(worker: Worker, dense: Worker, case: Case, settings: Settings) -> dict:
    """Two subjects in strict alternation, the order swapped every round."""
    pair, runs, flops = (dense, worker), {}, {}
    for member in pair:
        warm = member.ask(Request(case, 1, warm=True))
        runs[member], flops[member] = max(1, round(settings.seconds / warm.seconds)), warm.flops
    answers = {member: [] for member in pair}
    for i in range(settings.rounds):
        for member in pair if i % 2 == 0 else reversed(pair):
            answers[member].append(member.ask(Request(case, runs[member])))
    row = paired_ratios(answers[worker], answers[dense])
    if flops[worker] and flops[dense]:
        ours, others = flops[worker] / 1e9, flops[dense] / 1e9
        row |= {"flops_ratio": ours / others, "gflop": ours, "dense_gflop": others}
    return row


def _load(job: Job, settings: Settings) -> Iterator[tuple[Subject, dict]]:
    """Every from_pretrained in a process of its own; in each round every subject once, the order swapped."""
    case, saved = Case("from_pretrained"), {}
    with tempfile.TemporaryDirectory() as root:
        for subject in (DENSE, *job.subjects):
            folder = str(Path(root) / subject.name)
            try:
                with Worker(settings, subject.name, save, job.work, job.model, subject, folder) as worker:
                    saved[subject] = worker
            except WorkerError as error:
                yield subject, _case(case) | {"error": str(error)}
        answers: dict[Subject, list[Answer]] = {subject: [] for subject in saved}
        failed = {}
        for i in range(settings.rounds):
            for subject in saved if i % 2 == 0 else reversed(saved):
                try:
                    with Worker(settings, subject.name, load, str(Path(root) / subject.name)) as worker:
                        answers[subject].append(worker.ask())
                except WorkerError as error:
                    failed.setdefault(subject, str(error))
    for subject in job.subjects:
        error = failed.get(subject) or failed.get(DENSE)
        if error:
            yield subject, _case(case) | {"error": error}
        elif subject in saved and DENSE in saved:
            row = paired_ratios(answers[subject], answers[DENSE])
            yield subject, _case(case) | _described(saved[subject], saved[DENSE]) | row


def _count(job: Job, settings: Settings) -> Iterator[tuple[Subject, dict]]:
    """Bytes: the dense model's first, then the others' with their ratio to them."""
    factory = {"memory": memory, "reduced": reduced}[job.work]
    total, ratio = {"memory": ("measured", "memory_ratio"), "reduced": ("reduced", "reduced_ratio")}[job.work]
    tokens = max(settings.step_tokens)
    case, dense = _case(Case("one training step", tokens)), None
    for subject in (DENSE, *job.subjects):
        try:
            with Worker(settings, subject.name, factory, job.model, subject, tokens) as worker:
                answer = worker.ask()
        except WorkerError as error:
            yield subject, case | {"error": str(error)}
            continue
        dense = answer if subject == DENSE else dense
        in_mib = {f"{key}_mib": value / MIB for key, value in answer.items() if key != "targets_ratio"}
        row = case | worker.description | in_mib
        if "targets_ratio" in answer:
            row["targets_ratio"] = answer["targets_ratio"]
        if dense:
            row |= {ratio: answer[total] / dense[total], f"dense_{total}_mib": dense[total] / MIB}
        yield subject, row
