"""Tables (Markdown) and plots (PNG) of the studies' rows, and their place in docs/comparison.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from studies.comparison.methods import METHODS
from studies.comparison.tasks import TASKS

_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


def spread(scores: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 for one."""
    return stdev(scores) if len(scores) > 1 else 0.0


def _percent(task: str, scores: Sequence[float]) -> list[float]:
    return [100 * score for score in scores] if TASKS[task].percent else list(scores)


def _cell(task: str, scores: Sequence[float], bold: bool = False) -> str:
    scores, digits = _percent(task, scores), 1 if TASKS[task].percent else 3
    text = f"{mean(scores):.{digits}f}" + (f" ± {spread(scores):.{digits}f}" if len(scores) > 1 else "")
    return f"**{text}**" if bold else text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _unit(task: str) -> str:
    return f"{TASKS[task].score}{', %' if TASKS[task].percent else ''}"


# ---- the main table


def compare_table(rows: list[dict]) -> str:
    """Scores: a row a method, a column a compression; the best of each column, dense aside, in bold."""
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
                line.append(_cell(task, row["test"], best[c] == method) + notes)
        lines.append(line)
    head = f"{TASKS[task].title}: {_unit(task)}, at learning rate"
    table = _markdown([head, *(f"{c:g}×" for c in compressions)], lines)
    if dense is not None:
        table += (
            f"\nDense: {_cell(task, dense['test'])} at {dense['learning_rate']:g}, {dense['numbers']:,} numbers, "
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
    return _markdown(["stored numbers / bytes in all", *(f"{c:g}×" for c in compressions)], lines)


def compare_plot(rows: list[dict], path: Path) -> None:
    """Score against stored numbers and against bytes: one line a method, the spread over seeds as a bar."""
    task = rows[0]["task"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    dense = next((row for row in rows if row["method"] == "dense"), None)
    markers = "osD^v<>Pp*hXd8"
    for axis, key in zip(axes, ("numbers", "bytes"), strict=True):
        if dense is not None:
            axis.axhline(mean(_percent(task, dense["test"])), color="black", linestyle="--", label="dense")
        for i, method in enumerate(dict.fromkeys(r["method"] for r in rows if r["method"] != "dense" and "test" in r)):
            points = sorted((r[key], r["test"]) for r in rows if r["method"] == method and "test" in r)
            scores = [_percent(task, test) for _, test in points]
            axis.errorbar(
                [x for x, _ in points], list(map(mean, scores)), list(map(spread, scores)),
                label=METHODS[method].title, marker=markers[i % len(markers)], capsize=2,
                linewidth=3 if method == "rps" else 1.2, color="tab:red" if method == "rps" else f"C{(i + 4) % 10}",
                linestyle="-" if METHODS[method].kind in ("rps", "mapping") else ":", markersize=5,
            )  # fmt: skip
        axis.set(xscale="log", xlabel=f"{key} stored, all parameters")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(_unit(task))
    if not TASKS[task].higher:
        axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{TASKS[task].title}: each method at its best learning rate, mean and deviation over seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- stability


def _grid(rows: list[dict], across: str, down: str) -> tuple[list, list, np.ndarray]:
    """Mean test scores as a matrix."""
    columns, lines = (sorted({row[key] for row in rows}) for key in (across, down))
    values = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        values[lines.index(row[down]), columns.index(row[across])] = mean(_percent(row["task"], row["test"]))
    return columns, lines, values


def stability_plot(rows: list[dict], path: Path) -> None:
    """A heat map a method and optimizer: score over C and learning rate."""
    task = rows[0]["task"]
    panels = [(m, o) for o in ("sgd", "adamw") for m in ("roast", "rps")]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    scores = [mean(_percent(task, row["test"])) for row in rows]
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
        name = "STABLE-RPS" if method == "rps" else "ROAST"
        axis.set(xlabel="C, std of the shared array", ylabel="learning rate", title=f"{name}, {_OPTIMIZERS[optimizer]}")
    figure.colorbar(image, ax=axes, label=_unit(task))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def stability_table(rows: list[dict]) -> str:
    """The best score over the learning rates for each C, and how many of the rates diverged."""
    task = rows[0]["task"]
    stds = sorted({row["init_std"] for row in rows})
    pick = max if TASKS[task].higher else min
    lines = []
    for optimizer in ("sgd", "adamw"):
        for method, name in (("roast", "ROAST"), ("rps", "STABLE-RPS")):
            line = [f"{name}, {_OPTIMIZERS[optimizer]}"]
            for std in stds:
                key = (method, optimizer, std)
                cells = [row for row in rows if (row["method"], row["optimizer"], row["init_std"]) == key]
                best = pick(cells, key=lambda row: mean(row["test"]))
                diverged = sum(bool(row["diverged"]) for row in cells)
                line.append(_cell(task, best["test"]) + (f", {diverged} diverged" if diverged else ""))
            lines.append(line)
    header = f"{TASKS[task].title}, {_unit(task)}, at the best of {len(cells)} rates"
    return _markdown([header, *(f"C = {std:g}" for std in stds)], lines)


# ---- learning rates over ratios


def _arm(row: dict) -> tuple[str, float]:
    return row["optimizer"], row["init_exponent"]


def _arm_name(arm: tuple[str, float]) -> str:
    """How the arm scales the shared array: C as a power of the compression c."""
    optimizer, exponent = arm
    if optimizer == "sgd":
        return "SGD, any C"
    names = {0: "RMS(σ)", 1 / 2: "RMS(σ)/√c", 1 / 3: "RMS(σ)/∛c"}
    return f"AdamW, C = {names.get(exponent, f'RMS(σ)/c^{exponent:g}')}"


def peak(rates: Sequence[float], scores: Sequence[float], higher: bool) -> float:
    """The rate at the top of a parabola through the best point and its neighbours, over the logarithm of the rate.

    Neighbouring rates differ by a factor, and scores by little around the best: the top lies between grid points. At
    an end of the grid it is that end.
    """
    scores = np.asarray(scores) * (1 if higher else -1)
    best = int(scores.argmax())
    if best in (0, len(scores) - 1):
        return rates[best]
    before, top, after = scores[best - 1 : best + 2]
    bend = before - 2 * top + after
    shift = 0.0 if bend == 0 else 0.5 * (before - after) / bend
    step = np.log(rates[best + 1] / rates[best - 1]) / 2
    return float(rates[best] * np.exp(shift * step))


def law_fits(rows: list[dict]) -> list[dict]:
    """For every arm the best rate at each compression, and the exponent a of best rate ~ compression^a with its error.

    The best rate is :func:`peak` of each seed's validation scores; the fit is least squares over seeds and
    compressions of the logarithms.
    """
    fits = []
    for arm in dict.fromkeys(map(_arm, rows)):
        chosen = [row for row in rows if _arm(row) == arm]
        higher = TASKS[chosen[0]["task"]].higher
        points, best = [], {}
        for compression in sorted({row["compression"] for row in chosen}):
            cells = sorted((r for r in chosen if r["compression"] == compression), key=lambda r: r["learning_rate"])
            rates = [row["learning_rate"] for row in cells]
            by_seed = zip(*(row["validation"] for row in cells), strict=True)
            peaks = [peak(rates, scores, higher) for scores in by_seed]
            best[compression] = float(np.exp(np.mean(np.log(peaks))))
            points += [(np.log(compression), np.log(value)) for value in peaks]
        x, y = np.array(points).T
        x = x - x.mean()
        exponent = float(x @ y / (x @ x))
        rest = y - y.mean() - exponent * x
        error = float(np.sqrt(rest @ rest / (len(y) - 2) / (x @ x)))
        fits.append({"task": chosen[0]["task"], "arm": arm, "best": best, "exponent": exponent, "error": error})
    return fits


def law_table(rows: list[dict]) -> str:
    """Best rates and exponents, a row an arm."""
    lines, compressions = [], sorted({row["compression"] for row in rows})
    for fit in law_fits(rows):
        line = [
            f"{TASKS[fit['task']].title}, {_arm_name(fit['arm'])}",
            *(f"{fit['best'][c]:.2g}" for c in compressions),
        ]
        lines.append([*line, f"{fit['exponent']:+.2f} ± {fit['error']:.2f}"])
    header = ["best learning rate", *(f"{c:g}×" for c in compressions), "exponent of the compression"]
    return _markdown(header, lines)


def law_plot(rows: list[dict], path: Path) -> None:
    """Score over learning rate, a curve a compression, a panel an arm."""
    task = rows[0]["task"]
    arms = list(dict.fromkeys(map(_arm, rows)))
    figure, axes = plt.subplots(1, len(arms), figsize=(5 * len(arms), 4.2), layout="constrained", sharey=True)
    for axis, arm in zip(axes, arms, strict=True):
        chosen = [row for row in rows if _arm(row) == arm]
        for i, compression in enumerate(sorted({row["compression"] for row in chosen})):
            cells = sorted((r for r in chosen if r["compression"] == compression), key=lambda r: r["learning_rate"])
            scores = [_percent(task, row["test"]) for row in cells]
            rates = [row["learning_rate"] for row in cells]
            axis.errorbar(rates, list(map(mean, scores)), list(map(spread, scores)), marker="o", markersize=4,
                          capsize=2, color=f"C{i}", label=f"{compression:g}×")  # fmt: skip
        axis.set(xscale="log", xlabel="learning rate", title=_arm_name(arm))
        rates = sorted({row["learning_rate"] for row in chosen})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{TASKS[task].title}: {_unit(task)}")
    best = [mean(_percent(task, row["test"])) for row in rows]
    if TASKS[task].higher:
        axes[0].set_ylim(max(best) - 25, max(best) + 1)
    else:
        axes[0].set_ylim(min(best) + 1.5, min(best) - 0.05)
    axes[0].legend(title="compression")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- Pareto-continuity


def continuity_table(rows: list[dict]) -> str:
    """How far each kind of sharing is from the dense model when it stores as many numbers."""
    task = rows[0]["task"]
    lines = [
        [METHODS[row["method"]].title, f"{row['logits']:.1e}", f"{row['loss']:.1e}", _cell(task, row["test"])]
        for row in rows
    ]
    header = [
        f"{TASKS[task].title} at 1×, SGD", "logits at the start, relative difference from dense",
        "loss over 30 steps in float64, largest relative difference", _unit(task),
    ]  # fmt: skip
    return _markdown(header, lines)


# ---- the page


def fill(page: Path, name: str, content: str) -> bool:
    """Put ``content`` between the lines ``<!-- NAME -->`` and ``<!-- end -->``; False if ``page`` has no such lines."""
    text = page.read_text()
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    new, count = re.subn(pattern, lambda match: match[1] + content.rstrip("\n") + "\n" + match[2], text, flags=re.S)
    if count and new != text:
        page.write_text(new)
    return bool(count)
