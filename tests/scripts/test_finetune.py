"""scripts/finetune.py as users run it: in processes of their own, on tiny real data, without a network."""

import json
from pathlib import Path

import pytest
import yaml
from finetune_runs import PYTHON, SCRIPT, SIZES, history, results, run
from forks import forks
from paths import SCRIPTS

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")

LAUNCH = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip

# loads every saved model anew, recomputes the saved logits from the raw data, and prints the largest differences
RELOAD = """
import csv, json, sys, torch, transformers as t, hf_rps
from pathlib import Path
from safetensors.torch import load_file
from finetuning.data.sources import load_digits

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


def reload(folder: Path, names: list[str]) -> dict[str, float]:
    """The largest differences that RELOAD finds in the runs ``names`` of ``folder``."""
    done = forks().run_code(RELOAD, names, folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


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


def test_stops_at_a_loss_that_is_not_finite(base, finetune, tmp_path):
    diverging = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 0, "output_dir": "diverged"}
    error = finetune.error(tmp_path, base["digits"] | diverging | {"logging_steps": 50, "save_steps": 2})
    assert error.startswith("FloatingPointError: the training loss is nan at step 2 of 225")
    assert "no model was saved" in error
    assert [path.name for path in (tmp_path / "diverged").iterdir()] == ["metrics.jsonl"] or not list(
        (tmp_path / "diverged").iterdir()
    )


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
