"""The study's table, figure, results and model cards."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np

from hf_rps.integrations.model_card import write_model_card
from studies.encoder.arguments import Arguments
from studies.encoder.scores import SCORES, score
from studies.encoder.stages import SCRIPTS, Run, Study
from studies.encoder.students import METHODS, Student, stored_bytes

ROWS = "distillation.jsonl"
CORPUS = f"documentation and standard library of Python {platform.python_version()}"


def markdown(rows: list[dict]) -> str:
    """One line per run; the teacher first."""
    head = f"| | bits per weight | targeted weights, MB | file, MB | learning rate | {' | '.join(SCORES.values())} "
    lines = [head + "| before training: cosine | recall@10 |", "|---" * (7 + len(SCORES)) + "|"]
    for row in rows:
        sizes = [f"{row['bits']:.2f}", *(f"{row[name] / 1e6:.2f}" for name in ("target_bytes", "file_bytes"))]
        scores = [f"{row[name]:.3f}" if name in row else "" for name in (*SCORES, "start_cosine", "start_recall_at_10")]
        rate = f"{row['rate']:g}" if "rate" in row else ""
        lines.append(f"| {' | '.join([label(row['student']), *sizes, rate, *scores])} |")
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """What a student is called.

    >>> label("codebook-3"), label("int4-32"), label("rps-0.1"), label("nf4")
    ('codebook per row, 3 bits', 'torchao int4, groups of 32', 'RPS', 'bitsandbytes NF4')
    """
    method, _, size = name.partition("-")
    of = {"codebook": f", {size} bits", "int4": f", groups of {size}"}.get(method.partition("+")[0], "")
    return METHODS.get(method, method) + of


def draw(rows: list[dict], path: Path) -> None:
    """recall@10 and cosine against the bytes of the targeted weights, after training and (hollow) before.

    Rows that target other weights, too, are not in it.
    """
    rows = [row for row in rows if "+" not in row["method"]]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, key in zip(axes, ("recall_at_10", "cosine"), strict=True):
        for number, (method, name) in enumerate(METHODS.items()):
            found = sorted((row for row in rows if row["method"] == method), key=lambda row: row["target_bytes"])
            if not found:
                continue
            trained = [(row["target_bytes"] / 1e6, row[key]) for row in found if key in row] or [(np.nan, np.nan)]
            starts = [(row["target_bytes"] / 1e6, row[f"start_{key}"]) for row in found]
            axis.plot(*zip(*trained, strict=True), marker="o", color=f"C{number}", label=name)
            axis.plot(*zip(*starts, strict=True), marker="o", mfc="none", linestyle=":", color=f"C{number}")
        axis.set(xscale="log", xlabel="MB of the targeted weights", ylabel=f"{SCORES[key]} with the teacher")
        most, least = (end(row["target_bytes"] for row in rows[1:]) / 1e6 for end in (max, min))
        ticks = [size for size in (0.5, 1, 2, 3, 5, 10, 20, 50) if 0.8 * least < size < 1.25 * most]
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    dense = rows[0]["target_bytes"] / 1e6
    figure.suptitle(f"After training, and (hollow) before; the teacher's targeted weights are {dense:.1f} MB")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def earlier_rows(study: Study) -> list[dict]:
    """Those of the output folder's last report; where there is none yet, those of --rows."""
    file = study.output / "report" / ROWS
    file = file if file.exists() else study.arguments.rows
    return [json.loads(line) for line in Path(file).read_text().splitlines()] if file else []


def report(study: Study, runs: list[Run]) -> str:
    """Write table, figure, rows and cards; returns the table. Rows of earlier reports are kept."""
    folder, kept = study.output / "report", earlier_rows(study)
    folder.mkdir(exist_ok=True)
    teacher = study.load(study.teacher)
    sizes = stored_bytes(
        teacher, Student("teacher"), study.config, (study.teacher / "model.safetensors").stat().st_size
    )
    own = {"student": "teacher", "method": "teacher", "bits": 32.0} | sizes | score(study.target, study.target)
    new = [study.evaluate(run) for run in runs]
    found = {row["student"]: row for row in (*kept, own, *new)}
    rows = sorted(found.values(), key=_place)
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.md").write_text(markdown(rows))
    draw(rows, folder / "distillation.png")
    written = [folder / "distillation.png", folder / ROWS]
    for run, row in zip(runs, new, strict=True):
        if run.steps and (run.student.method == "rps" or run.student.is_learned):
            written += write_card(study, run, row, folder)
    for file in written if study.arguments.publish else ():
        target = SCRIPTS.parent / ("docs" if file.stem == "distillation" else "model_cards") / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    return markdown(rows)


def _place(row: dict) -> tuple:
    """Where a row stands in the table: by method, and from many bytes to few."""
    return ["teacher", *METHODS].index(row["method"]), -row["target_bytes"]


def write_card(study: Study, run: Run, row: dict, folder: Path) -> list[Path]:
    """Write the card of a run beside its model, and copy it and its learning curve to ``folder``; the copies' paths."""
    args, model = study.arguments, study.folder(run) / "model"
    card = folder / f"{args.name}-{run.student}.md"
    curve = folder / f"{card.stem}.png"
    shutil.copy(model / "learning_curve.png", model / curve.name)
    write_model_card(
        model, model_name=card.stem, base_model=args.base_model or args.model, teacher=args.base_model or args.model,
        task="feature-extraction", dataset=CORPUS if args.corpus_dir is None else Path(args.corpus_dir).name,
        metrics={f"{SCORES[name]} with the teacher": row[name] for name in SCORES}, learning_curve=curve.name,
        command=command_line(args),
    )  # fmt: skip
    shutil.copy(model / "README.md", card)
    shutil.copy(model / curve.name, curve)
    return [card, curve]


def command_line(args: Arguments) -> str:
    """The command with what is not default, without what is this machine's own."""
    private, defaults = {"model", "output_dir", "corpus_dir", "rows", "jobs", "publish"}, Arguments()
    changed = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in private}
    command = ["python", "scripts/compress_encoder.py"]
    for name, value in changed.items():
        if value != getattr(defaults, name):
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(command)
