"""The command line of compare.py: what to compare, how thoroughly, and where the results go."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

from studies import theory
from studies.comparison import continuity, folding, learning_rates, main_table, stability
from studies.comparison.methods import METHODS
from studies.comparison.presets import PRESETS, Preset
from studies.comparison.report import Results
from studies.comparison.runner import Environment, Runner
from studies.comparison.tasks import FASHION_MNIST, FASHION_MNIST_FOLDER, TASKS

STUDIES = ("main", "stability", "learning-rate", "continuity", "forms", "folds", "folded-rates", "theory")


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
    docs: bool = field(default=False, metadata={"help": "Also fill in docs/comparison.md."})

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

    def resolved_preset(self) -> Preset:
        """The preset with what the flags change."""
        preset = PRESETS[self.preset]
        changes = {name: tuple(getattr(self, name)) for name in ("compressions", "seeds") if getattr(self, name)}
        sizes = {name: getattr(self, name) for name in ("train_size", "epochs") if getattr(self, name)}
        for name in ("sizes", "short") if sizes else ():
            changes[name] = {task: dataclasses.replace(s, **sizes) for task, s in getattr(preset, name).items()}
        return dataclasses.replace(preset, **changes)


def main(argv: list[str] | None = None) -> None:
    """Run the studies that are asked for, and write their results."""
    (arguments,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses(argv)
    preset, folder = arguments.resolved_preset(), Path(arguments.output_dir)
    environment = Environment(
        folder, Path(arguments.fashion_mnist_dir), arguments.workers, arguments.threads, arguments.device
    )
    runner, results = Runner(environment), Results(folder, arguments.docs)
    if "theory" in arguments.studies:
        results.write("theory", theory.study(), theory.table, theory.plot)
    for task in arguments.tasks or preset.tasks:
        work = (task, preset, arguments.image_dataset)
        if "main" in arguments.studies:
            methods = arguments.methods or [name for name, method in METHODS.items() if method.kind != "form"]
            rows = main_table.compare(runner, task, methods, preset, arguments.image_dataset, arguments.learning_rates)
            results.write(f"main-{task}", rows, main_table.compare_table, main_table.compare_plot)
            results.table(f"storage-{task}", main_table.storage_table(rows))
        if "stability" in arguments.studies:
            rows = stability.stability(runner, *work)
            results.write(f"stability-{task}", rows, stability.stability_table, stability.stability_plot)
        if "learning-rate" in arguments.studies:
            rows = learning_rates.learning_rate_law(runner, *work)
            results.write(f"learning-rate-{task}", rows, learning_rates.law_table, learning_rates.law_plot)
        if "continuity" in arguments.studies:
            rows = continuity.continuity(runner, *work)
            results.write(f"continuity-{task}", rows, continuity.continuity_table)
        if "forms" in arguments.studies:
            rows = folding.forms(runner, *work, arguments.methods, arguments.learning_rates)
            results.write(f"forms-{task}", rows, folding.forms_table)
        if "folds" in arguments.studies:
            rows = folding.folds(runner, *work, arguments.learning_rates)
            results.write(f"folds-{task}", rows, folding.folds_table, folding.folds_plot)
        if "folded-rates" in arguments.studies:
            rows = learning_rates.learning_rate_law(runner, *work, "fold-full")
            results.write(f"folded-rates-{task}", rows, learning_rates.law_table, learning_rates.law_plot)
            rows = stability.stability(runner, *work, ("fold-full",))
            results.write(f"folded-stability-{task}", rows, stability.stability_table)
