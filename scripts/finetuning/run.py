"""A run of finetune.py: prepare, train, export."""

from __future__ import annotations

import logging
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn

from finetuning.arguments.cli import Arguments, parse_arguments
from finetuning.batches import Batches
from finetuning.evaluation import Evaluator
from finetuning.export import export
from finetuning.files import checkpoints
from finetuning.launch import make_accelerator, set_up_logging, start_trackers
from finetuning.models import compress, load_config, load_model
from finetuning.objective import Objective, load_teacher
from finetuning.optimizer import count_steps, make_optimizer, make_scheduler
from finetuning.resuming import check_resumable, clear, read_run
from finetuning.tasks import TASKS, Data, prepare_data
from finetuning.training import Training
from hf_rps import SizeReport

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run, ready to be trained.

    Attributes:
        argv: The command line.
        started: When it began, of ``time.perf_counter``.
        training: The loop, which knows accelerator, arguments, model, batches and evaluator.
        data: What goes with the model: its tokenizer or image processor.
        report: Sizes of the model.
        name: The model's class.
        use_cache: Of the model's configuration, which training turns off; None where it has none.
        reduced: Bytes of gradients that a step reduces over the processes.
    """

    argv: list[str]
    started: float
    training: Training
    data: Data
    report: SizeReport
    name: str
    use_cache: bool | None
    reduced: int


def main(argv: list[str] | None = None) -> dict:
    """Run the script; returns what it writes to results.json.

    Raises:
        SystemExit: A signal stopped the run, which can be resumed; the status is 128 plus the signal's number.
    """
    run = prepare(sys.argv[1:] if argv is None else argv)
    metrics, logits = train(run)
    return export(run, metrics, logits)


# ---- prepare


def prepare(argv: list[str]) -> Run:
    """Everything before the first step: arguments, accelerate, data, model, optimizer, and what an earlier run left."""
    started, arguments = time.perf_counter(), parse_arguments(argv)
    args = arguments.train
    accelerator = make_accelerator(arguments)
    set_up_logging(accelerator)
    set_seed(args.seed)
    checkpoint, before = _find_checkpoint(arguments, accelerator)
    config = load_config(arguments.model)
    with accelerator.main_process_first():  # the others then find tokenized data in the cache
        data = prepare_data(arguments, config)
    model = load_model(arguments.model, args.task, config)
    objective = _make_objective(arguments, accelerator, model)
    model, report = compress(model, arguments, data, accelerator, checkpoint is not None)
    use_cache = _prepare_for_training(model, arguments)
    names, reduced = getattr(model.config, "id2label", None), _trained_bytes(model)
    batches = make_batches(arguments, accelerator, data)
    steps = count_steps(args, batches["train"], before["step"], before["epoch"], before["position"])
    optimizer = make_optimizer(model, args)
    # the scheduler is not prepared: it advances once per optimizer step whatever the number of processes
    scheduler = make_scheduler(optimizer, args, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    if accelerator.is_main_process:
        clear(Path(args.output_dir), keep_checkpoints=checkpoint is not None)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, arguments)
    generate = arguments.data.max_target_length if args.predict_with_generate else 0
    evaluator = Evaluator(accelerator, args.task, objective, data.processor, generate, names)
    training = Training(accelerator, arguments, model, optimizer, scheduler, objective, evaluator, batches, steps)
    if checkpoint:
        training.resume(checkpoint)
    name = type(accelerator.unwrap_model(model, keep_torch_compile=False)).__name__
    return Run(argv, started, training, data, report, name, use_cache, reduced)


def _find_checkpoint(arguments: Arguments, accelerator: Accelerator) -> tuple[Path | None, dict]:
    """The checkpoint to resume from, if there is one and that is what was asked for, and how far its run had come."""
    found = checkpoints(Path(arguments.train.output_dir)) if arguments.checkpoint.resume else {}
    checkpoint = next(reversed(found.values()), None)
    before = read_run(checkpoint)
    zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    check_resumable(before, arguments, checkpoint, accelerator.num_processes, zero)
    return checkpoint, before


def _make_objective(arguments: Arguments, accelerator: Accelerator, student: nn.Module) -> Objective:
    teacher, task = None, arguments.train.task
    if arguments.distillation.teacher:
        teacher = load_teacher(arguments.distillation, task, student).to(accelerator.device)
    return Objective(TASKS[task], arguments.distillation, teacher, accelerator.autocast)


def _prepare_for_training(model: nn.Module, arguments: Arguments) -> bool | None:
    """No cache of keys and values, and checkpointing if wanted; returns whether the model had such a cache on."""
    use_cache = getattr(model.config, "use_cache", None)
    if use_cache is not None:
        model.config.use_cache = False
    if arguments.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return use_cache


def _trained_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def make_batches(arguments: Arguments, accelerator: Accelerator, data: Data) -> dict[str, Batches]:
    """Batches of every split for this process."""
    args, lengths = arguments.train, None
    if arguments.data.group_by_length:
        lengths = np.array([len(ids) for ids in data.splits["train"]["input_ids"]])
    return {
        split: Batches(
            dataset,
            data.collate,
            args.per_device_train_batch_size if split == "train" else args.per_device_eval_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            args.seed,
            shuffle=split == "train",
            num_workers=arguments.data.dataloader_num_workers,
            augment=data.augment,
            lengths=lengths if split == "train" else None,
        )
        for split, dataset in data.splits.items()
    }


# ---- train


def train(run: Run) -> tuple[dict[str, dict[str, float]], Tensor | None]:
    """Train to the end, and test; returns the metrics of each split, and the logits that are to be saved."""
    training, batches = run.training, run.training.batches
    accelerator, args = training.accelerator, training.args
    _announce(run)
    if not training.run():
        accelerator.end_training()
        logger.info(f"stopped after step {training.state.step}; the same command with --resume goes on from there")
        raise SystemExit(128 + (training.signals.number or signal.SIGTERM))  # another process may have got it
    training.take_best()
    metrics, logits = {"validation": training.state.evaluated[1]}, None
    last = "test" if "test" in batches else "validation"
    if "test" in batches or args.save_logits:
        metrics[last], logits = training.evaluator(training.model, batches[last], args.save_logits)
        training.check(metrics[last]["loss"], f"the {last} loss is {metrics[last]['loss']}")
    return metrics, logits


def _announce(run: Run) -> None:
    """Say what is going to be trained."""
    training = run.training
    sizes = ", ".join(f"{b.num_samples or 'streamed'} {split}" for split, b in training.batches.items())
    logger.info(
        f"{training.args.task}, {training.arguments.rps.mode}: {run.name} on {sizes} samples, {training.steps:,} "
        f"steps, from step {training.state.step}\n{run.report}"
    )
    processes = training.accelerator.num_processes
    if processes > 1:
        logger.info(f"{run.reduced:,} bytes of gradients are reduced per step over {processes} processes")
