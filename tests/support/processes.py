"""run_processes: a script in several gloo processes on this machine, as torchrun would start them."""

from __future__ import annotations

import textwrap

from forks import forks, ranks

# for scripts in a process of their own, with paths.environment; see take_the_way_of_large_models
AS_LARGE = "from processes import take_the_way_of_large_models; take_the_way_of_large_models()\n"
PREAMBLE = "import os, sys, torch, torch.distributed as dist\ntorch.set_num_threads(1)\n"


usual = {}  # what take_the_way_of_large_models replaced


def take_the_way_of_large_models():
    """Let tiny models read views of the shared array, which is what matters; they would make their weights otherwise.

    What is done for small models and short runs has tests of its own (test_layers.py), and runs in the scripts' tests.
    """
    from hf_rps import kernels, mapping

    usual["makes_weight"] = kernels.makes_weight
    mapping.UNFOLD_UP_TO = 0
    kernels.makes_weight = lambda x, layout: False


def run_processes(folder, script, arguments, processes, check=True, large=True):
    """Run ``script`` (source text, which begins with PREAMBLE's names) in ``folder``.

    ``large``: whether its models take the way of large ones.

    Returns:
        What each process wrote.
    """
    file = folder / "script.py"
    file.write_text(PREAMBLE + (AS_LARGE if large else "") + textwrap.dedent(script))
    job = forks().start(file, arguments, folder, ranks(processes))
    statuses, errors = job.statuses(), job.logs
    if check:
        assert not any(statuses), f"exit statuses {statuses}\n{errors[0]}{errors[-1]}"
    return errors
