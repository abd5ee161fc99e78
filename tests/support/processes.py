"""run_processes: a script in several gloo processes on this machine, as torchrun would start them."""

from __future__ import annotations

import textwrap

from forks import forks, ranks

PREAMBLE = "import os, sys, torch, torch.distributed as dist\ntorch.set_num_threads(1)\n"


def run_processes(folder, script, arguments, processes, check=True):
    """Run ``script`` (source text, which begins with PREAMBLE's names) in ``folder``.

    Returns:
        What each process wrote.
    """
    file = folder / "script.py"
    file.write_text(PREAMBLE + textwrap.dedent(script))
    job = forks().start(file, arguments, folder, ranks(processes))
    statuses, errors = job.statuses(), job.logs
    if check:
        assert not any(statuses), f"exit statuses {statuses}\n{errors[0]}{errors[-1]}"
    return errors
