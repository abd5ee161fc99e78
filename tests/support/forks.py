"""Processes for tests without the seconds that importing torch and transformers takes: forked from one that has.

:func:`forks` is the server of this pytest worker, started by the first test that needs it. What is forked has its own
arguments, folder, environment and output, and runs a script as Python would; but settings that a library reads when it
is imported are those of the server. A test of imports themselves, or of a launcher, starts an interpreter of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from paths import SUPPORT, environment

IMPORTS = (
    "torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "transformers",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.trainer",
    "peft", "accelerate", "hf_rps",
)  # fmt: skip
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
ONE_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's allocator starts one on import
PATIENCE = 300  # seconds that a process may take once it is waited for; then it is killed


class Job:
    """Processes that go on in the background, each with files for what it writes to stdout and stderr."""

    def __init__(self, server: Forks, pids: list[int], outputs: list[tuple[Path, Path]]):
        self.server, self.pids, self.outputs = server, pids, outputs

    def signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def statuses(self) -> list[int]:
        """Waits, and returns the exit statuses; negative for a signal that ended the process."""
        return [self.server.ask("wait", pid=pid, seconds=PATIENCE) for pid in self.pids]

    def wait(self) -> int:
        """The first process's exit status."""
        return self.statuses()[0]

    @property
    def logs(self) -> list[str]:
        """What each process wrote, to stderr last."""
        return ["\n".join(file.read_text() for file in files) for files in self.outputs]

    @property
    def log(self) -> str:
        return "\n".join(self.logs)


class Forks:
    """A process that has ``imports`` done under ``variables``, and forks others; it ends with this one."""

    def __init__(self, variables: dict[str, str], imports: Iterable[str] = IMPORTS):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it ends with this object)
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "fork_server.py"), *imports],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=variables | ONE_THREAD,
        )  # fmt: skip

    def ask(self, order: str, **arguments) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([order, arguments]) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise RuntimeError(f"the server of forks ended: {self.errors.read()[-6000:]}")
        return int(answer)

    def load(self, *modules: str) -> None:
        """Have what is forked from now on find ``modules`` imported."""
        self.ask("load", modules=modules)

    def start(
        self, script: Path, arguments: Iterable, folder: Path, environments: Iterable[dict[str, str]] = ({},)
    ) -> Job:
        """``python script *arguments`` in ``folder``, one process per environment."""
        pids, outputs = [], []
        for i, changes in enumerate(environments):
            outputs.append((folder / f"process{i}.out", folder / f"process{i}.err"))
            out, err = map(str, outputs[-1])
            pids.append(self.ask("fork", script=str(script), arguments=list(map(str, arguments)), folder=str(folder),
                                 environment=changes, out=out, err=err))  # fmt: skip
        return Job(self, pids, outputs)

    def run(self, script: Path, arguments: Iterable, folder: Path) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([python, script, *arguments], cwd=folder, capture_output=True, text=True)``."""
        job = self.start(script, arguments, folder)
        status, ((out, err),) = job.wait(), job.outputs
        return subprocess.CompletedProcess([script, *arguments], status, out.read_text(), err.read_text())

    def run_code(self, code: str, arguments: Iterable, folder: Path) -> subprocess.CompletedProcess[str]:
        """As :meth:`run`, of source text."""
        script = folder / "script.py"
        script.write_text(code)
        return self.run(script, arguments, folder)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@functools.cache
def forks() -> Forks:
    """The server of this pytest worker: no network, one thread, accelerate on the CPU, a cache of its own."""
    variables = environment(**ENVIRONMENT)
    variables.pop("HF_HOME", None)
    return Forks(variables)


def close() -> None:
    """End :func:`forks`, if a test has started it."""
    if forks.cache_info().currsize:
        forks().close()


def ranks(processes: int) -> list[dict[str, str]]:
    """The environments in which torchrun starts the processes of a job on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
         "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(processes)
    ]  # fmt: skip
