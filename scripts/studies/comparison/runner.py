"""Runs in worker processes, and the cache that lets the comparison resume, grow and never repeat itself."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from studies import lines
from studies.comparison.tasks import CPYTHON, Data, load_images, load_text
from studies.comparison.training import Run


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where runs run, which their results must not depend on.

    Attributes:
        output_dir: Folder of runs.jsonl.
        fashion_mnist_dir: Folder of Fashion-MNIST's four files.
        workers, threads: Processes (1: this one), and threads of torch in each.
        device: Of torch.
    """

    output_dir: Path
    fashion_mnist_dir: Path
    workers: int
    threads: int
    device: str


def load(run: Run, environment: Environment) -> Data:
    """The data of ``run``, kept for the next one."""
    if run.dataset == CPYTHON:
        return load_text(dict(run.model)["n_positions"], run.train_size)
    return load_images(run.dataset, environment.fashion_mnist_dir, run.train_size)


def _start_worker(threads: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    # a worker whose parent was killed would wait for work for ever
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _execute(run: Run, environment: Environment) -> list[dict]:
    from studies.comparison.methods import execute

    return execute(run, load(run, environment), torch.device(environment.device))


class Runner:
    """Results of runs, from the cache OUTPUT_DIR/runs.jsonl where they are, else by running them.

    A line of the file is {"key", "run", "results"}: settings and, for each compression, a result (methods.execute).
    """

    def __init__(self, environment: Environment):
        self.environment = environment
        self.file = environment.output_dir / "runs.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, list[dict]] = {r["key"]: r["results"] for r in lines.read(self.file)}

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that are not in the cache, each once."""
        return [run for run in dict.fromkeys(runs) if run.key not in self._known]

    def __call__(self, runs: Sequence[Run], what: str = "runs") -> list[list[dict]]:
        """The results of ``runs``, in their order, a list per run. Long runs start first."""
        todo = sorted(self.missing(runs), key=lambda run: -len(run.compressions))
        for run, results in tqdm(self._finished(todo), total=len(todo), desc=what, disable=not todo):
            self._keep(run, results)
        return [self._known[run.key] for run in runs]

    def _finished(self, runs: list[Run]) -> Iterator[tuple[Run, list[dict]]]:
        """Runs and their results as they come."""
        environment = self.environment
        workers = min(environment.workers, len(runs))
        if workers <= 1:
            torch.set_num_threads(environment.threads)
            yield from ((run, _execute(run, environment)) for run in runs)
            return
        # a worker's own threads are set by torch, but those of its BLAS must be known when it starts
        os.environ["OMP_NUM_THREADS"] = str(environment.threads)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker, (environment.threads,)) as pool:
            futures = {pool.submit(_execute, run, environment): run for run in runs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep(self, run: Run, results: list[dict]) -> None:
        self._known[run.key] = results
        lines.add(self.file, {"key": run.key, "run": dataclasses.asdict(run), "results": results})
