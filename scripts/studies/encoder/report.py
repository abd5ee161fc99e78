"""The study's table, figure, results and model cards."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

from hf_rps.integrations.model_card import write_model_card
from studies.encoder.arguments import Arguments
from studies.encoder.scores import SCORES, score
from studies.encoder.stages import SCRIPTS, Run, Study
from studies.encoder.students import METHODS, stored_bytes

CORPUS = f"documentation and standard library of Python {platform.python_version()}"


def markdown(rows: list[dict]) -> str:
    """One line per run; the teacher first."""
    head = f"| | ratio | targeted weights, MB | file, MB | learning rate | {' | '.join(SCORES.values())} "
    lines = [head + "| before training: cosine | recall@10 |", "|---" * (7 + len(SCORES)) + "|"]
    for row in rows:
        sizes = [f"{row[name] / 1e6:.2f}" for name in ("target_bytes", "file_bytes")]
        scores = [f"{row[name]:.3f}" if name in row else "" for name in (*SCORES, "start_cosine", "start_recall_at_10")]
        rate = f"{row['rate']:g}" if "rate" in row else ""
        cells = [METHODS.get(row["method"], row["method"]), f"{row['ratio']:g}", *sizes, rate, *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """recall@10 and cosine against the bytes of the targeted weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key in zip(axes, ("recall_at_10", "cosine"), strict=True):
        for method, label in METHODS.items():
            points = sorted((row["target_bytes"] / 1e6, row[key]) for row in rows if row["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=label) if points else None
        axis.set(xscale="log", xlabel="MB of the targeted weights", ylabel=f"{SCORES[key]} with the teacher")
        sizes = sorted({round(row["target_bytes"] / 1e6, 1) for row in rows[1:]})
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"Distilled to fewer bytes; the teacher's targeted weights are {rows[0]['target_bytes'] / 1e6:.1f} MB"
    )
    figure.savefig(path, dpi=150)


def report(study: Study, runs: list[Run]) -> str:
    """Write table, figure, results and cards; returns the table."""
    folder = study.output / "report"
    folder.mkdir(exist_ok=True)
    teacher = study.load(study.teacher)
    sizes = stored_bytes(teacher, "teacher", study.config, (study.teacher / "model.safetensors").stat().st_size)
    rows = [{"method": "teacher", "ratio": 1} | sizes | score(study.target, study.target)]
    rows += [study.evaluate(run) for run in runs]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.md").write_text(markdown(rows))
    draw(rows, folder / "distillation.png")
    written = [folder / "distillation.png"]
    for run, row in zip(runs, rows[1:], strict=True):
        if run.method == "rps":
            written += write_card(study, run, row, folder)
    for file in written if study.arguments.publish else ():
        target = SCRIPTS.parent / ("docs" if file.stem == "distillation" else "model_cards") / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    return markdown(rows)


def write_card(study: Study, run: Run, row: dict, folder: Path) -> list[Path]:
    """Write the card of a run beside its model, and copy it and its learning curve to ``folder``; the copies' paths."""
    args, model = study.arguments, study.folder(run) / "model"
    card = folder / f"{args.name}-rps-{run.ratio:g}.md"
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
    private, defaults = {"model", "output_dir", "corpus_dir", "jobs", "publish"}, Arguments()
    changed = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in private}
    command = ["python", "scripts/compress_encoder.py"]
    for name, value in changed.items():
        if value != getattr(defaults, name):
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(command)
