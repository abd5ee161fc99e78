"""scripts/finetune.py in two processes, replicated or sharded, equals one; and torchrun starts it."""

import shutil

import pytest
import torch
from finetune_runs import PYTHON, SCRIPT, SHARDS, flags, history, results, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_rps  # noqa: F401, for from_pretrained

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")

TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# 70 samples do not divide by the batches, nor these by the processes; passes have unequal numbers of labels
UNEVEN = {"max_train_samples": 70, "max_train_steps": 9, "gradient_accumulation_steps": 2, "eval_steps": 4}
UNEVEN |= {"logging_steps": 1, "save_logits": 0, "learning_rate": 1e-3}


@pytest.mark.parametrize("mode", ["rps", "dense"])
@pytest.mark.parametrize("task", ["digits", "mlm", "words", "seq2seq", "lm"])
def test_two_processes_equal_one(base, finetune, tmp_path, task, mode):
    """Two processes with half the batch each: the same losses, metrics and weights as one process."""
    arguments = base[task] | UNEVEN | {"mode": mode, "ratio": 0.2}
    if task == "lm":
        arguments.pop("max_train_samples")
    finetune(tmp_path, arguments | {"per_device_train_batch_size": 8, "output_dir": "one"})
    log = finetune(tmp_path, arguments | {"per_device_train_batch_size": 4, "output_dir": "two"}, processes=2)
    one, two = tmp_path / "one", tmp_path / "two"
    assert [results(folder)["processes"] for folder in (one, two)] == [1, 2]
    for split in ("train", "validation"):
        rows = list(zip(history(one, split), history(two, split), strict=True))
        assert len(rows) == 9 if split == "train" else len(rows) > 1
        for row, other in rows:
            for key in row.keys() - {"split", "samples_per_second", "tokens_per_second"}:
                assert other[key] == pytest.approx(row[key], abs=1e-5, rel=1e-5), key
    assert results(two)["metrics"]["validation"] == pytest.approx(results(one)["metrics"]["validation"], rel=1e-4)
    parameters = results(two)["parameters"]
    assert f"{4 * parameters['stored']:,} bytes of gradients are reduced per step over 2 processes" in log
    assert parameters["stored"] == parameters["dense"] - parameters["n"] + parameters["m"]


@pytest.mark.parametrize("kind", SHARDS)
def test_sharded_training_equals_one_process(base, finetune, tmp_path, kind):
    """FSDP2 and ZeRO: the same losses and the same saved model; also when stopped in the middle and resumed."""
    if kind != "fsdp2":
        pytest.importorskip("deepspeed")
    arguments = base["lm"] | UNEVEN | {"ratio": 0.2, "save_steps": 5}
    arguments.pop("max_train_samples")
    finetune(tmp_path, arguments | {"per_device_train_batch_size": 8, "output_dir": "one"})
    two = arguments | {"per_device_train_batch_size": 4, "output_dir": "two"}
    finetune(tmp_path, two, processes=2, **SHARDS[kind])
    shutil.rmtree(tmp_path / "two" / "model")
    (tmp_path / "two" / "results.json").unlink()
    finetune(tmp_path, two | {"resume": True}, processes=2, **SHARDS[kind])
    for split in ("train", "validation"):
        rows = zip(history(tmp_path / "one", split), history(tmp_path / "two", split), strict=True)
        for row, other in rows:
            assert other["loss"] == pytest.approx(row["loss"], abs=2e-5)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")


def test_torchrun_starts_two_processes(base, tmp_path):
    arguments = base["digits"] | {"max_train_steps": 4, "output_dir": "two"}
    run([*TORCHRUN, SCRIPT, *flags(arguments)], tmp_path)
    assert results(tmp_path / "two")["processes"] == 2
