"""The arguments of compress_encoder.py: what to compress, how far, and for how long to train."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from studies.encoder.students import METHODS, PACKAGE


@dataclass
class Arguments:
    """What to compress, how far, and for how long to train."""

    model: str | None = HfArg(default=None, help=f"Teacher: a folder or Hub name; default: the package {PACKAGE}.")
    output_dir: str = HfArg(default="outputs/compress_encoder", help="Where everything goes; one folder per teacher.")
    corpus_dir: str | None = HfArg(
        default=None, help="Folder of train.jsonl, validation.jsonl and test.jsonl with a column text; default: made."
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of {', '.join(METHODS)}."}
    )
    ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.25, 0.1],
        metadata={"help": "Bytes of the targeted weights over the dense ones'."},
    )
    steps: int = HfArg(default=3000, help="Optimizer steps of the long runs.")
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "Known rates, as METHOD=RATE; the grid finds the others."}
    )
    grid: list[float] = field(
        default_factory=lambda: [2.5e-4, 5e-4, 1e-3, 2e-3],
        metadata={"help": "Rates to try, for every method and ratio."},
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
    publish: bool = HfArg(default=False, help="Copy the figure to docs/ and the cards to model_cards/.")

    def __post_init__(self):
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"--methods: {unknown} are none of {list(METHODS)}")
        known = dict(entry.partition("=")[::2] for entry in self.learning_rates)
        if unknown := sorted(set(known) - set(METHODS)):
            raise ValueError(f"--learning_rates: {unknown} are none of {list(METHODS)}; write rps=2e-3")
        self.known_rates = {method: float(rate) for method, rate in known.items()}
