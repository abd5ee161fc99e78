"""Runs of scripts/finetune.py for tests: each in a process of its own, forked from one that has all imports done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
from forks import Job, ranks
from paths import SCRIPTS, SUPPORT, environment

PYTHON, SCRIPT = sys.executable, str(SCRIPTS / "finetune.py")
ENVIRONMENT = forks.ENVIRONMENT | {"PYTHONPATH": environment()["PYTHONPATH"]}
SIZES = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
DIGITS = {
    "task": "image-classification",
    "dataset_name": "sklearn/digits",
    "model_type": "vit",
    "config_overrides": f"{SIZES},image_size=8,patch_size=4,num_channels=1,intermediate_size=64",
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "logging_steps": 2,
    "report_to": "none",
}

# environments of runs whose model is sharded; those of ZeRO need DeepSpeed
_ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "SHARDED_BY": "zero"}
SHARDS = {"fsdp2": {"SHARDED_BY": "fsdp2"}} | {
    f"zero{stage}": _ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)
}


def flags(arguments: dict) -> list[str]:
    """{"a": 1, "b": True, "c": False} as ["--a", "1", "--b"]."""
    return [
        part
        for name, value in arguments.items()
        for part in ((f"--{name}",) if value is True else () if value is False else (f"--{name}", str(value)))
    ]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def history(folder: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """A fast tokenizer with BERT's special tokens, trained on ``texts``."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts, vocab_size=400, show_progress=False)
    BertTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=64).save_pretrained(folder)


def run(command: list, cwd: Path, expect: int = 0) -> str:
    """Run a command without a network, its caches under ``cwd``; returns stdout."""
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(cwd / "hf_home")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    # gloo's threads now and then abort a process that is already done (plain torch does it too)
    aborted_at_exit = "terminate called without an active exception" in done.stderr
    assert done.returncode == expect or aborted_at_exit, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


class Finetune:
    """Starts runs. ``finetune(folder, arguments)`` runs one to its end and fails if it fails."""

    def __init__(self) -> None:
        self.server = forks.forks()
        self.server.load("finetuning.run")

    def start(self, cwd: Path, arguments: dict | list[str], processes: int = 1, **environment: str) -> Job:
        argv = flags(arguments) if isinstance(arguments, dict) else arguments
        environments = ranks(processes) if processes > 1 else [{}]
        return self.server.start(SUPPORT / "finetune_child.py", argv, cwd, [env | environment for env in environments])

    def __call__(
        self, cwd: Path, arguments: dict | list[str], processes: int = 1, expect: int = 0, **environment: str
    ) -> str:
        """Run to the end; returns what it wrote to stdout and stderr."""
        run = self.start(cwd, arguments, processes, **environment)
        status = run.wait()
        assert status == expect, run.log[-6000:]
        return run.log

    def error(self, cwd: Path, arguments: dict | list[str], processes: int = 1) -> str:
        """The message of the exception in which the run ends."""
        return next(
            line for line in reversed(self(cwd, arguments, processes, expect=1).splitlines()) if "Error" in line
        )
