"""The law of learning rates: how the best rate moves with the compression, for each way to scale the shared array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from studies.comparison.presets import Preset, make_run
from studies.comparison.report import markdown, percent, spread, unit
from studies.comparison.runner import Runner
from studies.comparison.tasks import FASHION_MNIST, TASKS

# factors of 2, so that the best rate can be told between grid points; an arm's grid is where its best rates are
_LAW_RATES = {
    ("adamw", 1 / 2): (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    ("adamw", 1 / 3): (1e-3, 2e-3, 4e-3, 8e-3),
    ("adamw", 0.0): (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1),
    ("sgd", 1 / 2): (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
}
# the same where all of the compression is by folding inputs; around the dense model's best rate
_FOLDED_RATES = {
    ("adamw", 1 / 2): (1e-3, 2e-3, 4e-3, 8e-3),
    ("adamw", 1 / 3): (1e-3, 2e-3, 4e-3, 8e-3),
    ("sgd", 1 / 2): (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
}


def learning_rate_law(
    runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST, method: str = "rps"
) -> list[dict]:
    """Validation and test score over learning rate and compression c: with AdamW for some laws
    C = RMS(sigma) * c^-a, and with SGD, for which the projected gradient makes C immaterial.

    Args:
        method: "rps", or "fold-full" for all of the compression by folding inputs.

    Returns:
        A row per cell: "task", "method", "optimizer", "init_exponent" (a), "compression", "learning_rate",
        "validation", "test" (lists over the seeds).
    """
    cells = [
        (optimizer, exponent, compression, rate)
        for (optimizer, exponent), rates in (_LAW_RATES if method == "rps" else _FOLDED_RATES).items()
        for compression in preset.law_compressions
        for rate in rates
    ]
    runs = [
        make_run(task, method, preset.short[task], dataset, optimizer=optimizer, learning_rate=rate, seed=seed,
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
            "task": task, "method": method, "optimizer": optimizer, "init_exponent": exponent,
            "compression": compression, "learning_rate": rate,
            **{split: [r[split] for r in results] for split in ("validation", "test")},
        })  # fmt: skip
    return rows


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
    """Best rates and exponents, a row per arm."""
    lines, compressions = [], sorted({row["compression"] for row in rows})
    for fit in law_fits(rows):
        line = [
            f"{TASKS[fit['task']].title}, {_arm_name(fit['arm'])}",
            *(f"{fit['best'][c]:.2g}" for c in compressions),
        ]
        lines.append([*line, f"{fit['exponent']:+.2f} ± {fit['error']:.2f}"])
    header = ["best learning rate", *(f"{c:g}×" for c in compressions), "exponent of the compression"]
    return markdown(header, lines)


def law_plot(rows: list[dict], path: Path) -> None:
    """Score over learning rate, a curve per compression, a panel per arm."""
    task = rows[0]["task"]
    arms = list(dict.fromkeys(map(_arm, rows)))
    figure, axes = plt.subplots(1, len(arms), figsize=(5 * len(arms), 4.2), layout="constrained", sharey=True)
    for axis, arm in zip(axes, arms, strict=True):
        chosen = [row for row in rows if _arm(row) == arm]
        for i, compression in enumerate(sorted({row["compression"] for row in chosen})):
            cells = sorted((r for r in chosen if r["compression"] == compression), key=lambda r: r["learning_rate"])
            scores = [percent(task, row["test"]) for row in cells]
            rates = [row["learning_rate"] for row in cells]
            axis.errorbar(rates, list(map(mean, scores)), list(map(spread, scores)), marker="o", markersize=4,
                          capsize=2, color=f"C{i}", label=f"{compression:g}×")  # fmt: skip
        axis.set(xscale="log", xlabel="learning rate", title=_arm_name(arm))
        rates = sorted({row["learning_rate"] for row in chosen})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{TASKS[task].title}: {unit(task)}")
    best = [mean(percent(task, row["test"])) for row in rows]
    if TASKS[task].higher:
        axes[0].set_ylim(max(best) - 25, max(best) + 1)
    else:
        axes[0].set_ylim(min(best) + 1.5, min(best) - 0.05)
    axes[0].legend(title="compression")
    figure.savefig(path, dpi=110)
    plt.close(figure)
