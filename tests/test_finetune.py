"""scripts/finetune.py as users run it: in processes of their own, on tiny real data, without a network."""

import csv
import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
import _arguments  # noqa: E402
import _data  # noqa: E402

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
PYTHON, SCRIPT = sys.executable, str(SCRIPTS / "finetune.py")
LAUNCH = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SIZES = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"

# runs several trainings in one process; writes each one's error, or null
DRIVER = """
import json, sys, finetune
from accelerate.state import AcceleratorState
errors = {}
for name, argv in json.load(open(sys.argv[1])).items():
    AcceleratorState._reset_state(True)
    try:
        finetune.main(argv)
        errors[name] = None
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
json.dump(errors, open(sys.argv[2], "w"))
"""

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


def flags(arguments: dict) -> list[str]:
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


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


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def history(folder: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, dict]:
    """Common arguments of each task; writes the data files: documentation topics of Python, and which topic it is."""
    folder = tmp_path_factory.mktemp("data")
    words = [(name, text.split()) for name, text in sorted(pydoc_data.topics.topics.items())[:40]]
    rows = [(" ".join(text[i : i + 8]), "early" if name < "c" else "late") for name, text in words for i in (0, 8, 16)]
    for split, part in (("train", rows[:80]), ("validation", rows[20:40]), ("test", rows[40:60])):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    text = pydoc_data.topics.topics["if"] + pydoc_data.topics.topics["while"]
    (folder / "train.txt").write_text(text)
    (folder / "test.txt").write_text(pydoc_data.topics.topics["for"])
    common = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "logging_steps": 2}
    return {
        "digits": common | {
            "task": "image-classification",
            "dataset_name": "sklearn/digits",
            "model_type": "vit",
            "config_overrides": f"{SIZES},image_size=8,patch_size=4,num_channels=1,intermediate_size=64",
            "save_logits": 40,
        },
        "text": common | {
            "task": "text-classification",
            "train_file": folder / "train.csv",
            "validation_file": folder / "validation.csv",
            "test_file": folder / "test.csv",
            "model_type": "bert",
            "config_overrides": f"{SIZES},intermediate_size=64,hidden_dropout_prob=0.0",
            "tokenizer_name": "bytes",
            "save_logits": 8,
        },
        "lm": common | {
            "task": "causal-lm",
            "train_file": folder / "train.txt",
            "test_file": folder / "test.txt",
            "block_size": 64,
            "model_type": "gpt2",
            "config_overrides": SIZES,
            "tokenizer_name": "bytes",
            "save_logits": 3,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Path:
    """The folder of one run a task and mode, and of the two runs that data parallelism compares."""
    folder = tmp_path_factory.mktemp("runs")
    digits, text, lm = base["digits"], base["text"], base["lm"]

    config = digits | {"output_dir": "digits-rps", "num_train_epochs": 1, "eval_steps": 30, "ratio": 0.2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"learning_rate": "3e-3"}))
    run([*LAUNCH, SCRIPT, "config.yaml"], folder)
    tensorboard = ["--report_to", "tensorboard", "--gradient_accumulation_steps", "2"]
    run([PYTHON, SCRIPT, *flags(text), "--output_dir", "text-rps", *tensorboard], folder)
    run(
        [PYTHON, SCRIPT, *flags(lm), "--output_dir", "lm-rps", "--gradient_checkpointing", "--optimizer", "sgd"], folder
    )

    parallel = digits | {"max_train_samples": 64, "num_train_epochs": 2, "logging_steps": 1}
    halved = parallel | {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16}
    run([*TORCHRUN, SCRIPT, *flags(halved | {"output_dir": "two"})], folder)

    dense = {"mode": "dense", "max_train_steps": 6}
    llama = {"model_type": "llama", "config_overrides": f"{SIZES},intermediate_size=64"}
    pretrained = {k: v for k, v in text.items() if k not in ("model_type", "tokenizer_name", "config_overrides")}
    pretrained |= {"ratio": 0.5, "max_train_steps": 2, "mixed_precision": "bf16"}
    diverging = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 0, "output_dir": "diverged"}
    plan = {
        "one": parallel | {"output_dir": "one"},
        "digits-dense": digits | dense | {"output_dir": "digits-dense"},
        "text-dense": text | dense | {"output_dir": "text-dense"},
        "lm-dense": lm | dense | llama | {"output_dir": "lm-dense"},
        "diverged": digits | diverging | {"logging_steps": 5},
        "unknown": digits | {"config_overrides": "num_chanels=1", "output_dir": "unknown"},
        "unfit": digits | {"config_overrides": "hidden_size=big", "output_dir": "unfit"},
        "vocabulary": lm | {"config_overrides": "vocab_size=100", "output_dir": "vocabulary"},
        "refused": pretrained | {"model_name_or_path": "text-rps/model", "mode": "dense", "output_dir": "refused"},
        "continued": pretrained | {"model_name_or_path": "text-rps/model", "output_dir": "continued"},
        "projected": pretrained | {"model_name_or_path": "text-dense/model", "output_dir": "projected"},
    }
    (folder / "plan.json").write_text(json.dumps({name: flags(arguments) for name, arguments in plan.items()}))
    run([PYTHON, "-c", DRIVER, "plan.json", "errors.json"], folder)
    return folder


RUNS = [f"{task}-{mode}" for task in ("digits", "text", "lm") for mode in ("rps", "dense")]


@pytest.fixture(scope="module")
def errors(runs) -> dict[str, str | None]:
    """What each run of the driver raised."""
    return json.loads((runs / "errors.json").read_text())


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
    differences = json.loads(run([PYTHON, "-c", RELOAD, *RUNS], runs).splitlines()[-1])
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


def test_two_processes_equal_one(runs, errors):
    """Two processes with half the batch each: the same losses, metrics and logits as one process."""
    from safetensors.torch import load_file

    assert errors["one"] is None
    assert [results(runs / name)["processes"] for name in ("one", "two")] == [1, 2]
    for split, keys in (("train", ("loss", "learning_rate")), ("validation", ("loss", "accuracy", "train_loss"))):
        one, two = history(runs / "one", split), history(runs / "two", split)
        assert len(one) == len(two) > 1
        for row, other in zip(one, two, strict=True):
            assert {key: other[key] for key in keys} == pytest.approx({key: row[key] for key in keys}, abs=1e-4)
    assert results(runs / "two")["metrics"]["test"] == pytest.approx(results(runs / "one")["metrics"]["test"], abs=1e-4)
    one, two = (load_file(runs / name / "logits.safetensors")["logits"] for name in ("one", "two"))
    assert one.shape == two.shape == (40, 10)
    assert (one - two).abs().max() < 1e-3


def test_stops_at_a_loss_that_is_not_finite(runs, errors):
    assert errors["diverged"].startswith("FloatingPointError: the training loss is nan at step 2 of 225")
    assert not (runs / "diverged" / "model").exists()
    assert not (runs / "diverged" / "results.json").exists()


def test_refuses_configurations(runs, errors):
    assert errors["unknown"].startswith("ValueError: config_overrides names ['num_chanels'], which 'vit' does not have")
    assert "expected int, got str (value: 'big')" in errors["unfit"]
    assert "'bytes' has 259 tokens, but the model's vocab_size is 100" in errors["vocabulary"]
    assert not any((runs / name).exists() for name in ("unknown", "unfit", "vocabulary", "refused"))


def test_starts_from_checkpoints(runs, errors):
    assert "is compressed and --mode is dense; give --mode rps" in errors["refused"]
    assert errors["continued"] is None
    assert errors["projected"] is None
    compressed, continued, projected = (results(runs / n)["parameters"] for n in ("text-rps", "continued", "projected"))
    assert continued["m"] == compressed["m"]  # its own ratio, not the one given
    assert projected["m"] == pytest.approx(0.5 * projected["n"], rel=0.01)


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
        ({"output_dir": "full"}, "exists and is not empty; name another folder or give --overwrite_output_dir"),
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
    ],
)
def test_refuses_arguments(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
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
    model, _, _, rps = _arguments.parse_arguments(argv)
    assert model.config_overrides == {"image_size": [8, 8], "layer_norm_eps": 1e-6}
    assert rps.config("sgd").grad_scaling == "projection"
    assert rps.config("adamw").grad_scaling == "norm"
    assert rps.config("adamw").target_modules == ["q_proj", "fc1"]
    assert _arguments.RPSArguments(target_modules=[r".*\.fc1"]).target_modules == r".*\.fc1"


# ---- data


def columns(features: list[str], task="text-classification", **given):
    rows = datasets.Dataset.from_dict({name: [1] if name in ("label", "id") else ["x"] for name in features})
    names = ("text_column", "text_pair_column", "image_column", "label_column")
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
    blocks = _data.tokenize_blocks({"train": rows}, "text", tokenizer, 5, None)["train"]
    assert tokenizer.decode([i for row in blocks["input_ids"] for i in row]) == "one\ntwo\nthree</s>f"
    with pytest.raises(ValueError, match="has 19 tokens, less than one block of 64; lower --block_size"):
        _data.tokenize_blocks({"train": rows}, "text", tokenizer, 64, None)


def test_digits_are_always_the_same():
    digits = _data.load_digits()
    assert {name: len(split) for name, split in digits.items()} == {"train": 1197, "validation": 150, "test": 450}
    assert digits["test"]["label"][:8] == [2, 0, 4, 9, 4, 1, 2, 4]
    assert digits["test"]["image"][0].size == (8, 8)


# ---- longer


@pytest.mark.slow
def test_compiled(base, runs):
    arguments = base["digits"] | {"max_train_steps": 6, "torch_compile": True, "output_dir": "compiled"}
    run([PYTHON, SCRIPT, *flags(arguments)], runs)
    assert json.loads(run([PYTHON, "-c", RELOAD, "compiled"], runs).splitlines()[-1])["compiled"] < 1e-4


@pytest.mark.slow
def test_demo(tmp_path):
    table = run([PYTHON, SCRIPTS / "demo.py", "--output_dir", "demo"], tmp_path)
    assert "test accuracy" in table
    for mode in ("dense", "rps"):
        assert results(tmp_path / "demo" / mode)["metrics"]["test"]["accuracy"] > 0.95
    assert (tmp_path / "demo" / "learning_curves.png").stat().st_size > 10_000
