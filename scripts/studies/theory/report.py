"""The theory's table and plot: root mean squared errors, predicted and measured."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from studies.theory.measurements import FOLD, METHODS, PRUNE_BYTES, ROW_FOLD

_ROUNDING = 1e-20  # relative squared errors below this are float64's, not the method's


def table(rows: list[dict]) -> str:
    """Markdown: for every pair of vectors a table of the root mean squared errors over |x||y|, predicted / measured."""
    grouped: dict[str, dict[float, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        grouped[row["vectors"]][row["compression"]][row["method"]] = row

    def root(square: float) -> str:
        return f"{math.sqrt(square):.4f}" if square > _ROUNDING else "0"

    lines = []
    for name, by_compression in grouped.items():
        head = ["compression", "numbers shared (kept at equal bytes)", *METHODS, "bias of the sign per row"]
        lines += [f"**{name}**, root mean squared error over \\|x\\|\\|y\\|, predicted / measured", ""]
        lines += [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
        for compression, by_method in by_compression.items():
            cells = [f"{compression:g}x", f"{by_method[FOLD]['numbers']:,} ({by_method[PRUNE_BYTES]['numbers']:,})"]
            cells += [f"{root(by_method[m]['predicted'])} / {root(by_method[m]['measured'])}" for m in METHODS]
            row = by_method[ROW_FOLD]
            exact = row["measured"] <= _ROUNDING
            cells.append("0 / 0" if exact else f"{row['predicted_bias']:+.4f} / {row['measured_bias']:+.4f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    deviations = [
        abs(row["measured"] - row["predicted"]) / row["standard_error"] for row in rows if row["measured"] > _ROUNDING
    ]
    lines.append(
        f"Of {len(deviations)} measured mean squared errors, {sum(d < 2 for d in deviations)} are within two standard "
        f"errors of the prediction; the furthest is {max(deviations):.1f} away."
    )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path | str) -> None:
    """Root mean squared error against compression, one panel per pair of vectors: lines predicted, markers measured.

    Bars are two standard errors long either way. An error of 0, as at compression 1, has no place on the log axis. Two
    grey lines are the errors of the answer 0, which needs no numbers: for the given y and for magnitude pruning's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(row["vectors"] for row in rows))
    compressions = sorted({row["compression"] for row in rows})
    styles = dict(zip(METHODS, zip(("-", "--", "-", "-", ":", "-"), "os^DvP", strict=True), strict=True))
    figure, axes = plt.subplots(1, len(names), figsize=(12, 6), layout="constrained", sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, (method, (line, marker)) in enumerate(styles.items()):
            shown = [row for row in rows if (row["vectors"], row["method"]) == (name, method)]
            shown = [row for row in shown if row["measured"] > _ROUNDING]
            at = [row["compression"] for row in shown]
            measured = np.sqrt([row["measured"] for row in shown])
            bars = [row["standard_error"] / root for row, root in zip(shown, measured, strict=True)]  # 2 * d sqrt(v)
            axis.plot(at, np.sqrt([row["predicted"] for row in shown]), line, color=f"C{number}", alpha=0.8)
            style = {"color": f"C{number}", "marker": marker, "markerfacecolor": "none", "linestyle": "none"}
            axis.errorbar(at, measured, bars, capsize=2, label=method, **style)
        given = next(row for row in rows if row["vectors"] == name)
        axis.axhline(abs(given["product"]), color="grey", lw=1, label="the answer 0, given y")
        axis.axhline(given["n"] ** -0.5, color="grey", lw=1, linestyle=":", label="the answer 0, random y")
        axis.set(xscale="log", yscale="log", xlabel="compression n/m", title=f"{name} x and y")
        axis.set_xticks(compressions, [f"{compression:g}" for compression in compressions])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("root mean squared error of <x, y> over |x||y|")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("Inner products kept by sharing and by pruning: predicted (lines) and measured (markers)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
