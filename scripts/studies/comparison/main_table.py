"""The main table: every method at its best learning rate, at each compression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from studies.comparison.methods import METHODS
from studies.comparison.presets import RATES, Preset, make_run
from studies.comparison.report import markdown, percent, score_text, spread, unit
from studies.comparison.runner import Runner
from studies.comparison.tasks import FASHION_MNIST, TASKS


class Cell(NamedTuple):
    """A cell of the table, and the compressions of the run that fills it: its own, or all those of one chain."""

    method: str
    compression: float
    of_run: tuple[float, ...]


Key = tuple[Cell, float, int]  # cell, learning rate, seed


def compare(
    runner: Runner, task: str, methods: Sequence[str], preset: Preset, dataset: str = FASHION_MNIST,
    rates: Sequence[float] | None = None,
) -> list[dict]:  # fmt: skip
    """Each method at its best learning rate, at each compression.

    The rate is that with the best validation score of the first seed, out of one grid for all; with it every seed is
    trained, and the test scores of these runs are the cell. Dense is there once, and stands for every method that is
    the dense model at compression 1.

    Returns:
        A row per cell: "task", "method", "compression", "numbers", "bytes", "flops", "learning_rate", "at_edge" (the
        best rate was the smallest or largest of the grid), "validation" and "test" (a list over the seeds), "diverged"
        (how many), or "unreachable".
    """
    size, rates = preset.sizes[task], tuple(rates or RATES[TASKS[task].optimizer])

    def results(keys: Iterable[Key], what: str) -> dict[Key, dict]:
        keys = list(keys)
        runs = [
            make_run(task, cell.method, size, dataset, compressions=cell.of_run, learning_rate=rate, seed=seed)
            for cell, rate, seed in keys
        ]
        found = zip(keys, runner(runs, what), strict=True)
        return {key: next(r for r in of_run if r["compression"] == key[0].compression) for key, of_run in found}

    cells, first = _cells(methods, preset), preset.seeds[0]
    tuned = results([(cell, rate, first) for cell in cells for rate in rates], f"{task}: learning rates")
    sign = 1 if TASKS[task].higher else -1
    best = {}
    for cell in cells:
        if "unreachable" not in tuned[cell, rates[0], first]:
            best[cell] = max(rates, key=lambda rate, cell=cell: sign * tuned[cell, rate, first]["validation"])
    final = results([(cell, rate, seed) for cell, rate in best.items() for seed in preset.seeds], f"{task}: seeds")
    rows = []
    for cell in cells:
        row = {"task": task, "method": cell.method, "compression": cell.compression}
        if cell in best:
            rows.append(row | _summary([final[cell, best[cell], seed] for seed in preset.seeds], best[cell], rates))
        else:
            rows.append(row | {"unreachable": tuned[cell, rates[0], first]["unreachable"]})
    return rows


def _cells(methods: Sequence[str], preset: Preset) -> list[Cell]:
    cells = []
    for method in methods:
        wanted = [c for c in preset.compressions if c != 1 or not METHODS[method].dense_at_1]
        if method == "dense":
            wanted = [1]
        if METHODS[method].build is None:
            cells += [Cell(method, c, tuple(wanted)) for c in wanted]  # one chain brings them all
        else:
            cells += [Cell(method, c, (c,)) for c in wanted]
    return cells


def _summary(of_seeds: list[dict], rate: float, rates: Sequence[float]) -> dict:
    """What a cell's row says of the results of all seeds at the best of ``rates``."""
    return (
        {name: of_seeds[0].get(name) for name in ("numbers", "bytes", "flops")}
        | {"learning_rate": rate, "at_edge": rate in (rates[0], rates[-1])}
        | {split: [result[split] for result in of_seeds] for split in ("validation", "test")}
        | {"diverged": sum(result.get("diverged", False) for result in of_seeds)}
    )


def compare_table(rows: list[dict]) -> str:
    """Scores: a row per method, a column per compression; the best of each column, dense aside, in bold."""
    task = rows[0]["task"]
    dense = next((row for row in rows if row["method"] == "dense"), None)
    compressions = sorted({row["compression"] for row in rows if row["method"] != "dense"})
    sign = 1 if TASKS[task].higher else -1
    cells = {(row["method"], row["compression"]): row for row in rows}
    best = {}
    for c in compressions:
        scored = {m: sign * mean(row["test"]) for (m, d), row in cells.items() if d == c and "test" in row}
        best[c] = max(scored, key=scored.get, default=None)
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        line = [METHODS[method].title]
        for c in compressions:
            row = cells.get((method, c))
            if row is None and c == 1 and dense is not None:
                line.append("as dense")
            elif row is None or "unreachable" in row:
                line.append("can't reach" if row else "")
            else:
                notes = f" at {row['learning_rate']:g}" + ("\\*" if row["at_edge"] else "")
                notes += f", {row['diverged']} diverged" if row["diverged"] else ""
                line.append(score_text(task, row["test"], best[c] == method) + notes)
        lines.append(line)
    head = f"{TASKS[task].title}: {unit(task)}, at learning rate"
    table = markdown([head, *(f"{c:g}×" for c in compressions)], lines)
    if dense is not None:
        table += (
            f"\nDense: {score_text(task, dense['test'])} at {dense['learning_rate']:g}, {dense['numbers']:,} numbers, "
            f"{dense['bytes']:,} bytes. \\*: the best rate is the smallest or largest of the grid.\n"
        )
    return table


def storage_table(rows: list[dict]) -> str:
    """Numbers and bytes that each method stores in all: the columns of the main table again."""
    compressions = sorted({row["compression"] for row in rows if row["method"] != "dense"})
    cells = {(row["method"], row["compression"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        line = [METHODS[method].title]
        for c in compressions:
            row = cells.get((method, c), {})
            line.append(f"{row['numbers']:,} / {row['bytes']:,}" if "numbers" in row else "")
        lines.append(line)
    return markdown(["stored numbers / bytes in all", *(f"{c:g}×" for c in compressions)], lines)


def compare_plot(rows: list[dict], path: Path) -> None:
    """Score against stored numbers and against bytes: one line per method, the spread over seeds as a bar."""
    task = rows[0]["task"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    dense = next((row for row in rows if row["method"] == "dense"), None)
    markers = "osD^v<>Pp*hXd8"
    for axis, key in zip(axes, ("numbers", "bytes"), strict=True):
        if dense is not None:
            axis.axhline(mean(percent(task, dense["test"])), color="black", linestyle="--", label="dense")
        for i, method in enumerate(dict.fromkeys(r["method"] for r in rows if r["method"] != "dense" and "test" in r)):
            points = sorted((r[key], r["test"]) for r in rows if r["method"] == method and "test" in r)
            scores = [percent(task, test) for _, test in points]
            axis.errorbar(
                [x for x, _ in points], list(map(mean, scores)), list(map(spread, scores)),
                label=METHODS[method].title, marker=markers[i % len(markers)], capsize=2,
                linewidth=3 if method == "rps" else 1.2, color="tab:red" if method == "rps" else f"C{(i + 4) % 10}",
                linestyle="-" if METHODS[method].kind in ("rps", "fold", "mapping") else ":", markersize=5,
            )  # fmt: skip
        axis.set(xscale="log", xlabel=f"{key} stored, all parameters")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(unit(task))
    if not TASKS[task].higher:
        axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{TASKS[task].title}: each method at its best learning rate, mean and deviation over seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
