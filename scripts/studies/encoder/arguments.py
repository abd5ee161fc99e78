"""The arguments of compress_encoder.py: what to compress, how far, and for how long to train."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from studies.encoder.students import METHODS, PACKAGE, STUDENTS, Student


@dataclass
class Arguments:
    """What to compress, how far, and for how long to train."""

    model: str | None = HfArg(default=None, help=f"Teacher: a folder or Hub name; default: the package {PACKAGE}.")
    output_dir: str = HfArg(default="outputs/compress_encoder", help="Where everything goes; one folder per teacher.")
    corpus_dir: str | None = HfArg(
        default=None, help="Folder of train.jsonl, validation.jsonl and test.jsonl with a column text; default: made."
    )
    students: list[str] = field(
        default_factory=lambda: list(STUDENTS),
        metadata={"help": f"Rows to run, as METHOD-SIZE; default: {' '.join(STUDENTS)}."},
    )
    rows: str | None = HfArg(
        default=None, help="Rows of earlier runs (JSON lines) for table and figure, where the output folder has none."
    )
    calibration_samples: int = HfArg(default=600, help="Training texts that codebooks are calibrated on.")
    steps: int = HfArg(
        default=3000,
        help="Optimizer steps of the long runs; 0: quantised models and learned maps are judged untrained.",
    )
    learning_rates: list[str] = field(
        default_factory=list,
        metadata={"help": "Known rates, as METHOD=RATE or METHOD-SIZE=RATE; the grid finds the others."},
    )
    grid: list[float] = field(
        default_factory=lambda: [2.5e-4, 5e-4, 1e-3, 2e-3],
        metadata={"help": "Rates to try, for every student."},
    )
    grid_steps: int = HfArg(default=200, help="Optimizer steps of the short runs.")
    batch_size: int = HfArg(default=64, help="Texts per step.")
    max_length: int = HfArg(default=64, help="Tokens of a text that are read.")
    finetune_flags: str = HfArg(default="", help="Further flags for finetune.py, as --finetune_flags='--seed 1'.")
    exclude_modules: list[str] = field(
        default_factory=lambda: ["pooler.dense"], metadata={"help": "Linear layers to leave as they are."}
    )
    jobs: int = HfArg(default=1, help="Runs side by side, one thread each.")
    name: str = HfArg(default="minilm", help="What files and cards call the model.")
    base_model: str | None = HfArg(default=None, help="The teacher's Hub name, for the cards.")
    publish: bool = HfArg(default=False, help="Copy figure and rows to docs/ and the cards to model_cards/.")

    def __post_init__(self):
        self.chosen = [Student.parse(text) for text in self.students]
        trained = [str(student) for student in self.chosen if not (student.is_quantised or student.is_learned)]
        if self.steps == 0 and trained:
            raise ValueError(
                f"--steps 0 is for quantised models and learned maps; leave {trained} out of --students, or give steps"
            )
        known = dict(entry.partition("=")[::2] for entry in self.learning_rates)
        for name in set(known) - set(METHODS):
            Student.parse(name, "--learning_rates")
        self.known_rates = {name: float(rate) for name, rate in known.items()}

    def known_rate(self, student: Student) -> float | None:
        """The rate that was given for ``student``, or for all of its method."""
        return self.known_rates.get(str(student), self.known_rates.get(student.method))
