"""A run that is killed, stopped or launched anew goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from pydoc_data.topics import topics

import pytest
import torch
from finetune_runs import DIGITS, history, make_tokenizer, results
from safetensors.torch import load_file

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


def same_run(one, other):
    """Equal to the last bit: weights, metrics and history, but for how long things took."""
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert results(one)["metrics"] == results(other)["metrics"]
    for split in ("train", "validation"):
        for row, expected in zip(history(other, split), history(one, split), strict=True):
            timing = dict.fromkeys(row.keys() & {"samples_per_second", "tokens_per_second"})
            assert row | timing == expected | timing


def check_checkpoints(folder):
    """Everything that is named a checkpoint can be read to the end."""
    found = [path for path in folder.glob("checkpoint-*") if path.suffix not in (".tmp", ".old")]
    for path in found:
        assert len(load_file(path / "model.safetensors")) > 10
        for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
            torch.load(path / name, weights_only=False)
        assert (path / "run.json").read_text().endswith("}\n")
    return found


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


def newest(folder):
    """The step of the newest whole checkpoint, 0 if there is none."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def alive(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


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


def stop_and_resume(finetune, folder, arguments, first, then):
    """Stop a run of ``first`` processes by SIGTERM once it has logged, and resume it with ``then`` processes."""
    name = arguments["output_dir"]
    batch = arguments["per_device_train_batch_size"]
    run = finetune.start(folder, arguments | {"per_device_train_batch_size": batch // first}, first)
    while not (folder / name / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(run.pids[-1], signal.SIGTERM)  # one process gets it, all stop
    assert run.wait() == 143, run.log[-3000:]
    stopped = newest(folder / name)
    arguments = arguments | {"per_device_train_batch_size": batch // then, "resume": True}
    return stopped, finetune(folder, arguments, then)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 2)])
def test_goes_on_with_another_number_of_processes(finetune, folder, first, then):
    """The same losses as in a run that was never stopped, so no sample was skipped or seen twice."""
    arguments = DIGITS | {"max_train_samples": 200, "max_train_steps": 60, "logging_steps": 1, "save_total_limit": 1}
    if not (folder / "steady").exists():
        finetune(folder, arguments | {"output_dir": "steady"})
    name = f"from{first}to{then}"
    stopped, log = stop_and_resume(finetune, folder, arguments | {"output_dir": name}, first, then)
    assert 0 < stopped < 60
    assert (f"saved by {first} processes and there are {then}" in log) == (first != then)
    expected, found = (history(folder / run, "train") for run in ("steady", name))
    assert [row["step"] for row in found] == list(range(1, 61))
    for row, other in zip(expected, found, strict=True):
        assert (other["epoch"], other["learning_rate"]) == (row["epoch"], row["learning_rate"])
        assert other["loss"] == pytest.approx(row["loss"], abs=2e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_masks_and_streams_go_on_where_they_were(finetune, folder, streaming):
    lines = [" ".join(line.split()[:12]) for text in topics.values() for line in text.splitlines() if len(line) > 40]
    (folder / "lines.txt").write_text("\n".join(lines[:300]))
    if not (folder / "tokenizer").exists():
        make_tokenizer(folder / "tokenizer", lines[:300])
    arguments = {
        "task": "masked-lm", "train_file": "lines.txt", "tokenizer_name": "tokenizer", "model_type": "bert",
        "config_overrides": "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64",
        "max_train_steps": 60, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "ratio": 0.3,
        "max_eval_samples": 20, "learning_rate": 1e-3,
    } | ({"streaming": True, "shuffle_buffer_size": 50} if streaming else {})  # fmt: skip
    kind = "stream" if streaming else "memory"
    finetune(folder, arguments | {"output_dir": f"{kind}-whole"})
    stopped, _ = stop_and_resume(finetune, folder, arguments | {"output_dir": f"{kind}-stopped"}, 1, 1)
    assert 0 < stopped < 60
    same_run(folder / f"{kind}-whole", folder / f"{kind}-stopped")


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


def test_a_finished_run_can_be_resumed_and_prolonged(finetune, folder):
    arguments = DIGITS | {"max_train_steps": 6, "save_steps": 3, "resume": True, "output_dir": "prolonged"}
    log = finetune(folder, arguments)
    assert "there is no checkpoint to resume from, so the run starts at its beginning" in log
    first = results(folder / "prolonged")
    finetune(folder, arguments)
    assert results(folder / "prolonged")["metrics"] == first["metrics"]
    log = finetune(folder, arguments | {"max_train_steps": 9})
    assert "resuming with max_train_steps=9, which was 6" in log
    assert [row["step"] for row in history(folder / "prolonged", "train")] == [2, 4, 6, 8, 9]
