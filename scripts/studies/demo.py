"""The demonstration: runs of finetune.py, dense and compressed, their saved models loaded again, a table and a figure.

There is no training loop here: both runs are finetune.py's, launched as users launch it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
RECIPE = {
    "task": "image-classification",
    "dataset_name": "sklearn/digits",
    "model_type": "vit",
    "config_overrides": "image_size=8,patch_size=2,num_channels=1,hidden_size=128,intermediate_size=256,"
    "num_hidden_layers=4,num_attention_heads=4",
    "num_train_epochs": 25,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_logits": 450,  # all of the test split
}
RUNS = {"dense": {"mode": "dense"}, "RPS 0.1": {"mode": "rps", "ratio": 0.1}}


def flags(arguments: dict) -> list[str]:
    return [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]


def train(folder: Path, arguments: dict) -> dict:
    """Run finetune.py in a process of its own; returns its results.json."""
    launch = {"num_processes": 1, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    launch["num_cpu_threads_per_process"] = 1  # matrices this small gain little from more, and lose much on busy cores
    arguments = RECIPE | arguments | {"output_dir": folder}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        *flags(launch),
        str(SCRIPTS / "finetune.py"),
    ]
    subprocess.run([*command, *flags(arguments), "--overwrite_output_dir"], check=True)
    return json.loads((folder / "results.json").read_text())


def reload(folder: Path) -> float:
    """Load the model and the image processor saved in ``folder`` and recompute the logits of the test split.

    Returns:
        The largest absolute difference from the logits that the training process saved.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import hf_rps  # noqa: F401  from_pretrained then knows compressed models
    from finetuning.data.sources import load_digits

    model = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = load_digits()["test"]["image"][:]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    return (logits - load_file(folder / "logits.safetensors")["logits"]).abs().max().item()


def draw(folders: dict[str, Path], path: Path) -> None:
    """Validation accuracy and training loss against epochs, read from each run's metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, folder in folders.items():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["split"] == "validation"]
        for axis, key in zip(axes, ("accuracy", "train_loss"), strict=True):
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=name)
    for axis, label in zip(axes, ("validation accuracy", "training loss"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("A small ViT on scikit-learn's digits: dense, and RPS with a tenth of the shared weights")
    figure.savefig(path, dpi=150)


def print_table(rows: list[tuple]) -> None:
    """A line per run: name, parameters, bytes, accuracy, seconds, difference."""
    titles = ("", "parameters", "bytes on disk", "test accuracy", "train seconds", "logit difference after reload")
    print("\n" + "  ".join(f"{title:>7}" if title else " " * 7 for title in titles))
    for name, parameters, size, accuracy, seconds, difference in rows:
        cells = (f"{parameters:,}", f"{size:,}", f"{accuracy:.2%}", f"{seconds:.1f}", f"{difference:.1e}")
        print("  ".join([f"{name:<7}", *(f"{c:>{len(t)}}" for c, t in zip(cells, titles[1:], strict=True))]))


def main(description: str | None = None) -> None:
    """Train, reload and compare; ``description`` is for --help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="folder for runs and the figure")
    parser.add_argument("--reload", type=Path, metavar="RUN", help="only compare a finished run with its saved model")
    args = parser.parse_args()
    if args.reload:
        print(json.dumps({"difference": reload(args.reload)}))
        return

    rows, folders = [], {name: args.output_dir / arguments["mode"] for name, arguments in RUNS.items()}
    for name, arguments in RUNS.items():
        print(f"\n== {name}: training", flush=True)
        results = train(folders[name], arguments)
        check = [sys.executable, SCRIPTS / "demo.py", "--reload", folders[name]]
        output = subprocess.run(check, check=True, stdout=subprocess.PIPE, text=True).stdout
        difference = json.loads(output.splitlines()[-1])["difference"]
        if not difference < 1e-4:
            raise SystemExit(f"{name}: the reloaded model's logits differ from the trained one's by {difference}")
        values = (results["parameters"]["stored"], results["bytes_on_disk"], results["metrics"]["test"]["accuracy"])
        rows.append((name, *values, results["train_seconds"], difference))
    draw(folders, args.output_dir / "learning_curves.png")

    print_table(rows)
    print(f"\nlearning curves: {args.output_dir / 'learning_curves.png'}")
