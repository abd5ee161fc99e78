"""The stages of the study over one output folder: corpus, students, learning rates, long runs, evaluation.

There is no training loop here: every run is one of finetune.py, in a process of its own, so that what the study
measures is what users of that script get.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_rps import RPSConfig
from studies.corpus import write_corpus
from studies.encoder.arguments import Arguments
from studies.encoder.scores import embed, score
from studies.encoder.students import find_teacher, smaller_student, start, stored_bytes

SCRIPTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """One run of finetune.py."""

    method: str
    ratio: float
    rate: float
    steps: int


class Study:
    """The stages, over one output folder."""

    def __init__(self, arguments: Arguments):
        self.arguments, self.output = arguments, Path(arguments.output_dir)
        self.corpus = Path(arguments.corpus_dir or self.output / "corpus")
        self.teacher, self.config = self.output / "teacher", RPSConfig(exclude_modules=arguments.exclude_modules)

    def prepare(self) -> None:
        """Corpus, teacher (a copy in float32) and smaller students."""
        source, name = find_teacher(self.arguments.model)
        self.arguments.base_model = self.arguments.base_model or name
        record = self.output / "teacher" / "source.json"
        if not (self.corpus / "train.jsonl").exists():
            write_corpus(self.corpus)
        if not record.exists():
            AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(self.teacher)
            AutoTokenizer.from_pretrained(source).save_pretrained(self.teacher)
            record.write_text(json.dumps(source))
        elif json.loads(record.read_text()) != source:
            raise ValueError(
                f"{self.output} is of {json.loads(record.read_text())}, not {source}; take another --output_dir"
            )
        for ratio in self.arguments.ratios if "smaller" in self.arguments.methods else ():
            folder = self.source("smaller", ratio)
            if not (folder / "tokenizer_config.json").exists():
                smaller_student(self.load(self.teacher), ratio, self.config).save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        return AutoModel.from_pretrained(folder, dtype=torch.float32)

    def source(self, method: str, ratio: float) -> Path:
        """The model that a run starts from."""
        return self.output / "students" / f"smaller-{ratio:g}" if method == "smaller" else self.teacher

    def folder(self, run: Run) -> Path:
        """Where a run goes: named by all its settings."""
        names = ("batch_size", "max_length", "finetune_flags", "exclude_modules")
        settings = asdict(run) | {name: getattr(self.arguments, name) for name in names}
        settings["corpus"] = (self.corpus / "train.jsonl").stat().st_size
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return self.output / "runs" / f"{run.method}-{run.ratio:g}-lr{run.rate:g}-steps{run.steps}-{digest}"

    def train(self, run: Run) -> dict | None:
        """Results of a run, which is started, or continued, if it has none; None if it diverged."""
        folder, mode = self.folder(run), "dense" if run.method == "smaller" else run.method
        log, diverged = (folder.parent / f"{folder.name}.{end}" for end in ("log", "diverged"))
        results = folder / "results.json"
        if not (results.exists() or diverged.exists()):
            flags = {
                "task": "feature-extraction", "model_name_or_path": self.source(run.method, run.ratio),
                "teacher": self.teacher, "train_file": self.corpus / "train.jsonl",
                "validation_file": self.corpus / "validation.jsonl", "text_column": "text", "mode": mode,
                "ratio": run.ratio, "mixed_precision": "bf16", "max_length": self.arguments.max_length,
                "per_device_train_batch_size": self.arguments.batch_size, "max_train_steps": run.steps,
                "learning_rate": run.rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "save_steps": 500,
                "save_total_limit": 1, "report_to": "none", "output_dir": folder,
            }  # fmt: skip
            command = [sys.executable, SCRIPTS / "finetune.py", "--resume"]
            command += [part for name, value in flags.items() for part in (f"--{name}", value)]
            if self.arguments.exclude_modules:
                command += ["--exclude_modules", *self.arguments.exclude_modules]
            command += shlex.split(self.arguments.finetune_flags)
            folder.parent.mkdir(parents=True, exist_ok=True)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with log.open("w") as stream:
                status = subprocess.run(
                    list(map(str, command)), stdout=stream, stderr=stream, env=environment
                ).returncode
            if status and "training diverged" in log.read_text():
                diverged.touch()
            elif status:
                raise RuntimeError(f"finetune.py ended with status {status}; {log} says why")
            print(f"{'diverged' if diverged.exists() else 'done'}: {folder.name}", flush=True)
        return None if diverged.exists() else json.loads(results.read_text())

    def train_all(self, runs: list[Run]) -> dict[Run, dict | None]:
        """Several runs, --jobs at a time."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            return dict(zip(runs, pool.map(self.train, runs), strict=True))

    def pick_rates(self) -> list[Run]:
        """The long runs, each with the known learning rate or the one of the best short run on the validation split."""
        args = self.arguments
        pairs = [(method, ratio) for method in args.methods for ratio in args.ratios]
        rates = {pair: [args.known_rates[pair[0]]] if pair[0] in args.known_rates else args.grid for pair in pairs}
        short = [Run(*pair, rate, args.grid_steps) for pair in pairs if len(rates[pair]) > 1 for rate in rates[pair]]
        scores = {run: r["metrics"]["validation"]["cosine"] for run, r in self.train_all(short).items() if r}
        long = []
        for pair in pairs:
            found = {rate: scores.get(Run(*pair, rate, args.grid_steps), -1.0) for rate in rates[pair]}
            if len(found) > 1 and max(found.values()) == -1.0:
                raise RuntimeError(f"{pair} diverged at every rate of --grid {args.grid}; give smaller ones")
            long.append(Run(*pair, max(found, key=found.get), args.steps))
        return long

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.teacher)

    @cached_property
    def texts(self) -> list[str]:
        return [json.loads(line)["text"] for line in (self.corpus / "test.jsonl").read_text().splitlines()]

    @cached_property
    def target(self) -> Tensor:
        return embed(self.load(self.teacher), self.tokenizer, self.texts, self.arguments.max_length)

    def judge(self, model: nn.Module) -> dict[str, float]:
        return score(embed(model, self.tokenizer, self.texts, self.arguments.max_length), self.target)

    def start(self, method: str, ratio: float) -> nn.Module:
        """The student before any training."""
        return start(self.load(self.source(method, ratio)), method, ratio, self.arguments.exclude_modules)

    def evaluate(self, run: Run) -> dict:
        """Sizes, and scores on the test split before and after training; kept beside the run."""
        file = self.folder(run) / "evaluation.json"
        if not file.exists():
            folder = self.folder(run) / "model"
            model, weights = self.load(folder), sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            row = asdict(run) | stored_bytes(model, run.method, self.config, weights) | self.judge(model)
            row |= {f"start_{name}": value for name, value in self.judge(self.start(run.method, run.ratio)).items()}
            file.write_text(json.dumps(row))
        return json.loads(file.read_text())
