"""What is asked: which runs answer it, and the rows that their results make."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from studies.comparison.methods import METHODS, dense_model
from studies.comparison.runner import Runner, load
from studies.comparison.tasks import CPYTHON, FASHION_MNIST, TASKS
from studies.comparison.training import Run, train

# factors of about 3, from the rate at which a dense model hardly learns to that at which it diverges
RATES = {"adamw": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.01, 0.03, 0.1, 0.3)}


@dataclass(frozen=True)
class Size:
    """How large the work of a task is: the model's config, and what it is trained on for how long."""

    model: tuple[tuple[str, float], ...]
    train_size: int
    epochs: float
    batch_size: int


@dataclass(frozen=True)
class Preset:
    """A size for every task, and which cells are filled.

    Attributes:
        sizes: By task. ``short``: the same for the sweeps over learning rates, which need hundreds of runs.
        tasks, compressions, seeds: Of the main table.
        law_compressions, stability_seeds: Of the other studies.
    """

    sizes: dict[str, Size]
    short: dict[str, Size]
    tasks: tuple[str, ...]
    compressions: tuple[float, ...]
    seeds: tuple[int, ...]
    law_compressions: tuple[float, ...]
    stability_seeds: tuple[int, ...]


# Weights start at std 1 / sqrt(hidden size) as linear layers usually do. transformers' default 0.02 is made for hidden
# sizes near 1,000; these small models learn slowly from it (the quick ViT: 72 % test accuracy instead of 82 %).


def _vit(hidden: int, mlp: int, layers: int, patch: int) -> tuple[tuple[str, float], ...]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return (*zip(names, (hidden, mlp, layers, 4, patch), strict=True), ("initializer_range", hidden**-0.5))


def _gpt2(hidden: int, layers: int, tokens: int) -> tuple[tuple[str, float], ...]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": tokens}
    return tuple((sizes | {"initializer_range": hidden**-0.5}).items())


_QUICK_VIT, _QUICK_LM = _vit(64, 256, 3, 7), _gpt2(64, 3, 64)
_FULL_VIT, _FULL_LM = _vit(128, 512, 6, 4), _gpt2(256, 6, 256)
# factors of 2, so that the best rate can be told between grid points; an arm's grid is where its best rates are
_LAW_RATES = {
    ("adamw", 1 / 2): (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    ("adamw", 1 / 3): (1e-3, 2e-3, 4e-3, 8e-3),
    ("adamw", 0.0): (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1),
    ("sgd", 1 / 2): (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
}
PRESETS = {
    # two cores, under 30 minutes for the main table of the ViT; many small steps learn more in this time than few
    "quick": Preset(
        sizes={
            "vit": Size(_QUICK_VIT, 16_000, 1, 32),
            "convnet": Size((), 16_000, 1, 32),
            "lm": Size(_QUICK_LM, 4000, 1, 8),
        },
        short={
            "vit": Size(_QUICK_VIT, 8000, 1, 32),
            "convnet": Size((), 8000, 1, 32),
            "lm": Size(_QUICK_LM, 2000, 1, 8),
        },
        tasks=("vit",),
        compressions=(10, 50),
        seeds=(0, 1, 2),
        law_compressions=(1, 4, 20, 100),
        stability_seeds=(0,),
    ),
    # a GPU, every cell
    "full": Preset(
        sizes={
            "vit": Size(_FULL_VIT, 55_000, 20, 128),
            "convnet": Size((), 55_000, 20, 128),
            "lm": Size(_FULL_LM, 30_000, 10, 32),
        },
        short={
            "vit": Size(_FULL_VIT, 20_000, 4, 128),
            "convnet": Size((), 20_000, 4, 128),
            "lm": Size(_FULL_LM, 20_000, 1, 32),
        },
        tasks=("vit", "convnet", "lm"),
        compressions=(1, 2, 5, 10, 20, 50, 100),
        seeds=(0, 1, 2),
        law_compressions=(1, 2, 5, 10, 20, 50, 100),
        stability_seeds=(0, 1, 2),
    ),
}


def make_run(task: str, method: str, size: Size, dataset: str, **settings) -> Run:
    """A run of ``method`` on a task of ``size``; text tasks have data of their own."""
    if settings.get("init_std") is None:
        settings.setdefault("init_exponent", METHODS[method].init_exponent)
    return Run(
        task=task,
        method=method,
        optimizer=settings.pop("optimizer", TASKS[task].optimizer),
        dataset=CPYTHON if task == "lm" else dataset,
        **dataclasses.asdict(size) | {"model": size.model},
        **settings,
    )


# ---- the main table


def compare(
    runner: Runner, task: str, methods: Sequence[str], preset: Preset, dataset: str = FASHION_MNIST,
    rates: Sequence[float] | None = None,
) -> list[dict]:  # fmt: skip
    """Each method at its best learning rate, at each compression.

    The rate is that with the best validation score of the first seed, out of one grid for all; with it every seed is
    trained, and the test scores of these runs are the cell. Dense is there once, and stands for every method that is
    the dense model at compression 1.

    Returns:
        A row a cell: "task", "method", "compression", "numbers", "bytes", "learning_rate", "at_edge" (the best rate was
        the smallest or largest of the grid), "validation" and "test" (a list over the seeds), "diverged" (how many), or
        "unreachable".
    """
    size, rates = preset.sizes[task], tuple(rates or RATES[TASKS[task].optimizer])

    def run(method: str, compressions: tuple[float, ...], rate: float, seed: int) -> Run:
        return make_run(task, method, size, dataset, compressions=compressions, learning_rate=rate, seed=seed)

    cells = []
    for method in methods:
        wanted = [c for c in preset.compressions if c != 1 or not METHODS[method].dense_at_1]
        if method == "dense":
            wanted = [1]
        if METHODS[method].build is None:
            cells += [(method, tuple(wanted), c) for c in wanted]  # one chain brings them all
        else:
            cells += [(method, (c,), c) for c in wanted]

    def results(runs: Iterable[tuple], what: str) -> dict[tuple, dict]:
        """By cell, rate and seed."""
        wanted = list(runs)
        found = runner([run(cell[0], cell[1], rate, seed) for cell, rate, seed in wanted], what)
        return {
            (cell, rate, seed): next(r for r in of_run if r["compression"] == cell[2])
            for (cell, rate, seed), of_run in zip(wanted, found, strict=True)
        }

    first = preset.seeds[0]
    tuned = results([(cell, rate, first) for cell in cells for rate in rates], f"{task}: learning rates")
    sign = 1 if TASKS[task].higher else -1
    best = {}
    for cell in cells:
        if "unreachable" not in tuned[cell, rates[0], first]:
            best[cell] = max(rates, key=lambda rate, cell=cell: sign * tuned[cell, rate, first]["validation"])
    final = results([(cell, rate, seed) for cell, rate in best.items() for seed in preset.seeds], f"{task}: seeds")
    rows = []
    for cell in cells:
        row = {"task": task, "method": cell[0], "compression": cell[2]}
        if cell not in best:
            rows.append(row | {"unreachable": tuned[cell, rates[0], first]["unreachable"]})
            continue
        of_seeds = [final[cell, best[cell], seed] for seed in preset.seeds]
        rows.append(
            row
            | {name: of_seeds[0][name] for name in ("numbers", "bytes")}
            | {"learning_rate": best[cell], "at_edge": best[cell] in (rates[0], rates[-1])}
            | {split: [result[split] for result in of_seeds] for split in ("validation", "test")}
            | {"diverged": sum(result.get("diverged", False) for result in of_seeds)}
        )
    return rows


# ---- stability


INIT_STDS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1)
STABILITY_COMPRESSION = 10


def stability(runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST) -> list[dict]:
    """Test score over C and learning rate of ROAST and of STABLE-RPS, with SGD and with AdamW.

    Returns:
        A row a cell: "task", "method", "optimizer", "init_std", "learning_rate", "test" (a list over the seeds) and
        "diverged" (how many).
    """
    cells = [
        (method, optimizer, std, rate)
        for method in ("roast", "rps")
        for optimizer in ("sgd", "adamw")
        for std in INIT_STDS
        for rate in RATES[optimizer]
    ]
    runs = [
        make_run(task, method, preset.short[task], dataset, optimizer=optimizer, learning_rate=rate, seed=seed,
                 init_std=std, compressions=(STABILITY_COMPRESSION,))
        for method, optimizer, std, rate in cells
        for seed in preset.stability_seeds
    ]  # fmt: skip
    found = iter(runner(runs, f"{task}: stability"))
    rows = []
    for method, optimizer, std, rate in cells:
        results = [next(found)[0] for _ in preset.stability_seeds]
        rows.append({
            "task": task, "method": method, "optimizer": optimizer, "init_std": std, "learning_rate": rate,
            "test": [result["test"] for result in results],
            "diverged": sum(result.get("diverged", False) for result in results),
        })  # fmt: skip
    return rows


# ---- the law of learning rates


def learning_rate_law(runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST) -> list[dict]:
    """Validation and test score of RPS over learning rate and compression c: with AdamW for three laws
    C = RMS(sigma) * c^-a, and with SGD, for which the projected gradient makes C immaterial.

    Returns:
        A row a cell: "task", "optimizer", "init_exponent" (a), "compression", "learning_rate", "validation", "test"
        (lists over the seeds).
    """
    cells = [
        (optimizer, exponent, compression, rate)
        for (optimizer, exponent), rates in _LAW_RATES.items()
        for compression in preset.law_compressions
        for rate in rates
    ]
    runs = [
        make_run(task, "rps", preset.short[task], dataset, optimizer=optimizer, learning_rate=rate, seed=seed,
                 init_exponent=1 / 2 if compression == 1 else exponent,  # all the same there
                 compressions=(compression,))
        for optimizer, exponent, compression, rate in cells
        for seed in preset.seeds
    ]  # fmt: skip
    found = iter(runner(runs, f"{task}: learning rates over ratios"))
    rows = []
    for optimizer, exponent, compression, rate in cells:
        results = [next(found)[0] for _ in preset.seeds]
        rows.append({
            "task": task, "optimizer": optimizer, "init_exponent": exponent, "compression": compression,
            "learning_rate": rate, **{split: [r[split] for r in results] for split in ("validation", "test")},
        })  # fmt: skip
    return rows


# ---- Pareto-continuity

SHARING_METHODS = tuple(name for name, method in METHODS.items() if method.kind in ("rps", "mapping"))
_TRAJECTORY_STEPS, _TRAJECTORY_ROWS = 30, 64  # steps, and rows of a batch


def continuity(runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST) -> list[dict]:
    """Is a model that stores as many numbers as the dense one the dense one? Plain SGD, the same rate for all.

    Returns:
        A row a method: "method"; "logits", the largest difference of a logit from the dense model's before training,
        over the largest logit; "loss", the largest relative difference of the loss over 30 steps in float64 from the
        same weights; "test", the test scores of whole runs over the seeds.
    """
    rate = RATES["sgd"][1]
    settings = {"compressions": (1,), "optimizer": "sgd", "learning_rate": rate}
    names = ("dense", *SHARING_METHODS)
    runs = [
        make_run(task, name, preset.short[task], dataset, seed=seed, **settings)
        for name in names
        for seed in preset.seeds
    ]
    found = iter(runner(runs, f"{task}: no compression"))
    scores = {name: [next(found)[0]["test"] for _ in preset.seeds] for name in names}
    data = load(runs[0], runner.environment)
    rows = min(_TRAJECTORY_ROWS, runs[0].train_size // _TRAJECTORY_STEPS)
    size = dataclasses.replace(preset.short[task], train_size=_TRAJECTORY_STEPS * rows, batch_size=rows, epochs=1)
    traces = {}
    for name in names:
        run = make_run(task, name, size, dataset, seed=preset.seeds[0], **settings)
        dense = dense_model(run, data)
        dense.model.double()
        model, _ = METHODS[name].build(dense, 1, run, data)
        split = {name: t.double() if t.is_floating_point() else t for name, t in data.train.items()}
        with torch.no_grad():
            logits = model.eval()(**{name: tensor[:4] for name, tensor in split.items()}).logits
        losses: list[torch.Tensor] = []
        train(model, run, split, on_step=lambda step, loss, losses=losses: losses.append(loss))
        traces[name] = (logits, torch.stack(losses))
    logits, losses = traces["dense"]
    return [
        {
            "task": task,
            "method": name,
            "logits": ((traces[name][0] - logits).abs().max() / logits.abs().max()).item(),
            "loss": ((traces[name][1] - losses) / losses).abs().max().item(),
            "test": scores[name],
        }
        for name in names
    ]
