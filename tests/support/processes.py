"""run_processes: a script in several gloo processes on this machine, as torchrun would start them."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap

from paths import environment

PREAMBLE = "import os, sys, torch, torch.distributed as dist\ntorch.set_num_threads(1)\n"


def run_processes(folder, script, arguments, processes, check=True):
    """Run ``script`` (source text, which begins with PREAMBLE's names) in ``folder``.

    It must end with ``os._exit(0)``: gloo's threads now and then abort a process that is already done, with any model.

    Returns:
        What each process wrote to stderr.
    """
    file = folder / "script.py"
    file.write_text(PREAMBLE + textwrap.dedent(script))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, str(file), *map(str, arguments)], stderr=subprocess.PIPE, text=True, cwd=folder,
            env=environment(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank),
                            LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                            OMP_NUM_THREADS="1"))
        for rank in range(processes)
    ]  # fmt: skip
    errors = [child.communicate(timeout=180)[1] for child in children]
    if check:
        assert all(child.returncode == 0 for child in children), errors[0] + errors[-1]
    return errors
