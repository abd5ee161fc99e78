"""The arguments of compress_language_model.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from studies.language_model.rows import Row
from studies.language_model.tuning import TUNED

STAGES = ("untrained", "arithmetic", "rates", "distilled", "finetuned", "report")
ROWS = (
    "dense", "codebook:bits=4", "codebook:bits=3", "codebook:bits=2", "codebook:bits=4,group_size=64",
    "codebook:bits=2,group_size=64", "bitsandbytes:format=nf4", "bitsandbytes:format=fp4",
    "bitsandbytes:format=int8", "torchao:bits=4,group_size=64", "torchao:bits=4,group_size=128",
    "torchao:bits=3,group_size=64",
)  # fmt: skip
FINETUNED = "codebook:bits=4"


@dataclass
class Arguments:
    """What to compress, how, and for how long to train."""

    model: str = field(metadata={"help": "A language model: a folder or a Hub name."})
    gguf_file: str | None = HfArg(default=None, help="The file in that folder, if it is GGUF.")
    output_dir: str = HfArg(default="outputs/compress_language_model", help="Where runs, models and the report go.")
    fortunes_dir: str = HfArg(default="/usr/share/games/fortunes", help="Debian's fortunes, the other kind of text.")
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": f"Any of {', '.join(STAGES)}."})
    rows: list[str] = field(
        default_factory=lambda: list(ROWS),
        metadata={"help": "As METHOD:name=value,...; codebook takes the fields of RPSConfig."},
    )
    grid: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Rates to try."})
    grid_steps: int = HfArg(default=60, help="Steps of the runs that choose rates.")
    steps: int = HfArg(default=150, help="Steps of distillation.")
    embedding_rate: float | None = HfArg(default=None, help="Train the embedding, too, at this rate; None: frozen.")
    batch_size: int = HfArg(default=8, help="Sequences of 128 tokens per step.")
    methods: list[str] = field(default_factory=lambda: list(TUNED), metadata={"help": f"Any of {', '.join(TUNED)}."})
    finetune_row: str = HfArg(default=FINETUNED, help="The row whose codebooks are fine-tuned.")
    finetune_steps: int = HfArg(default=100, help="Steps of fine-tuning.")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of fine-tuning; the first tunes."})
    base_model: str | None = HfArg(default=None, help="The model's Hub name, for the cards.")
    threads: int = HfArg(default=1, help="Threads of torch.")
    device: str = HfArg(default="cpu", help="Of all models: cpu or cuda.")
    publish: bool = HfArg(default=False, help="Fill docs/language_model.md and model_cards/ from the runs.")

    def __post_init__(self):
        for name, known in (("stages", STAGES), ("methods", TUNED)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"--{name}: {unknown} are none of {list(known)}")
        self.parsed_rows = [Row.parse(text) for text in self.rows]
