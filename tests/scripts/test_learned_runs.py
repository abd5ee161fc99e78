"""scripts/finetune.py with a learned map: a pretrained model, compressed on its training data and taught by itself."""

import json
import shutil

import pytest
import torch
from finetune_runs import SHARDS, history, results
from forks import forks
from resumed_runs import same_run
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, ViTModel

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
from datasets import Dataset

from finetuning.calibration import calibration_batches
from finetuning.tasks import Data, collate_blocks

LEARNED = {"mapping": "codebook", "bits": 3, "teacher": "itself"}
SCRATCH = ("model_type", "config_overrides", "tokenizer_name", "save_logits")


@pytest.fixture(scope="module")
def folder(base, finetune, tmp_path_factory):
    """Small models that are trained a little, "lm" and "digits", and what each becomes taught by itself."""
    folder = tmp_path_factory.mktemp("learned")
    for task in ("lm", "digits"):
        finetune(folder, base[task] | {"mode": "dense", "num_train_epochs": 1, "output_dir": task})
        finetune(folder, pretrained(base, task) | {"num_train_epochs": 2, "output_dir": f"{task}-taught"})
    return folder


def pretrained(base, task):
    arguments = {name: value for name, value in base[task].items() if name not in SCRATCH}
    return arguments | LEARNED | {"model_name_or_path": f"{task}/model", "learning_rate": 1e-3}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("task", ["lm", "digits"])
def test_a_model_taught_by_itself(folder, task):
    """It comes nearer to the teacher than it began, and its codes stay; a new process loads it bit-equal."""
    name = f"{task}-taught"
    losses = [row["loss"] for row in history(folder / name, "train")]
    assert losses[-1] < 0.9 * losses[0]
    written = results(folder / name)
    assert written["arguments"]["DistillationArguments"]["teacher"] == f"{task}/model"
    assert written["arguments"]["DistillationArguments"]["distill_alpha"] == 1
    before, after = weights(folder / name / "compressed"), weights(folder / name / "model")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(".codes_" in key for key in changed)
    assert any(".psi_" in key for key in changed)
    code = (
        "import sys, hf_rps, transformers as t\n"
        "config = t.AutoConfig.from_pretrained(sys.argv[1])\n"
        "model = getattr(t, config.architectures[0]).from_pretrained(sys.argv[1])\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    done = forks().run_code(code, [folder / name / "model", folder / f"{name}-again"], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    again = weights(folder / f"{name}-again")
    assert again.keys() == after.keys()
    assert all(torch.equal(again[key], after[key]) for key in after)


def test_a_resumed_run_does_not_learn_again(base, finetune, folder):
    arguments = pretrained(base, "digits") | {"max_train_steps": 8, "save_steps": 4, "output_dir": "whole"}
    assert "learning codebooks" in finetune(folder, arguments)
    shutil.copytree(folder / "whole", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoint-8")
    shutil.rmtree(folder / "stopped" / "model")
    resumed = arguments | {"resume": True, "output_dir": "stopped"}
    assert "learning codebooks" not in finetune(folder, resumed)
    same_run(folder / "whole", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "compressed")
    assert "put it back, or start anew" in finetune.error(folder, resumed)


def test_two_processes_have_the_map_of_one(base, finetune, folder):
    arguments = pretrained(base, "digits") | {"max_train_steps": 6, "logging_steps": 1, "distill_alpha": 0.5}
    finetune(folder, arguments | {"per_device_train_batch_size": 8, "output_dir": "one"})
    run = finetune.start(folder, arguments | {"per_device_train_batch_size": 4, "output_dir": "two"}, processes=2)
    assert run.wait() == 0, run.log[-3000:]
    assert ["learning codebooks" in log for log in run.logs] == [True, False]
    one, two = weights(folder / "one" / "model"), weights(folder / "two" / "model")
    assert one.keys() == two.keys()  # which have the digest of the codes
    losses = [[row["loss"] for row in history(folder / name, "train")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", SHARDS)
def test_sharded_training_equals_one_process(base, finetune, folder, kind):
    """FSDP2 and ZeRO: the losses of one process, the same codes, and codebooks as near; also resumed in the middle."""
    if kind != "fsdp2":
        pytest.importorskip("deepspeed")
    arguments = pretrained(base, "lm") | {"max_train_steps": 6, "save_steps": 3, "logging_steps": 1}
    finetune(folder, arguments | {"per_device_train_batch_size": 8, "output_dir": f"{kind}-one"})
    sharded = arguments | {"per_device_train_batch_size": 4, "output_dir": kind}
    finetune(folder, sharded, processes=2, **SHARDS[kind])
    shutil.rmtree(folder / kind / "checkpoint-6")
    shutil.rmtree(folder / kind / "model")
    (folder / kind / "results.json").unlink()
    finetune(folder, sharded | {"resume": True}, processes=2, **SHARDS[kind])
    losses = [[row["loss"] for row in history(folder / name, "train")] for name in (f"{kind}-one", kind)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    one, other = weights(folder / f"{kind}-one" / "model"), weights(folder / kind / "model")
    assert one.keys() == other.keys()  # which have the digest of the codes
    assert all(one[key].equal(other[key]) for key in one if ".codes_" in key)
    torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3)


def test_the_weights_alone_give_another_map(base, finetune, folder):
    finetune(folder, pretrained(base, "lm") | {"calibration_samples": 0, "max_train_steps": 1, "output_dir": "plain"})
    configs = (
        json.loads((folder / name / "compressed" / "config.json").read_text()) for name in ("plain", "lm-taught")
    )
    plain, calibrated = (config["quantization_config"] for config in configs)
    assert plain["learned"] != calibrated["learned"]
    assert plain["bits"] == calibrated["bits"] == 3


def test_what_is_around_frozen_weights_learns(base, finetune, folder):
    arguments = {name: value for name, value in base["lm"].items() if name not in SCRATCH}
    arguments |= {"model_name_or_path": "lm/model", "max_train_steps": 3, "mode": "frozen"}
    finetune(folder, arguments | {"output_dir": "around"})
    before, after = weights(folder / "lm" / "model"), weights(folder / "around" / "model")
    same = {name for name in before if torch.equal(before[name], after[name])}
    shared = {key for key in weights(folder / "lm-taught" / "model") if ".codes_" in key}
    assert len(shared) == len(same)
    assert {name.removesuffix(".weight") for name in same} == {key.partition(".codes_")[0] for key in shared}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": "digits-taught/model"}, "compressed already, so that it has nothing to teach itself"),
        ({"teacher": "headless"}, "no weights for ['classifier.bias', 'classifier.weight'], which would be random"),
    ],
)
def test_refuses_teachers_that_know_nothing(base, finetune, folder, change, message):
    ViTModel.from_pretrained(folder / "digits" / "model").save_pretrained(folder / "headless")
    assert message in finetune.error(folder, pretrained(base, "digits") | change | {"output_dir": "refused"})
    assert not (folder / "refused").exists()


def test_calibration_batches():
    """As many rows as are wanted, or enough tokens; by the seed; without augmentation, and of a stream as well."""
    rows = Dataset.from_dict({"input_ids": [[i] * 100 for i in range(200)]})

    def augment(row, seed):
        raise AssertionError("a row was augmented")

    data = Data({"train": rows}, ByT5Tokenizer(extra_ids=0), collate_blocks, augment)
    chosen = [batch["input_ids"][:, 0].tolist() for batch in calibration_batches(data, 20, seed=0)]
    assert [len(numbers) for numbers in chosen] == [8, 8, 4]
    assert chosen == [batch["input_ids"][:, 0].tolist() for batch in calibration_batches(data, 20, seed=0)]
    assert chosen != [batch["input_ids"][:, 0].tolist() for batch in calibration_batches(data, 20, seed=1)]
    assert sum(batch["input_ids"].numel() for batch in calibration_batches(data, None, seed=0)) == 8800  # 11 times 8
    assert sum(len(batch["input_ids"]) for batch in calibration_batches(data, 1000, seed=0)) == 200
    assert calibration_batches(data, 0, seed=0) == []
    data.splits["train"] = rows.to_iterable_dataset()
    assert [b["input_ids"][:, 0].tolist() for b in calibration_batches(data, 10, seed=0)] == [[*range(8)], [8, 9]]
