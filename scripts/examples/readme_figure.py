"""The figure at the head of README.md: accuracy against storage, and costs beside the dense model.

    python scripts/examples/readme_figure.py

It measures nothing: every point is a row of docs/comparison/main-vit.jsonl (by scripts/compare.py; test accuracy of
three seeds) or of docs/benchmarks/cpu.jsonl (by scripts/bench.py; memory and time of GPT-2 small at ratio 0.1).
"""

import argparse
import io
import json
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLUE, ORANGE, GREY, BLACK = "#0b62a4", "#c65102", "#6b6b6b", "#222222"
CURVES = (  # label, color, marker, shift of the 10 % points to tell them apart, methods of which the best is drawn
    ("RPS (this library)", BLUE, "o", 1.05, ("rps",)),
    ("best pruning before training", ORANGE, "s", 1.0, ("random", "magnitude", "snip", "grasp", "synflow")),
    ("narrower model", GREY, "^", 1 / 1.05, ("width",)),
)


def accuracies(rows: list[dict], methods: tuple[str, ...]) -> dict[float, tuple[float, float]]:
    """Stored share in %: mean and standard deviation of the test accuracy in %, of the best of ``methods``."""
    found = {}
    for row in rows:
        if row["method"] in methods and "test" in row:
            scores, share = [100 * score for score in row["test"]], 100 / row["compression"]
            found[share] = max(found.get(share, (0.0, 0.0)), (fmean(scores), stdev(scores)))
    return found


def draw_accuracy(axis: plt.Axes, rows: list[dict]) -> None:
    dense = accuracies(rows, ("dense",))[100.0][0]
    axis.axhline(dense, color=BLACK, linewidth=1.2, linestyle=(0, (5, 3)))
    axis.text(1.75, dense + 0.15, f"{dense:.1f}  dense model", color=BLACK, va="bottom", weight="bold")
    for label, color, marker, shift, methods in CURVES:
        (ten, first), (two, last) = sorted(accuracies(rows, methods).items(), reverse=True)
        shares, means, spreads = (ten * shift, two), (first[0], last[0]), (first[1], last[1])
        axis.plot([100, shares[0]], [dense, means[0]], color=color, linewidth=1.2, alpha=0.4)
        axis.plot(shares, means, color=color, marker=marker, markersize=6.5, linewidth=2.2)
        axis.errorbar(shares, means, spreads, color=color, fmt="none", linewidth=1.1, capsize=3, alpha=0.8)
        axis.text(1.75, means[1], f"{means[1]:.1f}  {label}", color=color, va="center", weight="bold")
    axis.plot([100], [dense], marker="D", color=BLACK, markersize=6)
    axis.set(xscale="log", xlim=(125, 0.032), ylim=(73, 82), ylabel="test accuracy, %")
    axis.minorticks_off()
    axis.set_xticks((100, 10, 2), ("100 %\n(dense)", "10 %", "2 %"))
    axis.set_xlabel("numbers stored for the compressed weights", loc="left")
    axis.set_title("ViT trained from scratch on Fashion-MNIST, three seeds", loc="left", weight="bold")
    axis.spines["bottom"].set_bounds(125, 1.75)
    axis.grid(axis="y", alpha=0.25)


def draw_costs(axis: plt.Axes, rows: list[dict]) -> None:
    subject = ("gpt2", "views", 0.1)
    cells = {(r["work"], r["tokens"]): r for r in rows if (r["model"], r["form"], r["ratio"]) == subject}
    memory, step, load = cells["memory", 512], cells["step", 512], cells["load", None]
    state = 16 * memory["n"] / 2**20  # weight, gradient and AdamW's two moments, float32
    bars = {
        "compressed weights\nwith gradients and\nAdamW state": (memory["targets_ratio"], f"{state:,.0f} MiB"),
        "saved file": (load["file_ratio"], f"{load['dense_file_mib']:,.0f} MiB"),
        "peak memory\nof an AdamW step": (step["memory_ratio"], f"{step['dense_peak_mib']:,.0f} MiB"),
        "time of\nan AdamW step": (step["time_ratio"], f"{step['dense_milliseconds'] / 1000:.1f} s"),
    }
    for place, (ratio, dense) in enumerate(bars.values()):
        axis.barh(place, 100, color="#e6e6e6", height=0.6)
        axis.barh(place, 100 * ratio, color=BLUE, height=0.6)
        x, side, color = (50 * ratio, "center", "white") if ratio > 0.3 else (100 * ratio + 2, "left", BLUE)
        axis.text(x, place, f"{100 * ratio:.0f} %", ha=side, va="center", weight="bold", color=color)
        axis.text(103, place, dense, va="center", color=BLACK)
    axis.hlines(3, 100 * step["time_ratio_low"], 100 * step["time_ratio_high"], color=BLACK, linewidth=2)  # quartiles
    axis.set_yticks(range(len(bars)), bars)
    axis.set_xticks((0, 25, 50, 75, 100), ("0", "25 %", "50 %", "75 %", "dense"))
    axis.set(xlim=(0, 124), xlabel="relative to dense (its values at the right)")
    axis.set_title("GPT-2 small at ratio 0.1, on a CPU", loc="left", weight="bold")
    axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS / "readme.png", help="where the figure goes")
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(12.4, 4), layout="constrained", width_ratios=(1.32, 1))
    parts = ((draw_accuracy, "comparison/main-vit.jsonl"), (draw_costs, "benchmarks/cpu.jsonl"))
    for axis, (draw, name) in zip(axes, parts, strict=True):
        draw(axis, [json.loads(line) for line in (DOCS / name).read_text().splitlines()])
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.04)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=125, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(64).save(parser.parse_args().output, optimize=True)


if __name__ == "__main__":
    main()
