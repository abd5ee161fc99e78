"""Runs of scripts/finetune.py for tests: each in a process of its own, forked from one that has all imports done."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from paths import environment

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
    "PYTHONPATH": environment()["PYTHONPATH"],
}  # fmt: skip
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

# reads {"fork": argv, "cwd":, "log":, "environment":} or {"wait": pid}; answers with a pid or an exit status
_SERVER = """
import json, os, sys, traceback
import torch, finetuning.run
torch.set_num_threads(1)

def fsdp2(make):  # accelerate refuses FSDP on a CPU; from prepare() on, all is what a GPU runs
    def make_sharded(arguments):
        from accelerate import PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
        accelerator = make(arguments)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                                state_dict_type="sharded_state_dict", cpu_ram_efficient_loading=False)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        return accelerator
    return make_sharded

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        _, status = os.waitpid(order["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code, sharded = 1, os.environ.get("SHARDED_BY")
    if sharded == "fsdp2":
        finetuning.run.make_accelerator = fsdp2(finetuning.run.make_accelerator)
    elif sharded:
        from accelerate import PartialState
        PartialState(cpu=True)
    try:
        finetuning.run.main(order["fork"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads now and then abort a process that is already done
"""


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


class Run:
    """Runs of finetune.py that go on in the background: one, or one of several processes each."""

    def __init__(self, server: Finetune, pids: list[int], logs: list[Path]):
        self.server, self.pids, self.logs = server, pids, logs

    def signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self) -> int:
        """The first process's exit status; negative for a signal that killed it."""
        statuses = [self.server.ask({"wait": pid}) for pid in self.pids]
        return statuses[0]

    @property
    def log(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


class Finetune:
    """Starts runs. ``finetune(folder, arguments)`` runs one to its end and fails if it fails."""

    def __init__(self, cache: Path):
        environment = os.environ | ENVIRONMENT | {"HF_HOME": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, cwd: Path, arguments: dict | list[str], processes: int = 1, **environment: str) -> Run:
        argv = flags(arguments) if isinstance(arguments, dict) else list(map(str, arguments))
        pids, logs = [], []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(processes):
            launched = environment
            if processes > 1:
                launched = environment | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            logs.append(cwd / f"rank{rank}.log")
            order = {"fork": argv, "cwd": str(cwd), "log": str(logs[-1]), "environment": launched}
            pids.append(self.ask(order))
        return Run(self, pids, logs)

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

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


__all__ = ["DIGITS", "ENVIRONMENT", "SIZES", "Finetune", "Run", "flags", "history", "make_tokenizer", "results"]
