"""The program behind forks.py: import once what most tests' processes need, then fork a process for each order.

It is started with the names of modules to import. Orders are lines of JSON on stdin, and each is answered by a number.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback


def load(modules: list[str]) -> int:
    """Import modules by name, for all processes that are forked from now on."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        for name in modules:
            importlib.import_module(name)
    return len(modules)


def fork(script: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> int:
    """Start ``script`` in ``folder``, as ``python script *arguments >out 2>err`` would; returns its pid."""
    threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc") else threading.active_count()
    if threads != 1:  # a fork keeps the locks of threads that it does not have
        raise RuntimeError(f"an import started threads: there are {threads} before the fork")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for descriptor, file, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            os.dup2(os.open(file, mode if mode == os.O_RDONLY else mode | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads now and then abort a process that is already done


def wait(pid: int, seconds: float) -> int:
    """The exit status of a process, negative for a signal that ended it; one that takes too long is killed."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def main() -> None:
    with contextlib.ExitStack() as stack:
        if "HF_HOME" not in os.environ:
            os.environ["HF_HOME"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_home"))
        load(sys.argv[1:])
        sys.modules["torch"].set_num_threads(1)
        orders = {"load": load, "fork": fork, "wait": wait}
        for line in sys.stdin:
            name, arguments = json.loads(line)
            print(orders[name](**arguments), flush=True)


if __name__ == "__main__":
    main()
