"""The comparison: RPS beside pruning, smaller models and earlier parameter sharing, on the same work.

    python scripts/compare.py --preset quick                    # two cores, the main table in under 30 minutes
    python scripts/compare.py --preset full --device cuda       # a GPU, every cell
    python scripts/compare.py --studies stability learning-rate --tasks vit convnet

Runs are kept in OUTPUT_DIR/runs.jsonl under a hash of their settings: started again, the script goes on where it was,
and with other flags it runs only what is new. Tables (Markdown) and plots (PNG) go to OUTPUT_DIR, and with --docs also
into docs/comparison.md. Images are Fashion-MNIST of Debian's package dataset-fashion-mnist, or --image_dataset; text is
that of the running Python's documentation and standard library. Nothing is downloaded unless --image_dataset asks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

from studies import theory
from studies.comparison import report, studies
from studies.comparison.methods import METHODS
from studies.comparison.runner import Environment, Runner
from studies.comparison.studies import PRESETS
from studies.comparison.tasks import FASHION_MNIST, FASHION_MNIST_FOLDER, TASKS

logger = logging.getLogger("compare")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "comparison.md"
Table = Callable[[list[dict]], str]
Plot = Callable[[list[dict], Path], None]
STUDIES = ("main", "stability", "learning-rate", "continuity", "theory")


@dataclass
class Arguments:
    """What to compare, how thoroughly, and where."""

    preset: Literal["quick", "full"] = field(
        default="quick", metadata={"help": "Sizes and cells: quick for two CPU cores, full for a GPU."}
    )
    studies: list[str] = field(default_factory=lambda: ["main"], metadata={"help": f"Any of {', '.join(STUDIES)}."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": f"Any of {', '.join(TASKS)}; default: the preset's."}
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": f"Of the main table: any of {', '.join(METHODS)}; default: all."}
    )
    compressions: list[float] | None = field(
        default=None, metadata={"help": "Targeted weights over stored numbers; default: the preset's."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Grid of the main table; default: four rates by optimizer."}
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "The first one tunes; default: the preset's."})
    train_size: int | None = field(default=None, metadata={"help": "Training images or sequences; default: preset."})
    epochs: float | None = field(default=None, metadata={"help": "Passes over them; default: the preset's."})
    image_dataset: str = field(
        default=FASHION_MNIST,
        metadata={"help": "A data set of the Hub (uoft-cs/cifar10, uoft-cs/cifar100) or a folder of images."},
    )
    fashion_mnist_dir: str = field(
        default=str(FASHION_MNIST_FOLDER), metadata={"help": "Folder of Fashion-MNIST's four files."}
    )
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where runs, tables and plots go."})
    workers: int = field(default=2, metadata={"help": "Runs at a time, each in a process of its own."})
    threads: int = field(default=1, metadata={"help": "Threads of torch in each."})
    device: str = field(default="cpu", metadata={"help": "Device of torch to train on."})
    docs: bool = field(default=False, metadata={"help": "Also fill docs/comparison.md in."})

    def __post_init__(self):
        for name, choices in (("studies", STUDIES), ("tasks", TASKS), ("methods", METHODS)):
            unknown = [value for value in getattr(self, name) or () if value not in choices]
            if unknown:
                raise ValueError(f"--{name}: {unknown[0]!r} is not one of {', '.join(choices)}")
        below = [c for c in self.compressions or () if c < 1]
        if below:
            raise ValueError(f"--compressions: {below[0]:g} is below 1; expected targeted weights over stored numbers")
        if self.workers < 1 or self.threads < 1:
            raise ValueError(f"--workers {self.workers} --threads {self.threads}: expected at least one of each")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device!r} can't be used here: {error}") from error

    def resolved_preset(self) -> studies.Preset:
        """The preset with what the flags change."""
        preset = PRESETS[self.preset]
        changes = {name: tuple(getattr(self, name)) for name in ("compressions", "seeds") if getattr(self, name)}
        sizes = {name: getattr(self, name) for name in ("train_size", "epochs") if getattr(self, name)}
        for name in ("sizes", "short") if sizes else ():
            changes[name] = {task: dataclasses.replace(s, **sizes) for task, s in getattr(preset, name).items()}
        return dataclasses.replace(preset, **changes)


class Results:
    """Writes tables, rows and plots to a folder and, if asked, into the page of the documentation."""

    def __init__(self, folder: Path, docs: bool):
        self.folder, self.docs = folder, docs

    def table(self, name: str, text: str) -> None:
        (self.folder / f"{name}.md").write_text(text)
        print(f"\n{text}", flush=True)
        if self.docs and not report.fill(PAGE, name, text):
            logger.warning("%s has no place for %r", PAGE.name, name)

    def write(self, name: str, rows: list[dict], table: Table, plot: Plot | None = None) -> None:
        """NAME.jsonl, NAME.md and, with ``plot``, NAME.png."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._keep(path)
        self.table(name, table(rows))
        if plot is not None:
            path = path.with_suffix(".png")
            plot(rows, path)
            self._keep(path)

    def _keep(self, path: Path) -> None:
        if self.docs:
            (PAGE.parent / "comparison").mkdir(exist_ok=True)
            shutil.copyfile(path, PAGE.parent / "comparison" / path.name)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses(argv)
    preset, folder = arguments.resolved_preset(), Path(arguments.output_dir)
    tasks, dataset = arguments.tasks or list(preset.tasks), arguments.image_dataset
    methods = arguments.methods or list(METHODS)
    environment = Environment(
        folder, Path(arguments.fashion_mnist_dir), arguments.workers, arguments.threads, arguments.device
    )
    runner, results = Runner(environment), Results(folder, arguments.docs)
    if "theory" in arguments.studies:
        results.write("theory", theory.study(), theory.table, theory.plot)
    for task in tasks:
        if "main" in arguments.studies:
            rows = studies.compare(runner, task, methods, preset, dataset, arguments.learning_rates)
            results.write(f"main-{task}", rows, report.compare_table, report.compare_plot)
            results.table(f"storage-{task}", report.storage_table(rows))
        if "stability" in arguments.studies:
            rows = studies.stability(runner, task, preset, dataset)
            results.write(f"stability-{task}", rows, report.stability_table, report.stability_plot)
        if "learning-rate" in arguments.studies:
            rows = studies.learning_rate_law(runner, task, preset, dataset)
            results.write(f"learning-rate-{task}", rows, report.law_table, report.law_plot)
        if "continuity" in arguments.studies:
            rows = studies.continuity(runner, task, preset, dataset)
            results.write(f"continuity-{task}", rows, report.continuity_table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
