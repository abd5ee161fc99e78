"""Adapters at equal budgets: RPS beside LoRA, VeRA and UniLoRA, each trained by transformers' Trainer.

The loop is Trainer's because nothing here needs another one: one process, labels that are all there, no resuming.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftConfig, UniLoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, Trainer, TrainingArguments

from finetuning.metrics import Accuracy
from hf_rps import RPSConfig
from studies import lines

TOPICS = (
    "art", "computers", "definitions", "drugs", "education", "law", "literature", "men-women", "politics", "science",
    "songs-poems", "work",
)  # fmt: skip
ALL = r"encoder\.layer\..*(query|key|value|dense)"  # every linear layer but the pooler's
INPUT_FOLD = 16  # of the method RPS-folded
TRAIN, VALIDATION, TEST = 100, 30, 70  # entries per topic


@dataclass
class Arguments:
    """What to compare, on what."""

    model_name_or_path: str = field(metadata={"help": "A pretrained BERT-like encoder: a folder or a Hub name."})
    data_dir: str = field(
        default="/usr/share/games/fortunes", metadata={"help": "Folder with one file per topic (Debian's fortunes)."}
    )
    output_dir: str = field(default="outputs/compare_adapters", metadata={"help": "Where runs and table go."})
    methods: list[str] = field(
        default_factory=lambda: ["RPS", "RPS-folded", "LoRA", "VeRA", "UniLoRA", "UniLoRA-all"],
        metadata={"help": "Which methods."},
    )
    budgets: list[int] = field(
        default_factory=lambda: [4608, 9216, 36864], metadata={"help": "Trainable numbers of the adapter."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], metadata={"help": "The grid, for every method."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one tunes."})
    epochs: int = field(default=3, metadata={"help": "Passes over the training split."})
    max_length: int = field(default=32, metadata={"help": "Tokens of an entry that are read."})
    bf16: bool = field(default=True, metadata={"help": "Train in bfloat16 autocast, every method alike."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


class Classifier(nn.Module):
    """A linear head on the mean of an encoder's last hidden states."""

    def __init__(self, encoder: nn.Module, num_labels: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(self, input_ids, attention_mask, labels=None):
        """input_ids, attention_mask (batch, tokens); labels (batch,). Returns loss and logits (batch, num_labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def _matches(targets: list[str] | str, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name.startswith("encoder.") and name.rsplit(".", 1)[-1] in targets


def rank_for(
    budget: int, encoder: nn.Module, count: Callable[[int, int, int], int], limit: int
) -> tuple[int, list[str] | str]:
    """Rank r <= ``limit`` and target modules of which an adapter has exactly ``budget`` numbers.

    ``count(r, out_features, in_features)`` says how many it has on one layer. Query and value are tried first.
    """
    for targets in (["query", "value"], ["query"], ALL):
        shapes = [m.weight.shape for name, m in encoder.named_modules() if _matches(targets, name)]
        for r in range(1, limit + 1):
            if sum(count(r, *shape) for shape in shapes) == budget:
                return r, targets
    raise ValueError(f"no rank up to {limit} gives exactly {budget} trainable numbers; choose another budget")


def adapter_config(method: str, budget: int, encoder: nn.Module) -> PeftConfig:
    """The method's config with ``budget`` trainable numbers, otherwise as PEFT (or hf_rps) ships it."""
    if method in ("RPS", "RPS-folded"):
        n = sum(m.weight.numel() for m in encoder.encoder.modules() if isinstance(m, nn.Linear))
        fold = INPUT_FOLD if method == "RPS-folded" else 1
        return RPSConfig(ratio=budget / n, mode="delta", grad_scaling="norm", target_modules=ALL, input_fold=fold)
    if method == "LoRA":
        r, targets = rank_for(budget, encoder, lambda r, rows, cols: r * (rows + cols), 64)
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
    if method == "VeRA":
        r, targets = rank_for(budget, encoder, lambda r, rows, cols: r + rows, 1024)
        return VeraConfig(r=r, target_modules=targets)
    if method == "UniLoRA":  # query and value, as in its paper; the rank leaves something to share
        return UniLoraConfig(r=8, theta_d_length=budget, target_modules=["query", "value"])
    if method == "UniLoRA-all":  # the layers that RPS takes
        return UniLoraConfig(r=4, theta_d_length=budget, target_modules=ALL)
    raise ValueError(
        f"--methods: {method!r} is not one of RPS, RPS-folded, LoRA, VeRA, UniLoRA, UniLoRA-all, head, full"
    )


def load_text(folder: Path, tokenizer, max_length: int) -> dict[str, Dataset]:
    """Train, validation and test splits with the same number of entries of each topic, without duplicates."""
    splits: dict[str, list] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for label, topic in enumerate(TOPICS):
        file = folder / topic
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found; install Debian's package `fortunes`, or pass --data_dir")
        entries = [entry.strip() for entry in file.read_text(errors="replace").split("\n%\n")]
        entries = [entry for entry in dict.fromkeys(entries) if len(entry) > 20 and entry not in seen]
        seen.update(entries)
        entries.sort(key=lambda entry: hashlib.sha256(entry.encode()).digest())  # a fixed shuffle
        sizes = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
        for split, size in sizes.items():
            chosen, entries = entries[:size], entries[size:]
            if len(chosen) < size:
                raise ValueError(f"{file} has too few entries for {sum(sizes.values())} of each topic")
            splits[split] += [{"text": entry, "labels": label} for entry in chosen]

    def tokenize(rows):
        return tokenizer(rows["text"], truncation=True, max_length=max_length, return_token_type_ids=False)

    return {
        split: Dataset.from_list(rows).map(tokenize, batched=True, remove_columns="text", keep_in_memory=True)
        for split, rows in splits.items()
    }


def run(settings: dict, data: dict[str, Dataset], tokenizer) -> dict:
    """One training run; returns validation and test accuracy and the adapter's number of trainable numbers."""
    transformers.set_seed(settings["seed"])
    encoder = AutoModel.from_pretrained(settings["model"])
    if settings["method"] in ("head", "full"):
        encoder.requires_grad_(settings["method"] == "full")
    else:
        encoder = get_peft_model(encoder, adapter_config(settings["method"], settings["budget"], encoder))
    model = Classifier(encoder, len(TOPICS))
    adapter = [p for p in encoder.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in adapter)
    groups = [{"params": model.head.parameters(), "lr": 1e-3}]
    if adapter:
        groups.append({"params": adapter, "lr": settings["learning_rate"]})
    metric = Accuracy()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=settings["epochs"], per_device_train_batch_size=32, per_device_eval_batch_size=64,
            warmup_steps=0.1, lr_scheduler_type="linear", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, bf16=settings["bf16"], seed=settings["seed"], use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trainer = Trainer(
            model, arguments, DataCollatorWithPadding(tokenizer), data["train"], optimizers=(optimizer, None),
            compute_metrics=lambda p: metric.compute(predictions=np.argmax(p.predictions, -1), references=p.label_ids),
        )  # fmt: skip
        trainer.train()
        scores = {split: trainer.evaluate(data[split])["eval_accuracy"] for split in ("validation", "test")}
    return settings | scores | {"trainable": trainable}


def table(results: list[dict]) -> str:
    """The Markdown table: test accuracy at each method's best learning rate, mean and deviation over the seeds."""
    lines = ["| adapter | trainable numbers | learning rate | validation, % | test, % |", "|---|---|---|---|---|"]
    for result in results:
        scores = [100 * score for score in result["test"]]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        lines.append(
            f"| {result['method']} | {result['trainable']:,} | {result['learning_rate']:g} | "
            f"{100 * statistics.mean(result['validation']):.1f} | {statistics.mean(scores):.1f} ± {spread:.1f} |"
        )
    return "\n".join(lines) + "\n"


class Runs:
    """Results of training runs, from the cache where they are, else by running them.

    A line of the file is a result: settings, scores, and the settings again as its key.
    """

    def __init__(self, file: Path, arguments: Arguments):
        self.file, self.arguments = file, arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        self.data = load_text(Path(arguments.data_dir), self.tokenizer, arguments.max_length)
        self.done: dict[str, dict] = {record.pop("key"): record for record in lines.read(file)}

    def __call__(self, method: str, budget: int, learning_rate: float, seed: int) -> dict:
        args = self.arguments
        settings = {
            "method": method, "budget": budget, "learning_rate": learning_rate, "seed": seed,
            "epochs": args.epochs, "max_length": args.max_length, "bf16": args.bf16,
        }  # fmt: skip
        key = json.dumps(settings | {"encoder": Path(args.model_name_or_path).name}, sort_keys=True)
        if key not in self.done:
            result = run(settings | {"model": args.model_name_or_path}, self.data, self.tokenizer)
            self.done[key] = {name: value for name, value in result.items() if name != "model"}
            lines.add(self.file, self.done[key] | {"key": key})
            print(json.dumps(self.done[key]), flush=True)
        return self.done[key]


def main() -> None:
    """Tune and train every method at every budget, and write the table."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run_once, results = Runs(folder / "runs.jsonl", arguments), []
    for budget in arguments.budgets:
        for method in arguments.methods:
            rates = arguments.learning_rates if method != "head" else arguments.learning_rates[:1]
            tuned = {rate: run_once(method, budget, rate, arguments.seeds[0])["validation"] for rate in rates}
            best = max(rates, key=tuned.get)
            runs = [run_once(method, budget, best, seed) for seed in arguments.seeds]
            scores = {split: [r[split] for r in runs] for split in ("validation", "test")}
            results.append({"method": method, "trainable": runs[0]["trainable"], "learning_rate": best} | scores)
    text = table(results)
    (folder / "table.md").write_text(text)
    print(text)
