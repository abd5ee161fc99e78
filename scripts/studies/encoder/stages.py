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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from finetuning.files import COMPRESSED
from hf_rps import RPSConfig, get_rps_model
from hf_rps.targets import find_targets
from studies.corpus import write_corpus
from studies.encoder.arguments import Arguments
from studies.encoder.quantised import dense_student, put_around, quantised, quantised_bytes
from studies.encoder.scores import embed, score
from studies.encoder.students import Student, find_teacher, round_codebooks, smaller_student, start, stored_bytes

SCRIPTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """One run of finetune.py."""

    student: Student
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
        for student in self.arguments.chosen:
            folder = self.source(student)
            if not (folder / "tokenizer_config.json").exists():
                self._make(student).save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)

    def _make(self, student: Student) -> nn.Module:
        """A dense model that finetune.py starts from."""
        teacher = self.load(self.teacher)
        if student.method == "smaller":
            return smaller_student(teacher, student.size, self.config)
        return dense_student(teacher, self.quantised(student), self.config)

    def quantised(self, student: Student) -> nn.Module:
        """A quantised teacher."""
        group = None if student.size is None else int(student.size)
        return quantised(str(self.teacher), student.method, group, self.config)

    def load(self, folder: Path) -> nn.Module:
        return AutoModel.from_pretrained(folder, dtype=torch.float32)

    def source(self, student: Student) -> Path:
        """The model that a run starts from."""
        made = student.method == "smaller" or student.is_quantised
        return self.output / "students" / str(student) if made else self.teacher

    def folder(self, run: Run) -> Path:
        """Where a run goes: named by all its settings."""
        names = ("batch_size", "max_length", "finetune_flags", "exclude_modules")
        settings = asdict(run) | {name: getattr(self.arguments, name) for name in names}
        settings["corpus"] = (self.corpus / "train.jsonl").stat().st_size
        if run.student.is_learned:
            settings["calibration_samples"] = self.arguments.calibration_samples
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return self.output / "runs" / f"{run.student}-lr{run.rate:g}-steps{run.steps}-{digest}"

    def train(self, run: Run) -> dict | None:
        """Results of a run, which is started, or continued, if it has none; None if it diverged."""
        folder, student = self.folder(run), run.student
        if run.steps == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if student.is_learned and not (folder / COMPRESSED / "config.json").exists():
                self.compress(student).save_pretrained(folder / COMPRESSED)
            return {"steps": 0}
        log, diverged = (folder.parent / f"{folder.name}.{end}" for end in ("log", "diverged"))
        results = folder / "results.json"
        if not (results.exists() or diverged.exists()):
            flags = {
                "task": "feature-extraction", "model_name_or_path": self.source(student),
                "teacher": self.teacher, "train_file": self.corpus / "train.jsonl",
                "validation_file": self.corpus / "validation.jsonl", "text_column": "text",
                "mixed_precision": "bf16", "max_length": self.arguments.max_length,
                "per_device_train_batch_size": self.arguments.batch_size, "max_train_steps": run.steps,
                "learning_rate": run.rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "save_steps": 500,
                "save_total_limit": 1, "report_to": "none", "output_dir": folder,
            }  # fmt: skip
            flags |= student.flags
            if student.is_learned:
                flags["calibration_samples"] = self.arguments.calibration_samples
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

    def compress(self, student: Student) -> nn.Module:
        """What a learned map makes of the teacher, calibrated on the first training texts."""
        lines = (self.corpus / "train.jsonl").read_text().splitlines()[: self.arguments.calibration_samples]
        texts, size = [json.loads(line)["text"] for line in lines], self.arguments.batch_size
        batches = [
            dict(self.tokenizer(
                texts[i : i + size], truncation=True, max_length=self.arguments.max_length, padding=True,
                return_tensors="pt",
            )) for i in range(0, len(texts), size)
        ]  # fmt: skip
        config = RPSConfig(
            mapping="codebook", bits=int(student.size), share_embeddings="share_embeddings" in student.flags,
            grad_scaling="norm", exclude_modules=self.arguments.exclude_modules,
        )  # fmt: skip
        return get_rps_model(self.load(self.teacher), config, calibration=batches)

    def train_all(self, runs: list[Run]) -> Iterator[tuple[Run, dict | None]]:
        """Several runs, --jobs at a time, in the order of ``runs``."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            yield from zip(runs, pool.map(self.train, runs), strict=True)

    def pick_rates(self) -> list[Run]:
        """The long runs, each with the known learning rate or the one of the best short run on the validation split."""
        args = self.arguments
        if args.steps == 0:
            return [Run(student, 0.0, 0) for student in args.chosen]
        known = {student: args.known_rate(student) for student in args.chosen}
        rates = {student: args.grid if rate is None else [rate] for student, rate in known.items()}
        short = [Run(student, rate, args.grid_steps) for student in rates if len(rates[student]) > 1
                 for rate in rates[student]]  # fmt: skip
        scores = {run: r["metrics"]["validation"]["cosine"] for run, r in self.train_all(short) if r}
        long = []
        for student, tried in rates.items():
            found = {rate: scores.get(Run(student, rate, args.grid_steps), -1.0) for rate in tried}
            if len(found) > 1 and max(found.values()) == -1.0:
                raise RuntimeError(f"{student} diverged at every rate of --grid {args.grid}; give smaller ones")
            long.append(Run(student, max(found, key=found.get), args.steps))
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

    def trained(self, run: Run) -> tuple[nn.Module, dict[str, int]]:
        """The student after training as it is judged, and the bytes that it takes."""
        student, folder = run.student, self.folder(run) / "model" if run.steps else self.source(run.student)
        if student.is_learned and not run.steps:
            folder = self.folder(run) / COMPRESSED
        model, file = self.load(folder), sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        if not student.is_quantised:
            return round_codebooks(model), stored_bytes(model, student, self.config, file)
        targets = find_targets(model, self.config)
        around, names = self.quantised(student), [target.name for target in targets]
        target = quantised_bytes(around, names)
        n = sum(t.weight.numel() for t in targets)
        sizes = {"weights": n, "target_bytes": target, "file_bytes": file - 4 * n + target}
        return put_around(around, model, self.load(self.source(student)), self.config), sizes

    def start(self, run: Run) -> nn.Module:
        """The student before any training."""
        student, folder = run.student, self.folder(run) / COMPRESSED
        if student.is_quantised:
            return self.quantised(student)
        if student.is_learned:
            return round_codebooks(self.load(folder))
        return start(self.load(self.source(student)), student, self.arguments.exclude_modules)

    def evaluate(self, run: Run) -> dict:
        """Sizes, and scores on the test split before and after training; each kept beside the run."""

        def after() -> dict:
            model, sizes = self.trained(run)
            scores = self.judge(model) if run.steps else {}
            return sizes | {"bits": 8 * sizes["target_bytes"] / sizes["weights"]} | scores

        def before() -> dict:
            return {f"start_{name}": value for name, value in self.judge(self.start(run)).items()}

        folder, student = self.folder(run), run.student
        row = {"student": str(student), "method": student.method, "steps": run.steps}
        row |= {"rate": run.rate} if run.steps else {}
        return row | _kept(folder / "evaluation.json", after) | _kept(folder / "start.json", before)


def _kept(file: Path, compute: Callable[[], dict]) -> dict:
    """What ``file`` holds, which is computed and written if it is not there."""
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())
