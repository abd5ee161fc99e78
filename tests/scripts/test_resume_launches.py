"""A run goes on with other processes, over masks and streams, and over its end, as if it had never stopped."""

import os
import signal
import time
from pydoc_data.topics import topics

import pytest
from finetune_runs import DIGITS, history, make_tokenizer, results
from resumed_runs import newest, same_run

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


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
