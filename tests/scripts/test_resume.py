"""A run that is killed or stopped goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from finetune_runs import DIGITS, results
from resumed_runs import alive, check_checkpoints, newest, same_run

pytest.importorskip("datasets")

# dropout and shuffling use the random number generators; accumulation and logs have state between steps
RUN = DIGITS | {
    "config_overrides": DIGITS["config_overrides"] + ",hidden_dropout_prob=0.1",
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 8,
    "max_train_samples": 200,
    "logging_steps": 4,
    "lr_scheduler_type": "cosine",
    "save_steps": 3,
    "load_best_model_at_end": True,
    "ratio": 0.2,
}
STEPS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def uninterrupted(finetune, folder):
    finetune(folder, RUN | {"max_train_steps": STEPS, "output_dir": "whole"})
    return folder / "whole"


def test_20_kills_leave_no_trace(finetune, folder, uninterrupted):
    arguments = RUN | {"max_train_steps": STEPS, "output_dir": "killed", "save_steps": 2, "resume": True}
    killed, moments = folder / "killed", random.Random(0)
    steps = []
    for _ in range(20):
        before = newest(killed)
        run = finetune.start(folder, arguments)
        while newest(killed) == before and os.path.exists(f"/proc/{run.pids[0]}/stat") and alive(run.pids[0]):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.06))
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.log[-3000:]
        assert check_checkpoints(killed)
        steps.append(newest(killed))
    assert steps == sorted(steps)
    assert 20 < steps[-1] < STEPS
    finetune(folder, arguments)
    same_run(uninterrupted, killed)
    assert not list(killed.rglob("*.tmp"))
    assert not list(killed.rglob("*.old"))


def test_a_row_written_after_its_checkpoint_is_not_there_twice(finetune, folder):
    """The end of an epoch of 13 steps: the checkpoint of step 39 is saved, then the validation row is written."""
    arguments = RUN | {"max_train_steps": 40, "output_dir": "rows", "save_total_limit": 50}
    finetune(folder, arguments)
    expected = (folder / "rows" / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "rows" / "checkpoint-40", ignore_errors=True)
    assert newest(folder / "rows") == 39
    finetune(folder, arguments | {"resume": True})
    steps = [json.loads(line)["step"] for line in (folder / "rows" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in expected.splitlines()]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_and_the_run_goes_on(finetune, folder, uninterrupted, number, status):
    name = f"signal{number}"
    arguments = RUN | {"max_train_steps": STEPS, "output_dir": name, "save_steps": 1000, "resume": True}
    run = finetune.start(folder, arguments)
    while not (folder / name / "metrics.jsonl").exists():
        time.sleep(0.01)
    run.signal(number)
    assert run.wait() == status, run.log[-3000:]
    assert "saving a checkpoint after this step" in run.log
    assert "the same command with --resume goes on from there" in run.log
    assert check_checkpoints(folder / name)
    assert not (folder / name / "results.json").exists()
    finetune(folder, arguments)
    same_run(uninterrupted, folder / name)


def test_resuming_refuses_another_run(finetune, folder, uninterrupted):
    arguments = RUN | {"max_train_steps": STEPS, "output_dir": "whole", "resume": True}
    for change, message in (
        ({"ratio": 0.3}, "is of another run: ratio=0.3 (it was 0.2)"),
        ({"seed": 1}, "seed=1 (it was 0)"),
        ({"max_train_samples": 100}, "max_train_samples=100 (it was 200)"),
        ({"config_overrides": DIGITS["config_overrides"]}, "config_overrides={"),
    ):
        assert message in finetune.error(folder, arguments | change)
    assert results(uninterrupted)["steps"] == STEPS  # nothing was touched
    assert "exists and is not empty; continue it with --resume" in finetune.error(folder, arguments | {"resume": False})
