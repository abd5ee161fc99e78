"""Which C and which learning rate ROAST and STABLE-RPS can be trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from studies.comparison.presets import RATES, Preset, make_run
from studies.comparison.report import OPTIMIZERS, markdown, percent, score_text, unit
from studies.comparison.runner import Runner
from studies.comparison.tasks import FASHION_MNIST, TASKS

INIT_STDS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1)
STABILITY_COMPRESSION = 10
_TITLES = {"roast": "ROAST", "rps": "STABLE-RPS", "fold-full": "all by folding"}


def stability(
    runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST, methods: Sequence[str] = ("roast", "rps")
) -> list[dict]:
    """Test score over C and learning rate of ``methods``, with SGD and with AdamW.

    Returns:
        A row per cell: "task", "method", "optimizer", "init_std", "learning_rate", "test" (a list over the seeds) and
        "diverged" (how many).
    """
    cells = [
        (method, optimizer, std, rate)
        for method in methods
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


def _grid(rows: list[dict], across: str, down: str) -> tuple[list, list, np.ndarray]:
    """Mean test scores as a matrix."""
    columns, lines = (sorted({row[key] for row in rows}) for key in (across, down))
    values = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        values[lines.index(row[down]), columns.index(row[across])] = mean(percent(row["task"], row["test"]))
    return columns, lines, values


def stability_table(rows: list[dict]) -> str:
    """The best score over the learning rates for each C, and how many of the rates diverged."""
    task = rows[0]["task"]
    stds = sorted({row["init_std"] for row in rows})
    pick = max if TASKS[task].higher else min
    lines = []
    for optimizer in ("sgd", "adamw"):
        for method in dict.fromkeys(row["method"] for row in rows):
            line = [f"{_TITLES[method]}, {OPTIMIZERS[optimizer]}"]
            for std in stds:
                key = (method, optimizer, std)
                cells = [row for row in rows if (row["method"], row["optimizer"], row["init_std"]) == key]
                best = pick(cells, key=lambda row: mean(row["test"]))
                diverged = sum(bool(row["diverged"]) for row in cells)
                line.append(score_text(task, best["test"]) + (f", {diverged} diverged" if diverged else ""))
            lines.append(line)
    header = f"{TASKS[task].title}, {unit(task)}, at the best of {len(cells)} rates"
    return markdown([header, *(f"C = {std:g}" for std in stds)], lines)


def stability_plot(rows: list[dict], path: Path) -> None:
    """A heat map per method and optimizer: score over C and learning rate."""
    task = rows[0]["task"]
    panels = [(m, o) for o in ("sgd", "adamw") for m in ("roast", "rps")]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    scores = [mean(percent(task, row["test"])) for row in rows]
    for axis, (method, optimizer) in zip(axes.flat, panels, strict=True):
        chosen = [row for row in rows if (row["method"], row["optimizer"]) == (method, optimizer)]
        columns, lines, values = _grid(chosen, "init_std", "learning_rate")
        image = axis.imshow(values, vmin=min(scores), vmax=max(scores), cmap="viridis", aspect="auto", origin="lower")
        for i, j in np.ndindex(values.shape):
            bright = image.norm(values[i, j]) > 0.7
            colour = "black" if bright else "white"
            axis.text(j, i, f"{values[i, j]:.1f}", ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
        axis.set_yticks(range(len(lines)), [f"{line:g}" for line in lines])
        axis.set(xlabel="C, std of the shared array", ylabel="learning rate")
        axis.set_title(f"{_TITLES[method]}, {OPTIMIZERS[optimizer]}")
    figure.colorbar(image, ax=axes, label=unit(task))
    figure.savefig(path, dpi=110)
    plt.close(figure)
