"""Folding the input: which form of it learns best, and what is lost for how many multiplications and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from studies.comparison import main_table
from studies.comparison.methods import METHODS
from studies.comparison.presets import Preset
from studies.comparison.report import markdown, percent, score_text, spread, unit
from studies.comparison.runner import Runner
from studies.comparison.tasks import FASHION_MNIST, TASKS

FORMS_COMPRESSION = 10
LONGER = 4  # times the epochs
FORMS = ("dense", "rps", "fold-4", *(name for name, method in METHODS.items() if method.kind == "form"))
FOLD_COMPRESSIONS = (2, 4, 10, 50)
FOLDS = {"rps": 1, "fold-2": 2, "fold-4": 4, "fold-8": 8}  # and all of the compression


def forms(
    runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST,
    methods: Sequence[str] | None = None, rates: Sequence[float] | None = None,
) -> list[dict]:  # fmt: skip
    """All of a tenth of the numbers by folding, form by form, in runs as long as the main table's and longer ones.

    Returns:
        The main table's rows (:func:`studies.comparison.main_table.compare`), each with "longer".
    """
    rows, size = [], preset.sizes[task]
    for longer in (1, LONGER):
        longer_size = dataclasses.replace(size, epochs=longer * size.epochs)
        of_length = dataclasses.replace(preset, compressions=(FORMS_COMPRESSION,), sizes={task: longer_size})
        found = main_table.compare(runner, task, methods or FORMS, of_length, dataset, rates)
        rows += [row | {"longer": longer} for row in found]
    return rows


def forms_table(rows: list[dict]) -> str:
    """A row per form: score and rate, short and long."""
    task, lengths = rows[0]["task"], sorted({row["longer"] for row in rows})
    cells = {(row["method"], row["longer"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [cells.get((method, longer)) for longer in lengths]
        scores = [f"{score_text(task, row['test'])} at {row['learning_rate']:g}" if row else "" for row in found]
        flops = next(row["flops"] for row in found if row)
        lines.append([METHODS[method].title, *scores, f"{flops / 1e6:.2f}"])
    lengths = ["short" if longer == 1 else f"{longer} times longer" for longer in lengths]
    return markdown([f"{TASKS[task].title}, {FORMS_COMPRESSION}×: {unit(task)}", *lengths, "MFLOP per row"], lines)


def folds(
    runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST, rates: Sequence[float] | None = None
) -> list[dict]:
    """Every fold at every compression that allows it, beside dense: the main table's rows, each with "fold"."""
    (dense,) = main_table.compare(runner, task, ["dense"], preset, dataset, rates)
    rows = [dense | {"fold": 1}]
    for compression in FOLD_COMPRESSIONS:
        methods = [name for name, fold in FOLDS.items() if fold < compression] + ["fold-full"]
        at_compression = dataclasses.replace(preset, compressions=(compression,))
        found = main_table.compare(runner, task, methods, at_compression, dataset, rates)
        rows += [row | {"fold": FOLDS.get(row["method"], compression)} for row in found]
    return rows


def folds_table(rows: list[dict]) -> str:
    """A row per compression, a column per fold: score, and multiplications beside the dense model's."""
    task, dense = rows[0]["task"], rows[0]
    cells = {(row["compression"], row["method"]): row for row in rows[1:]}
    methods = [*FOLDS, "fold-full"]
    lines = []
    for compression in sorted({row["compression"] for row in rows[1:]}):
        line = [f"{compression:g}×"]
        for method in methods:
            row = cells.get((compression, method))
            share = "" if row is None else f" ({row['flops'] / dense['flops']:.2f})"
            line.append(score_text(task, row["test"]) + share if row else "")
        lines.append(line)
    head = [f"{TASKS[task].title}: {unit(task)} (FLOP / dense)", *(f"fold {fold}" for fold in FOLDS.values())]
    table = markdown([*head, "all by folding"], lines)
    return table + f"\nDense: {score_text(task, dense['test'])}, {dense['flops'] / 1e6:.2f} MFLOP per row.\n"


def folds_plot(rows: list[dict], path: Path) -> None:
    """Score against FLOPs, a line per compression, and against stored numbers, a line per fold."""
    task, dense = rows[0]["task"], rows[0]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    lines = (
        ("flops", "compression", "FLOP of a forward pass, whole model", lambda row: f"{row['compression']:g}×"),
        ("numbers", "method", "numbers stored, all parameters", lambda row: METHODS[row["method"]].title),
    )
    for axis, (key, line, label, name) in zip(axes, lines, strict=True):
        axis.axhline(mean(percent(task, dense["test"])), color="black", linestyle="--", label="dense")
        for i, value in enumerate(dict.fromkeys(row[line] for row in rows[1:])):
            chosen = sorted((row for row in rows[1:] if row[line] == value), key=lambda row: row[key])
            scores = [percent(task, row["test"]) for row in chosen]
            axis.errorbar([row[key] for row in chosen], list(map(mean, scores)), list(map(spread, scores)),
                          marker="o", markersize=4, capsize=2, color=f"C{i}", label=name(chosen[0]))  # fmt: skip
        axis.set(xscale="log", xlabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel(unit(task))
    if not TASKS[task].higher:
        axes[0].invert_yaxis()
    figure.suptitle(f"{TASKS[task].title}: folding the input, each cell at its best rate")
    figure.savefig(path, dpi=110)
    plt.close(figure)
