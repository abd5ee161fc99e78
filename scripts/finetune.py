"""Fine-tune, or train from scratch, a transformers model, dense or compressed with RPS, on any dataset.

    python scripts/finetune.py --task text-classification --model_name_or_path bert-base-uncased \
        --dataset_name stanfordnlp/imdb --ratio 0.1 --output_dir outputs/imdb
    python scripts/finetune.py --task image-classification --dataset_name sklearn/digits --model_type vit \
        --config_overrides image_size=8,patch_size=2,num_channels=1,hidden_size=64,num_hidden_layers=4 \
        --output_dir outputs/digits
    accelerate launch scripts/finetune.py config.yaml        # all arguments in one file
    torchrun --nproc_per_node 2 scripts/finetune.py ...      # data parallel

Writes to the output folder: metrics.jsonl (the history), model/ (model and tokenizer or image processor, for
from_pretrained) and results.json. Only the lines between the two marks below know RPS; the rest is plain accelerate.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
from _arguments import Arguments, ModelArguments, TrainArguments, parse_arguments
from _data import (
    collate_blocks,
    encode_labels,
    find_columns,
    length_limit,
    load_splits,
    tokenize_blocks,
    tokenize_texts,
    transform_images,
)
from _metrics import Accuracy, TokenLikelihood
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorWithPadding,
    default_data_collator,
    get_scheduler,
)

from hf_rps import __version__, get_rps_model, size_report

logger = logging.getLogger(__name__)

# the one without torchvision; before it got a name of its own it was ViTImageProcessor
ImageProcessor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
AUTO_MODELS = {
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "causal-lm": AutoModelForCausalLM,
}


# ---- model and processor


def load_config(args: ModelArguments):
    """The model's configuration with ``config_overrides`` applied."""
    source = args.model_name_or_path or args.config_name
    if source:
        build = partial(AutoConfig.from_pretrained, source, revision=args.model_revision)
    else:
        build = partial(AutoConfig.for_model, args.model_type)
    config = build()
    unknown = [key for key in args.config_overrides if not hasattr(config, key)]
    if unknown:
        known = sorted(key for key in config.to_dict() if not key.startswith("_"))
        raise ValueError(f"config_overrides names {unknown}, which {config.model_type!r} does not have; it has {known}")
    try:
        return build(**args.config_overrides)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"config_overrides={args.config_overrides} does not fit {config.model_type!r}: {error}"
        ) from error


def load_tokenizer(args: ModelArguments, config):
    """The tokenizer, with a padding token. A configuration to train from scratch takes over its vocabulary."""
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    if name == "bytes":
        tokenizer = ByT5Tokenizer(extra_ids=0)  # 256 bytes and 3 special tokens
    else:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=None if args.tokenizer_name else args.model_revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"tokenizer {name!r} has neither a padding nor an end-of-sequence token; use another one")
        tokenizer.pad_token = tokenizer.eos_token
    if not args.model_name_or_path:
        config.vocab_size = args.config_overrides.get("vocab_size", len(tokenizer))
        for token in ("bos_token_id", "eos_token_id"):
            setattr(config, token, getattr(tokenizer, token))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, but the model's vocab_size is {config.vocab_size}; use "
            f"the model's own tokenizer, or a larger vocab_size"
        )
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def load_image_processor(args: ModelArguments, config, size: int | None):
    """The image processor; from scratch one that resizes to the configuration's size and scales to [-1, 1]."""
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; only grey (1) and RGB (3) images can be read")
    name = args.image_processor_name or args.model_name_or_path
    if name:
        return AutoImageProcessor.from_pretrained(name)
    if size and hasattr(config, "image_size"):
        config.image_size = size
    size = size or getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    middle = [0.5] * channels
    return ImageProcessor(size={"height": height, "width": width}, image_mean=middle, image_std=middle)


def load_model(args: ModelArguments, task: str, config) -> nn.Module:
    """The dense model: pretrained, in float32 (autocast casts in the forward pass), or randomly initialised."""
    auto = AUTO_MODELS[task]
    if not args.model_name_or_path:
        return auto.from_config(config)
    return auto.from_pretrained(
        args.model_name_or_path,
        config=config,
        revision=args.model_revision,
        dtype=torch.float32,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
    )


def make_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """AdamW or SGD. Biases and norms do not decay; the shared array of RPS does, as the weights it stands for."""
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    decay, fixed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fixed if id(parameter) in norms or name.endswith("bias") else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": fixed, "weight_decay": 0.0}]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)  # no temporaries of the size of the array


# ---- evaluation


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, task: str, keep: int = 0):
    """Loss and metrics over a split, the same on every process.

    Returns:
        ``{"loss": ..., "accuracy": ...}`` or ``{"loss": ..., "perplexity": ..., "bits_per_token": ...}``, and the
        logits of the first ``keep`` samples, float32, in the order of the split.
    """
    model.eval()
    metric = (TokenLikelihood if task == "causal-lm" else Accuracy)(keep_in_memory=True)
    total, count, kept = 0.0, 0, []
    for batch in loader:
        logits, labels = model(**batch).logits.float(), batch["labels"]
        if task == "causal-lm":
            nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(1)  # (samples,)
            counts = torch.full_like(labels[:, 0], labels.shape[1] - 1)
            nats, counts = accelerator.gather_for_metrics((nats, counts))
            metric.add_batch(predictions=nats.double().cpu(), references=counts.cpu())
        else:
            nats, predictions = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)
            nats, predictions, labels = accelerator.gather_for_metrics((nats, predictions, labels))
            metric.add_batch(predictions=predictions.cpu(), references=labels.cpu())
            counts = torch.ones_like(labels)
        total, count = total + nats.double().sum().item(), count + counts.sum().item()
        if sum(map(len, kept)) < keep:
            kept.append(accelerator.gather_for_metrics(logits).cpu())
    return {"loss": total / count, **metric.compute()}, torch.cat(kept)[:keep].contiguous() if kept else None


# ---- files


def write_json(path: Path, content: dict) -> None:
    """Write a file so that readers see all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def save_folder(path: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` fill a sibling folder and rename it to ``path``, which is thus never half a model."""
    temporary, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save(temporary)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


# ---- training


class Training:
    """The training loop: optimizer steps, checks and logs of the loss, evaluations, the history in metrics.jsonl."""

    def __init__(
        self, accelerator: Accelerator, args: TrainArguments, model, optimizer, scheduler, loaders, steps: int
    ):
        self.accelerator, self.args, self.model = accelerator, args, model
        self.optimizer, self.scheduler, self.loaders, self.steps = optimizer, scheduler, loaders, steps
        self.unit = "tokens" if args.task == "causal-lm" else "samples"
        self.step, self.epoch, self.seconds = 0, 0.0, 0.0
        self.evaluated: tuple[int, dict] = (-1, {})  # the last evaluated step and its metrics
        self.losses: list[torch.Tensor] = []  # of the steps since the last log entry, still on the device
        self.epoch_losses: list[float] = []
        self.items, self.clock, self.learning_rate = 0, time.perf_counter(), args.learning_rate
        self.progress = tqdm(total=steps, desc="train", unit="step", disable=not accelerator.is_local_main_process)

    def run(self) -> dict:
        """Train to the last step; returns the metrics of the last validation."""
        loader = self.loaders["train"]
        for epoch in range(math.ceil(self.steps / self.steps_per_epoch)):
            loader.set_epoch(epoch)
            self.model.train()
            self.epoch_losses.clear()
            passes = []
            for batch in loader:
                passes.append(self.optimize(batch))
                if not self.accelerator.sync_gradients:
                    continue
                self.step += 1
                self.epoch = self.step / self.steps_per_epoch
                self.losses.append(torch.stack(passes).mean())
                passes.clear()
                self.progress.update()
                if self.step % self.args.logging_steps == 0:
                    self.log_losses()
                if self.args.eval_steps and self.step % self.args.eval_steps == 0:
                    self.validate()
                if self.step == self.steps:
                    break
            self.validate()
        self.progress.close()
        return self.evaluated[1]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.loaders["train"]) / self.args.gradient_accumulation_steps)

    def optimize(self, batch: dict) -> torch.Tensor:
        """Forward and backward pass, and a step of the optimizer when enough gradients have accumulated."""
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            # not prepared by accelerate, so it advances once an optimizer step whatever the number of processes
            if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                self.learning_rate = self.scheduler.get_last_lr()[0]
                self.scheduler.step()
            self.optimizer.zero_grad()
        items = batch["input_ids"].numel() if self.unit == "tokens" else len(batch["labels"])
        self.items += items * self.accelerator.num_processes
        return loss.detach()

    def log_losses(self) -> None:
        """Average the losses since the last entry over steps and processes, check them, and log them."""
        if not self.losses:
            return
        losses = self.accelerator.gather(torch.stack(self.losses).float()[None]).mean(0).tolist()
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            self.check(loss, f"the training loss is {loss} at step {step} of {self.steps}")
        now = time.perf_counter()
        rate, rate_of = self.items / (now - self.clock), f"{self.unit}_per_second"
        self.seconds += now - self.clock
        mean = sum(losses) / len(losses)
        self.record("train", {"loss": mean, "learning_rate": self.learning_rate, rate_of: rate})
        self.progress.set_postfix(
            {"loss": f"{mean:.4f}", "lr": f"{self.learning_rate:.2e}", f"{self.unit}/s": f"{rate:.0f}"}
        )
        self.epoch_losses += losses
        self.losses.clear()
        self.items, self.clock = 0, time.perf_counter()

    def validate(self) -> None:
        """Evaluate on the validation split, unless this step is evaluated already."""
        self.log_losses()
        if self.evaluated[0] == self.step:
            return
        metrics, _ = evaluate(self.accelerator, self.model, self.loaders["validation"], self.args.task)
        self.check(metrics["loss"], f"the validation loss is {metrics['loss']} after step {self.step} of {self.steps}")
        self.evaluated = (self.step, metrics)
        self.record("validation", {**metrics, "train_loss": sum(self.epoch_losses) / len(self.epoch_losses)})
        self.model.train()
        self.clock = time.perf_counter()  # evaluation is not training time

    def check(self, loss: float, message: str) -> None:
        """Stop if ``loss`` is not finite. Every process sees the same number, so all stop together."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{message} (learning rate {self.learning_rate:.3g}): training diverged and no model was "
                f"saved. Lower --learning_rate, raise --warmup_steps, or train in another --mixed_precision"
            )

    def record(self, split: str, values: dict) -> None:
        """Append a row to metrics.jsonl and send it to the tracker."""
        if self.accelerator.is_main_process:
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                row = {"step": self.step, "epoch": round(self.epoch, 6), "split": split, **values}
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=self.step)


# ---- the script


def prepare_data(arguments: Arguments):
    """Splits ready for the model, the model's configuration, its tokenizer or image processor, and the collator."""
    model_args, data_args, args, _ = arguments
    config = load_config(model_args)
    images = args.task == "image-classification"
    load = partial(load_image_processor, size=data_args.image_size) if images else load_tokenizer
    processor = load(model_args, config)
    splits = load_splits(data_args, args.task, args.seed)
    inputs, label = find_columns(splits["train"].features, args.task, data_args)
    workers = data_args.preprocessing_num_workers
    if args.task == "causal-lm":
        block_size = length_limit(data_args.block_size, "block_size", 1024, config, processor)
        return tokenize_blocks(splits, inputs[0], processor, block_size, workers), config, processor, collate_blocks
    splits, names = encode_labels(splits, label)
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    if images:
        splits = transform_images(splits, inputs[0], processor, getattr(config, "num_channels", 3))
        return splits, config, processor, default_data_collator
    max_length = length_limit(data_args.max_length, "max_length", 512, config, processor)
    splits = tokenize_texts(splits, inputs, processor, max_length, workers)
    return splits, config, processor, DataCollatorWithPadding(processor)


def main(argv: list[str] | None = None) -> dict:
    """Run the script; returns what it writes to results.json."""
    argv, start = sys.argv[1:] if argv is None else argv, time.perf_counter()
    model_args, data_args, args, rps_args = arguments = parse_arguments(argv)
    output = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.torch_compile else None,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        # every process draws the same order of samples from the same seed
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.ddp_find_unused_parameters)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, but this script saves the model from "
            f"one process; configure accelerate for plain data parallelism (multi-GPU or multi-CPU)"
        )
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a request to the Hub
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    set_seed(args.seed)

    with accelerator.main_process_first():  # the others then find tokenized data in the cache
        splits, config, processor, collate = prepare_data(arguments)
    model = load_model(model_args, args.task, config)

    # ---- RPS begins
    if size_report(model).n == 0:
        if rps_args.mode == "rps":
            get_rps_model(model, rps_args.config(args.optimizer))
    elif rps_args.mode == "rps":
        logger.warning("the checkpoint is compressed already: its own ratio and mapping are kept")
    else:
        raise ValueError(
            f"model_name_or_path={model_args.model_name_or_path!r} is compressed and --mode is dense; give --mode rps "
            f"to train it as it is, or decompress it with hf_rps.to_dense first"
        )
    report = size_report(model)
    # ---- RPS ends

    use_cache = getattr(model.config, "use_cache", None)
    if use_cache is not None:
        model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    loaders = {}
    for split, dataset in splits.items():
        size = args.per_device_train_batch_size if split == "train" else args.per_device_eval_batch_size
        workers = data_args.dataloader_num_workers
        loader = DataLoader(dataset, size, shuffle=split == "train", collate_fn=collate, num_workers=workers)
        loaders[split] = accelerator.prepare(loader)
    epoch_steps = math.ceil(len(loaders["train"]) / args.gradient_accumulation_steps)
    steps = args.max_train_steps or args.num_train_epochs * epoch_steps
    warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else round(args.warmup_steps)
    optimizer = make_optimizer(model, args)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(args.seed, device_specific=True)  # dropout differs between processes

    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "results.json", "logits.safetensors"):
            (output / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        values = {k: v for part in arguments for k, v in vars(part).items() if isinstance(v, (int, float, str))}
        accelerator.init_trackers(args.report_to, config=values)
    sizes = ", ".join(f"{len(dataset):,} {split}" for split, dataset in splits.items())
    name = type(accelerator.unwrap_model(model, keep_torch_compile=False)).__name__
    logger.info(f"{args.task}, {rps_args.mode}: {name} on {sizes} samples, {steps:,} steps\n{report}")

    training = Training(accelerator, args, model, optimizer, scheduler, loaders, steps)
    metrics = {"validation": training.run()}
    last = "test" if "test" in loaders else "validation"
    if "test" in loaders or args.save_logits:
        metrics[last], logits = evaluate(accelerator, model, loaders[last], args.task, args.save_logits)
        training.check(metrics[last]["loss"], f"the {last} loss is {metrics[last]['loss']}")

    results = {
        "task": args.task,
        "mode": rps_args.mode,
        "model": name,
        "parameters": {"stored": report.parameters, "dense": report.dense_parameters, "n": report.n, "m": report.m},
        "metrics": metrics,
        "steps": steps,
        "epochs": training.epoch,
        "processes": accelerator.num_processes,
        "train_seconds": training.seconds,
        "command": shlex.join(["finetune.py", *argv]),
        "arguments": {type(part).__name__: dataclasses.asdict(part) for part in arguments},
        "versions": {"hf_rps": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model, keep_torch_compile=False)
        if use_cache is not None:
            trained.config.use_cache = use_cache

        def save(folder: Path) -> None:
            trained.save_pretrained(folder)
            processor.save_pretrained(folder)

        save_folder(output / "model", save)
        if args.save_logits:
            save_file({"logits": logits}, output / "logits.safetensors")
        results["bytes_on_disk"] = sum(file.stat().st_size for file in (output / "model").glob("*.safetensors"))
        results["total_seconds"] = time.perf_counter() - start
        write_json(output / "results.json", results)
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics[last].items())
        logger.info(f"{last}: {values}; {results['bytes_on_disk']:,} bytes; results are in {output}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
