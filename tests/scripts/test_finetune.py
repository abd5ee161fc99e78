"""scripts/finetune.py as users run it: in processes of their own, on tiny real data, without a network."""

import csv
import json
import keyword
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from finetune_runs import DIGITS, ENVIRONMENT, SIZES, flags, history, make_tokenizer, results
from forks import forks
from paths import SCRIPTS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
import _arguments  # noqa: E402
import _data  # noqa: E402
import _tasks  # noqa: E402

PYTHON, SCRIPT = sys.executable, str(SCRIPTS / "finetune.py")
LAUNCH = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# loads every saved model anew, recomputes the saved logits from the raw data, and prints the largest differences
RELOAD = """
import csv, json, sys, torch, transformers as t, hf_rps
from pathlib import Path
from safetensors.torch import load_file
from _data import load_digits

def inputs(task, folder, test, count):
    if task == "image-classification":
        images = load_digits()["test"]["image"][:count]
        return t.AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    if task == "text-classification":
        texts = [row["text"] for row in csv.DictReader(open(test))][:count]
        return tokenizer(texts, return_tensors="pt", padding=True)
    ids = tokenizer(Path(test).read_text(), add_special_tokens=False)["input_ids"]
    return {"input_ids": torch.tensor(ids[: count * 64]).view(count, 64)}

AUTO = {"image-classification": t.AutoModelForImageClassification, "causal-lm": t.AutoModelForCausalLM,
        "text-classification": t.AutoModelForSequenceClassification}
differences = {}
for folder in map(Path, sys.argv[1:]):
    run = json.loads((folder / "results.json").read_text())
    saved = load_file(folder / "logits.safetensors")["logits"]
    model = AUTO[run["task"]].from_pretrained(folder / "model")
    assert hf_rps.size_report(model).n == run["parameters"]["n"]
    test = run["arguments"]["DataArguments"]["test_file"]
    with torch.no_grad():
        logits = model(**inputs(run["task"], folder / "model", test, len(saved))).logits
    assert saved.std() > 0
    differences[folder.name] = (logits - saved).abs().max().item()
print(json.dumps(differences))
"""


def run(command: list, cwd: Path, expect: int = 0) -> str:
    """Run a command without a network, its caches under ``cwd``; returns stdout."""
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(cwd / "hf_home")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    # gloo's threads now and then abort a process that is already done (plain torch does it too)
    aborted_at_exit = "terminate called without an active exception" in done.stderr
    assert done.returncode == expect or aborted_at_exit, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def reload(folder: Path, names: list[str]) -> dict[str, float]:
    """The largest differences that RELOAD finds in the runs ``names`` of ``folder``."""
    done = forks().run_code(RELOAD, names, folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, dict]:
    """Common arguments of each task; writes the data files: documentation topics of Python, and which topic it is."""
    folder = tmp_path_factory.mktemp("data")
    words = [(name, text.split()) for name, text in sorted(pydoc_data.topics.topics.items())[:40]]
    rows = [(" ".join(text[i : i + 8]), "early" if name < "c" else "late") for name, text in words for i in (0, 8, 16)]
    for split, part in (("train", rows[:80]), ("validation", rows[20:40]), ("test", rows[40:60])):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        with open(folder / f"{split}.jsonl", "w") as file:
            for text, _ in part:
                found = re.findall(r"\w+", text) or ["none"]
                tags = ["B-KEYWORD" if keyword.iskeyword(word) else "O" for word in found]
                file.write(json.dumps({"tokens": found, "tags": tags, "source": text, "target": found[0]}) + "\n")
    text = pydoc_data.topics.topics["if"] + pydoc_data.topics.topics["while"]
    (folder / "train.txt").write_text(text)
    (folder / "test.txt").write_text(pydoc_data.topics.topics["for"])
    make_tokenizer(folder / "tokenizer", [text for text, _ in rows])
    common = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "logging_steps": 2, "report_to": "none"}
    bert = {"model_type": "bert", "config_overrides": f"{SIZES},intermediate_size=64,hidden_dropout_prob=0.0,"
            "attention_probs_dropout_prob=0.0"}  # fmt: skip
    files = {f"{split}_file": folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {
        "digits": DIGITS | {"save_logits": 40},
        "text": common | bert | {
            "task": "text-classification",
            "train_file": folder / "train.csv",
            "validation_file": folder / "validation.csv",
            "test_file": folder / "test.csv",
            "tokenizer_name": "bytes",
            "save_logits": 8,
        },
        "lm": common | {
            "task": "causal-lm",
            "train_file": folder / "train.txt",
            "test_file": folder / "test.txt",
            "block_size": 64,
            "model_type": "gpt2",
            "config_overrides": f"{SIZES},resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
            "tokenizer_name": "bytes",
            "save_logits": 3,
        },
        "mlm": common | bert | {
            "task": "masked-lm", "tokenizer_name": folder / "tokenizer", "max_length": 24,
            "train_file": folder / "train.csv", "text_column": "text", "validation_file": folder / "test.csv",
        },
        "words": common | bert | files | {"task": "token-classification", "tokenizer_name": folder / "tokenizer"},
        "seq2seq": common | files | {
            "task": "seq2seq", "tokenizer_name": "bytes", "model_type": "t5", "source_prefix": "first: ",
            "config_overrides": "d_model=32,d_ff=64,d_kv=16,num_layers=2,num_heads=2,dropout_rate=0.0",
            "max_target_length": 16,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(base, finetune, tmp_path_factory) -> Path:
    """The folder of one run a task and mode."""
    folder = tmp_path_factory.mktemp("runs")
    digits, text, lm = base["digits"], base["text"], base["lm"]

    config = digits | {"num_train_epochs": 1, "eval_steps": 30, "ratio": 0.2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"learning_rate": "3e-3"}))
    run([*LAUNCH, SCRIPT, "config.yaml", "--output_dir", "digits-rps"], folder)
    tensorboard = {"report_to": "tensorboard", "gradient_accumulation_steps": 2}
    finetune(folder, text | {"output_dir": "text-rps"} | tensorboard)
    finetune(folder, lm | {"output_dir": "lm-rps", "gradient_checkpointing": True, "optimizer": "sgd"})

    dense = {"mode": "dense", "max_train_steps": 6}
    llama = {"model_type": "llama", "config_overrides": f"{SIZES},intermediate_size=64"}
    finetune(folder, digits | dense | {"output_dir": "digits-dense"})
    finetune(folder, text | dense | {"output_dir": "text-dense"})
    finetune(folder, lm | dense | llama | {"output_dir": "lm-dense"})
    return folder


RUNS = [f"{task}-{mode}" for task in ("digits", "text", "lm") for mode in ("rps", "dense")]


@pytest.mark.parametrize("name", RUNS)
def test_results(runs, name):
    folder, (task, mode) = runs / name, name.split("-")
    written = results(folder)
    metric = "perplexity" if task == "lm" else "accuracy"
    assert written["mode"] == mode
    for split in ("validation", "test"):
        assert written["metrics"][split][metric] >= 0
        assert written["metrics"][split]["loss"] < 6.5
    weights = folder / "model" / "model.safetensors"
    assert written["bytes_on_disk"] == weights.stat().st_size >= 4 * written["parameters"]["stored"]
    assert written["train_seconds"] > 0
    assert written["command"].startswith("finetune.py ")
    parameters = written["parameters"]
    if mode == "rps":
        ratio = written["arguments"]["RPSArguments"]["ratio"]
        assert parameters["m"] == pytest.approx(ratio * parameters["n"], rel=0.01)
        assert parameters["dense"] - parameters["stored"] == parameters["n"] - parameters["m"] > 0
        saved = json.loads((folder / "model" / "config.json").read_text())["quantization_config"]
        assert saved["grad_scaling"] == ("projection" if task == "lm" else "norm")  # which lm trains with SGD
    else:
        assert parameters["stored"] == parameters["dense"]
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("*.old"))


def test_reloaded_models_compute_the_same_logits(runs):
    differences = reload(runs, RUNS)
    assert list(differences) == RUNS
    assert max(differences.values()) < 1e-5, differences


def test_history(runs):
    validation = history(runs / "digits-rps", "validation")
    assert [row["step"] for row in validation] == [30, 60, 75]  # eval_steps=30, and the end of the epoch
    assert validation[-1]["epoch"] == 1
    assert validation[-1]["loss"] < validation[0]["loss"]
    train = history(runs / "digits-rps", "train")
    assert train[0]["learning_rate"] > train[-1]["learning_rate"] > 0
    assert all(row["samples_per_second"] > 0 for row in train)
    assert all(row["tokens_per_second"] > 0 for row in history(runs / "lm-rps", "train"))
    assert len(history(runs / "text-rps", "validation")) == 3  # epochs
    assert results(runs / "text-rps")["steps"] == 9  # 80 rows, batches of 16, accumulated by two
    assert list((runs / "text-rps").rglob("events.out.tfevents*"))


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
    assert f"{4 * parameters['stored']:,} bytes of gradients are reduced a step over 2 processes" in log
    assert parameters["stored"] == parameters["dense"] - parameters["n"] + parameters["m"]


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "SHARDED_BY": "zero"}
SHARDS = {"fsdp2": {"SHARDED_BY": "fsdp2"}} | {
    f"zero{stage}": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)
}


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


def test_stops_at_a_loss_that_is_not_finite(base, finetune, tmp_path):
    diverging = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 0, "output_dir": "diverged"}
    error = finetune.error(tmp_path, base["digits"] | diverging | {"logging_steps": 50, "save_steps": 2})
    assert error.startswith("FloatingPointError: the training loss is nan at step 2 of 225")
    assert "no model was saved" in error
    assert [path.name for path in (tmp_path / "diverged").iterdir()] == ["metrics.jsonl"] or not list(
        (tmp_path / "diverged").iterdir()
    )


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("digits", {"config_overrides": "num_chanels=1"}, "config_overrides names ['num_chanels'], which 'vit' does"),
        ("digits", {"config_overrides": "hidden_size=big"}, "expected int, got str (value: 'big')"),
        ("lm", {"config_overrides": "vocab_size=100"}, "'bytes' has 259 tokens, but the model's vocab_size is 100"),
        ("words", {"tokenizer_name": "bytes"}, "token-classification needs a fast tokenizer"),
    ],
)
def test_refuses_configurations(base, finetune, tmp_path, task, change, message):
    assert message in finetune.error(tmp_path, base[task] | change | {"output_dir": "refused"})
    assert not (tmp_path / "refused").exists()


def test_starts_from_checkpoints(runs, base, finetune):
    names = ("model_type", "tokenizer_name", "config_overrides")
    pretrained = {k: v for k, v in base["text"].items() if k not in names}
    pretrained |= {"ratio": 0.5, "max_train_steps": 2, "mixed_precision": "bf16"}
    continued = pretrained | {"model_name_or_path": "text-rps/model"}
    error = finetune.error(runs, continued | {"mode": "dense", "output_dir": "refused"})
    assert "is compressed and --mode is dense; give --mode rps" in error
    assert not (runs / "refused").exists()
    finetune(runs, continued | {"output_dir": "continued"})
    finetune(runs, pretrained | {"model_name_or_path": "text-dense/model", "output_dir": "projected"})
    finetune(runs, pretrained | {"model_name_or_path": "text-dense/model", "mode": "magnitude", "output_dir": "pruned"})
    compressed, again, projected, pruned = (
        results(runs / name)["parameters"] for name in ("text-rps", "continued", "projected", "pruned")
    )
    assert again["m"] == compressed["m"]  # its own ratio, not the one given
    assert projected["m"] == pytest.approx(0.5 * projected["n"], rel=0.01)
    assert pruned["stored"] == pruned["dense"]


def plugin(**fields):
    return SimpleNamespace(zero_stage=3, zero3_init_flag=True, deepspeed_config={"zero_optimization": {}}, **fields)


@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [
        ("MEGATRON_LM", "rps", "MEGATRON_LM, which this script can't use: Megatron-LM splits and rebuilds the layers"),
        ("FSDP", "rps", "FSDP1 flattens the parameters of each block, .* set fsdp_version: 2"),
        ("DEEPSPEED", "rps", "split the dense weights before they are compressed; set zero3_init_flag: false"),
        ("DEEPSPEED", "magnitude", "masks are not sharded"),
    ],
)
def test_refuses_what_can_not_work(base, monkeypatch, tmp_path, kind, mode, message):
    import finetune as script
    from accelerate.utils import DistributedType

    fake = SimpleNamespace(
        distributed_type=DistributedType[kind], is_fsdp2=False, state=SimpleNamespace(deepspeed_plugin=plugin())
    )
    monkeypatch.setattr(script, "Accelerator", lambda **options: fake)
    arguments = _arguments.parse_arguments(flags(GOOD | {"output_dir": str(tmp_path / "new"), "ratio": 0.5}))
    arguments.rps.mode = mode
    with pytest.raises(ValueError, match=message):
        script.make_accelerator(arguments)


@pytest.mark.parametrize("file", sorted((SCRIPTS / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_example_configurations_are_valid(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = _arguments.parse_arguments([str(file), "--output_dir", "new"])
    assert read.train.output_dir == "new"
    assert file.read_text().startswith("# ")


# ---- the other tasks, streams, stopping early


def test_masked_language_modelling(base, finetune, tmp_path):
    finetune(
        tmp_path, base["mlm"] | {"output_dir": "mlm", "num_train_epochs": 20, "ratio": 0.5, "mlm_probability": 0.3}
    )
    validation = history(tmp_path / "mlm", "validation")
    assert validation[-1]["loss"] < 0.95 * validation[0]["loss"]
    assert validation[-1]["perplexity"] > 1


def test_token_classification(base, finetune, tmp_path):
    finetune(tmp_path, base["words"] | {"output_dir": "words", "num_train_epochs": 30, "ratio": 0.5})
    metrics = results(tmp_path / "words")["metrics"]["test"]
    assert metrics["accuracy"] > 0.9
    assert metrics["f1"] > 0.5  # of all entities, so not reached by calling everything O
    assert {"precision", "recall"} <= metrics.keys()


def test_seq2seq_generates(base, finetune, tmp_path):
    arguments = base["seq2seq"] | {"num_train_epochs": 4, "ratio": 0.5, "predict_with_generate": True}
    finetune(tmp_path, arguments | {"output_dir": "out"})
    metrics = results(tmp_path / "out")["metrics"]["test"]
    assert metrics.keys() == {"loss", "perplexity", "bits_per_token", "bleu", "chrf", "exact_match"}
    assert 0 <= metrics["exact_match"] <= 1
    assert history(tmp_path / "out", "validation")[-1]["loss"] < history(tmp_path / "out", "validation")[0]["loss"]


@pytest.mark.parametrize("task", ["text", "lm", "words"])
def test_a_stream_trains_as_the_data_in_memory_do(base, finetune, tmp_path, task):
    """In their own order, over the end of an epoch; also two processes."""
    steps = {"max_train_steps": 12, "streaming": True, "shuffle_buffer_size": 0, "logging_steps": 1, "save_logits": 0}
    arguments = base[task] | steps | {"validation_file": base["text" if task == "text" else "words"]["validation_file"]}
    if task == "lm":
        arguments["validation_file"] = base["lm"]["test_file"]
    finetune(tmp_path, arguments | {"output_dir": "one"})
    half = {"per_device_train_batch_size": arguments["per_device_train_batch_size"] // 2}
    finetune(tmp_path, arguments | half | {"output_dir": "two"}, processes=2)
    losses = [[row["loss"] for row in history(tmp_path / name, "train")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 12
    assert losses[0][-1] < losses[0][0]


def test_a_stream_that_is_used_up_by_validation_is_refused(base, finetune, tmp_path):
    arguments = base["mlm"] | {"streaming": True, "max_train_steps": 3, "output_dir": "empty"}
    arguments.pop("validation_file")
    assert "the training split has no samples left" in finetune.error(tmp_path, arguments | {"max_eval_samples": 80})


def test_stops_early_and_takes_the_best(base, finetune, tmp_path):
    arguments = base["digits"] | {
        "learning_rate": 0.3, "optimizer": "sgd", "eval_steps": 5, "early_stopping_patience": 2,
        "metric_for_best_model": "accuracy", "max_train_steps": 400, "lr_scheduler_type": "constant",
        "output_dir": "early", "save_total_limit": 1,
    }  # fmt: skip
    finetune(tmp_path, arguments)
    validation = history(tmp_path / "early", "validation")
    accuracies = [row["accuracy"] for row in validation]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 3
    assert validation[-1]["step"] < 400
    written = results(tmp_path / "early")
    assert written["best_step"] == validation[best]["step"]
    assert written["metrics"]["validation"]["accuracy"] == max(accuracies)
    names = {path.name for path in (tmp_path / "early").glob("checkpoint-*")}
    assert f"checkpoint-{written['best_step']}" in names
    assert len(names) <= 2


# ---- bad input, refused before any work

GOOD = {
    "task": "image-classification",
    "dataset_name": "sklearn/digits",
    "model_type": "vit",
    "output_dir": "new",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "no task was given; give --task"),
        ({"task": "translation"}, r"task='translation' is not valid; expected one of \['text-classification'"),
        ({"output_dir": None}, "no output_dir was given"),
        ({"output_dir": "full"}, "exists and is not empty; continue it with --resume, name another folder, or give"),
        ({"model_type": None}, "got no model; give exactly one of --model_name_or_path"),
        ({"config_name": "x"}, "got config_name and model_type; give exactly one"),
        ({"config_overrides": "hidden_size"}, "'hidden_size' is not key=value"),
        ({"dataset_name": None}, "got no data; give exactly one of --dataset_name, --train_file"),
        ({"dataset_name": None, "train_file": "no.csv"}, "train_file='no.csv' does not exist"),
        ({"dataset_name": None, "train_file": "a.xml"}, "unknown extension; expected one of"),
        ({"dataset_name": None, "data_dir": "no"}, "data_dir='no' does not exist or is not a folder"),
        ({"validation_file": "a.csv"}, "validation_file='a.csv' was given without train_file"),
        ({"task": "causal-lm", "tokenizer_name": "bytes"}, "'sklearn/digits' holds images"),
        ({"learning_rate": -1}, r"learning_rate=-1.0 is not valid; expected a positive number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not valid; expected float"),
        ({"num_train_epochs": 1.5}, "num_train_epochs=1.5 is not valid; expected int"),
        ({"validation_fraction": 1}, "validation_fraction=1.0 is not valid; expected a number between 0 and 1"),
        ({"ratio": 2}, r"ratio=2.0 is not valid; expected a number in \(0, 1\]"),
        ({"grad_scaling": "x"}, "grad_scaling='x' is not valid; expected one of"),
        ({"learning_rat": 1}, "learning_rat"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "hub_model_id='a/b/c' can't be a name on the Hub"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "push_to_hub needs a token; log in with"),
        ({"streaming": True}, "a stream has no known length; with --streaming give --max_train_steps"),
        ({"streaming": True, "dataloader_num_workers": 2}, "several workers would read the stream in another order"),
        ({"group_by_length": True}, "group_by_length needs texts that are all there"),
        ({"distill_hidden_states": 1}, "distill_hidden_states=1.0 was given without a teacher; give --teacher"),
        ({"distill_alpha": 2}, "distill_alpha=2.0 is not valid; expected a number from 0 to 1"),
        ({"mode": "magnitude"}, "pruning by magnitude needs trained weights; give --model_name_or_path"),
        ({"predict_with_generate": True}, "predict_with_generate is for --task seq2seq"),
        ({"resume": True, "overwrite_output_dir": True}, "--resume continues what --overwrite_output_dir deletes"),
        ({"save_total_limit": 0}, "save_total_limit=0 is not valid; expected a positive number"),
    ],
)
def test_refuses_arguments(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_arguments, "get_token", lambda: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "a.xml").touch()
    arguments = {name: value for name, value in (GOOD | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match=message):
        _arguments.parse_arguments(["config.json"])
    assert not (tmp_path / "new").exists()


def test_refuses_a_file_that_holds_no_arguments(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("{")
    for name, message in (("none.yaml", "neither a flag nor"), ("list.yaml", "holds list"), ("broken.json", "parsed")):
        with pytest.raises(ValueError, match=message):
            _arguments.parse_arguments([str(tmp_path / name)])


def test_flags_and_file_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = {"config_overrides": "image_size=[8, 8],layer_norm_eps=1e-6", "target_modules": ["q_proj", "fc1"]}
    Path("config.yaml").write_text(yaml.safe_dump(GOOD | change))
    argv = [*flags(GOOD), "--config_overrides", change["config_overrides"], "--target_modules", "q_proj", "fc1"]
    assert _arguments.parse_arguments(argv) == _arguments.parse_arguments(["config.yaml"])
    read = _arguments.parse_arguments(["config.yaml", "--seed", "5", "--target_modules", "fc2"])
    assert (read.train.seed, read.rps.target_modules, read.model.model_type) == (5, ["fc2"], "vit")  # flags win
    model, rps = read.model, _arguments.parse_arguments(argv).rps
    assert model.config_overrides == {"image_size": [8, 8], "layer_norm_eps": 1e-6}
    assert rps.config("sgd").grad_scaling == "projection"
    assert rps.config("adamw").grad_scaling == "norm"
    assert rps.config("adamw").target_modules == ["q_proj", "fc1"]
    assert _arguments.RPSArguments(target_modules=[r".*\.fc1"]).target_modules == r".*\.fc1"


# ---- data


def columns(features: list[str], task="text-classification", **given):
    rows = datasets.Dataset.from_dict({name: [1] if name in ("label", "id") else ["x"] for name in features})
    names = ("text_column", "text_pair_column", "image_column", "label_column", "target_column")
    args = type("Given", (), dict.fromkeys(names) | given)
    return _data.find_columns(rows.features, task, args)


def test_columns_are_inferred_or_refused():
    assert columns(["id", "text", "label"]) == (["text"], "label")
    assert columns(["premise", "hypothesis", "label"]) == (["premise", "hypothesis"], "label")
    assert columns(["words", "label"]) == (["words"], "label")
    assert columns(["a", "b", "label"], text_column="b", text_pair_column="a") == (["b", "a"], "label")
    assert columns(["id", "text"], task="causal-lm") == (["text"], None)
    with pytest.raises(ValueError, match=r"can't tell the text from the columns \['a', 'b', 'label'\]"):
        columns(["a", "b", "label"])
    with pytest.raises(ValueError, match="give --label_column"):
        columns(["a", "b"])
    with pytest.raises(ValueError, match=r"text_column='c' is not a column of the data; it has \['a', 'label'\]"):
        columns(["a", "label"], text_column="c")


def test_labels_are_encoded_or_refused():
    def splits(**labels):
        rows = {name: {"label": values, "text": ["x"] * len(values)} for name, values in labels.items()}
        return {name: datasets.Dataset.from_dict(columns) for name, columns in rows.items()}

    encoded, names = _data.encode_labels(splits(train=["b", "a", "b"], test=["a"]), "label")
    assert names == ["a", "b"]
    assert list(encoded["train"]["labels"]) == [1, 0, 1]
    assert list(_data.encode_labels(splits(train=[10, 2], test=[-1]), "label")[0]) == ["train"]
    with pytest.raises(ValueError, match=r"row 1 of the test split has the label 'c', which is none of \['a', 'b'\]"):
        _data.encode_labels(splits(train=["a", "b"], test=["a", "c"]), "label")
    with pytest.raises(ValueError, match="one class only"):
        _data.encode_labels(splits(train=["a"]), "label")
    with pytest.raises(ValueError, match=r"holds 0.5; labels must be strings or integers"):
        _data.encode_labels(splits(train=[0.5, 1.5]), "label")


def test_blocks_keep_the_text():
    """Lines run on, documents are closed with the end-of-sequence token, empty rows vanish."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = datasets.Dataset.from_dict({"text": ["one\n", "", "two\n", "three", "four"]})
    blocks = _tasks.tokenize_blocks({"train": rows}, "text", tokenizer, 5, None)["train"]
    assert tokenizer.decode([i for row in blocks["input_ids"] for i in row]) == "one\ntwo\nthree</s>f"
    with pytest.raises(ValueError, match="has 19 tokens, less than one block of 64; lower --block_size"):
        _tasks.tokenize_blocks({"train": rows}, "text", tokenizer, 64, None)


def test_digits_are_always_the_same():
    digits = _data.load_digits()
    assert {name: len(split) for name, split in digits.items()} == {"train": 1197, "validation": 150, "test": 450}
    assert digits["test"]["label"][:8] == [2, 0, 4, 9, 4, 1, 2, 4]
    assert digits["test"]["image"][0].size == (8, 8)


# ---- longer


@pytest.mark.slow
def test_compiled(base, runs, finetune):
    arguments = base["digits"] | {"max_train_steps": 6, "torch_compile": True, "output_dir": "compiled"}
    finetune(runs, arguments)
    assert reload(runs, ["compiled"])["compiled"] < 1e-4


@pytest.mark.slow
def test_demo(tmp_path):
    table = run([PYTHON, SCRIPTS / "demo.py", "--output_dir", "demo"], tmp_path)
    assert "test accuracy" in table
    for mode in ("dense", "rps"):
        assert results(tmp_path / "demo" / mode)["metrics"]["test"]["accuracy"] > 0.95
    assert (tmp_path / "demo" / "learning_curves.png").stat().st_size > 10_000
