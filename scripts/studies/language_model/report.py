"""The study's tables and plot, made of its runs, the page that holds them, and the cards of the compressed models."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

from hf_rps.integrations.model_card import write_model_card
from studies.comparison.report import fill, markdown
from studies.language_model.arguments import Arguments
from studies.language_model.data import CHOICES
from studies.language_model.rows import CODEBOOK, Row
from studies.language_model.runs import Run, Runs
from studies.language_model.scores import PROMPTS
from studies.language_model.tuning import TITLES, TUNED

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "language_model.md"
DATA = ROOT / "docs" / "language_model"  # the rows behind the page, and its plot
PLOT = "bits.png"


def main_table(runs: Runs) -> str:
    """Every row before training and after each length of distillation; perplexities over the dense model's."""
    (dense,) = runs.of("untrained", "dense").values()
    found = [(run, result) for stage in ("untrained", "distilled") for run, result in runs.of(stage).items()]
    order = {run.row: i for i, run in enumerate(sorted(runs.of("untrained"), key=lambda run: _place(run, runs)))}
    lines = []
    for run, result in sorted(found, key=lambda pair: (order[pair[0].row], pair[0].variant, pair[0].steps)):
        ratios = [result[name] / dense[name] for name in ("perplexity", "other_perplexity")]
        trained = f"{run.steps}, {run.rate:g}" if run.steps else ""
        cells = [title(run), f"{result['bits']:.2f}", trained, f"{result['perplexity']:.2f}"]
        lines.append([*cells, *(f"{ratio:.3f}" for ratio in ratios), f"{100 * result['choices']:.1f}"])
    other = f"{dense['other']} / dense"
    return markdown(
        ("", "bits a weight", "steps, rate", "perplexity", "/ dense", other, f"right of {CHOICES}, %"), lines
    )


def title(run: Run) -> str:
    """What a table calls a run: its row, and what else is not as ever."""
    return ", ".join(filter(None, (Row(run.row).title, run.variant)))


def _place(run: Run, runs: Runs) -> tuple:
    """The dense model first, then codebooks, then the peers, each from many bits to few."""
    method = Row(run.row).method
    return (
        ("dense", CODEBOOK).index(method) if method in ("dense", CODEBOOK) else 2,
        -runs.results[run]["bits"],
        run.row,
    )


def rates_table(runs: Runs) -> str:
    """Perplexity on the validation text after short runs, by row and learning rate."""
    found = runs.of("rates")
    rates = sorted({run.rate for run in found})
    lines = []
    for row, steps, variant in dict.fromkeys((run.row, run.steps, run.variant) for run in found):
        here = {r.rate: x for r, x in found.items() if (r.row, r.steps, r.variant) == (row, steps, variant)}
        best = min(here, key=lambda rate: here[rate]["validation"])
        texts = [f"{here[rate]['validation']:.2f}" if rate in here else "" for rate in rates]
        texts = [f"**{text}**" if rate == best else text for rate, text in zip(rates, texts, strict=True)]
        bits, trained = here[best]["bits"], here[best]["trained"]
        lines.append(
            [title(Run("rates", row, variant=variant)), f"{bits:.2f}", f"{trained / 1e6:.2f}", str(steps), *texts]
        )
    head = ("", "bits a weight", "trained, millions", "steps", *(f"{rate:g}" for rate in rates))
    return markdown(head, lines)


def arithmetic_table(runs: Runs) -> str:
    """The loss of every second step, by the dtype of the products."""
    found = runs.of("arithmetic")
    count = max(len(result["losses"]) for result in found.values())
    lines = []
    for run, result in found.items():
        losses = [f"{loss:.4f}" for loss in result["losses"][1::2]]
        lines.append([title(run), *losses, f"{result['seconds']:.1f}"])
    return markdown(("step", *map(str, range(2, count + 1, 2)), "seconds per step"), lines)


def samples_table(runs: Runs) -> str:
    """What the models write after one prompt."""
    found = {**runs.of("untrained"), **runs.of("distilled")}
    lines = []
    for run, result in found.items():
        if Row(run.row).method in ("dense", CODEBOOK):
            text = " ".join(result["samples"][0].split()).replace("|", "\\|")
            lines.append([title(run), str(run.steps or ""), text])
    return markdown(("", "steps", PROMPTS[0] + " …"), lines)


def finetuned_table(runs: Runs) -> str:
    """Each method at its best rate: memory, and the perplexity of held-out code before and after its longest runs."""
    lines = []
    rows = {(run.row, run.variant) for run in runs.of("finetuned")}
    for method, variant in sorted(rows, key=lambda row: ([*TUNED].index(row[0]), row[1])):
        found = {run: x for run, x in runs.of("finetuned", method).items() if run.variant == variant}
        longest = max((run.steps, run.batch_size) for run in found)
        found = {run: result for run, result in found.items() if (run.steps, run.batch_size) == longest}
        first = min(run.seed for run in found)
        tried = {run: result["validation"] for run, result in found.items() if run.seed == first}
        best = min(tried, key=tried.get)
        there = [result for run, result in found.items() if replace(run, seed=first) == best]
        after = [result["perplexity"] for result in there]
        lines.append({
            "": ": ".join(filter(None, (TITLES[method], variant))),
            "steps × sequences": f"{best.steps} × {best.batch_size}",
            "trained, millions": f"{there[0]['trained'] / 1e6:.2f}",
            "frozen, MB": f"{there[0]['frozen_bytes'] / 1e6:.0f}",
            "memory, MB": f"{there[0]['memory'] / 1e6:.0f}",
            "rate": f"{best.rate:g}",
            "before": f"{there[0]['before']:.2f}",
            "after": f"{fmean(after):.2f}" + (f" ± {stdev(after):.2f}" if len(after) > 1 else ""),
            "seeds": str(len(after)),
            "documentation after": f"{fmean(result['documentation'] for result in there):.2f}",
            "rates tried: validation": ", ".join(f"{run.rate:g}: {score:.2f}" for run, score in tried.items()),
        })  # fmt: skip
    return markdown(tuple(lines[0]), [tuple(line.values()) for line in lines])


TABLES = {
    "main": (main_table, ("untrained",)),
    "rates": (rates_table, ("rates",)),
    "arithmetic": (arithmetic_table, ("arithmetic",)),
    "samples": (samples_table, ("untrained",)),
    "finetuned": (finetuned_table, ("finetuned",)),
}


def tables(runs: Runs) -> dict[str, str]:
    """By name, those whose stages have been run."""
    return {name: table(runs) for name, (table, stages) in TABLES.items() if all(map(runs.of, stages))}


def draw(runs: Runs, path: Path) -> None:
    """Perplexity over the dense model's against bits per weight, before and after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (dense,) = runs.of("untrained", "dense").values()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, text in zip(
        axes, ("perplexity", "other_perplexity"), ("Python's documentation", dense["other"]), strict=True
    ):
        for method, marker in ((CODEBOOK, "o"), ("bitsandbytes", "s"), ("torchao", "^")):
            for stage, filled in (("untrained", "none"), ("distilled", "full")):
                points = [
                    (result["bits"], result[key] / dense[key])
                    for run, result in runs.of(stage).items()
                    if Row(run.row).method == method and result["bits"] < 6
                ]
                label = f"{'codebooks' if method == CODEBOOK else method}, {stage}"
                if points:
                    axis.plot(*zip(*sorted(points), strict=True), marker, fillstyle=filled, label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="bits per targeted weight", ylabel="perplexity / dense", title=text, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(study) -> str:
    """Write tables, plot, rows and cards to OUTPUT_DIR/report and, if asked, into the documentation; the tables."""
    folder, runs = study.output / "report", study.runs
    folder.mkdir(exist_ok=True)
    made = tables(runs)
    for name, text in made.items():
        (folder / f"{name}.md").write_text(text)
    lines = [json.dumps({"run": asdict(run)} | result) + "\n" for run, result in runs.results.items()]
    (folder / "runs.jsonl").write_text("".join(lines))
    if "main" in made:
        draw(runs, folder / PLOT)
    longest = {run.row: run for run in sorted(runs.of("distilled"), key=lambda run: run.steps) if not run.variant}
    cards = [card for run in longest.values() for card in write_card(study, run, runs.results[run], folder)]
    if study.arguments.publish:
        DATA.mkdir(exist_ok=True)
        shutil.copy(folder / "runs.jsonl", DATA / "runs.jsonl")
        shutil.copy(folder / PLOT, DATA / PLOT)
        for card in cards:
            shutil.copy(card, ROOT / "model_cards" / card.name)
        if missing := [name for name, text in made.items() if not fill(PAGE, name, text)]:
            raise ValueError(f"{PAGE} has no place for {missing}; write <!-- NAME --> and <!-- end --> there")
    return "\n".join(made.values())


def write_card(study, run: Run, result: dict, folder: Path) -> list[Path]:
    """Write the card of a distilled model beside it, with its learning curve, and copies to ``folder``; their paths."""
    args, row, model = study.arguments, Row(run.row), study.folder(run)
    if row.method != CODEBOOK or not model.exists():
        return []
    name = args.base_model or Path(args.model).name
    label = f"{name.rpartition('/')[2].lower()}-{row.folder}"
    curve = model / f"{label}.png"
    draw_losses(result["losses"], curve)
    (dense,) = study.runs.of("untrained", "dense").values()
    write_model_card(
        model, model_name=label, base_model=name, teacher=name, dataset="documentation of Python",
        metrics={
            "perplexity": result["perplexity"],
            "perplexity over the dense model's": result["perplexity"] / dense["perplexity"],
            "bits per compressed weight": result["bits"],
        },
        learning_curve=curve.name, command=command_line(args, run),
    )  # fmt: skip
    shutil.copy(model / "README.md", folder / f"{label}.md")
    shutil.copy(curve, folder / curve.name)
    return [folder / f"{label}.md", folder / curve.name]


def draw_losses(losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, linewidth=1)
    axis.set(xlabel="step", ylabel="KL divergence from the dense model, nats", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def command_line(args: Arguments, run: Run) -> str:
    """The command of one distilled row, without what is this machine's own."""
    command = ["python", "scripts/compress_language_model.py", "--model", Path(args.model).name]
    if args.gguf_file:
        command += ["--gguf_file", args.gguf_file]
    command += ["--stages", "untrained", "rates", "distilled", "--rows", "dense", run.row]
    command += ["--grid", f"{run.rate:g}", "--steps", str(run.steps)]
    return shlex.join([*command, "--batch_size", str(run.batch_size)])
