"""Fine-tune, train from scratch, or distil a transformers model, dense or compressed with RPS, on any dataset.

    python scripts/finetune.py --task text-classification --model_name_or_path bert-base-uncased \
        --dataset_name stanfordnlp/imdb --ratio 0.1 --output_dir outputs/imdb
    python scripts/finetune.py --task image-classification --dataset_name sklearn/digits --model_type vit \
        --config_overrides image_size=8,patch_size=2,num_channels=1,hidden_size=64,num_hidden_layers=4 \
        --output_dir outputs/digits
    accelerate launch scripts/finetune.py config.yaml --seed 1       # a file of arguments, and changes to it
    accelerate launch --config_file scripts/configs/accelerate/ddp.yaml scripts/finetune.py config.yaml
    torchrun --nproc_per_node 2 scripts/finetune.py config.yaml      # data parallel, on a CPU too
    python scripts/finetune.py config.yaml --resume                  # go on after a kill, with any number of processes

Writes to the output folder: metrics.jsonl (the history), checkpoint-<step>/, model/ (model, tokenizer or image
processor, and model card, for from_pretrained) and results.json. Only the lines between the two marks below know RPS;
the rest is plain accelerate. Beside this file: _arguments.py (every option), _data.py and _tasks.py (data), _batches.py
(order of samples), _objective.py (loss, distillation), _training.py (the loop), _evaluation.py, _publishing.py.
"""

from __future__ import annotations

import logging
import math
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, is_wandb_available, set_seed
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, get_scheduler

from _arguments import Arguments, ModelArguments, parse_arguments
from _batches import Batches
from _evaluation import SHARDED, Evaluator
from _files import checkpoints, save_folder, write_json
from _objective import Objective, load_teacher
from _publishing import publish, write_card
from _resuming import check_resumable, clear, read_run
from _tasks import TASKS, Data, prepare_data
from _training import Training, make_optimizer
from hf_rps import SizeReport, __version__, get_rps_model, size_report
from studies.methods.magnitude import prune_by_magnitude, remove_pruning

logger = logging.getLogger(__name__)


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


def load_model(args: ModelArguments, task: str, config) -> nn.Module:
    """The dense model: pretrained, in float32 (autocast casts in the forward pass), or randomly initialised."""
    auto = TASKS[task].auto_class
    if not args.model_name_or_path:
        return auto.from_config(config)
    return auto.from_pretrained(
        args.model_name_or_path,
        config=config,
        revision=args.model_revision,
        dtype=torch.float32,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
    )


def make_accelerator(arguments: Arguments) -> Accelerator:
    """Accelerate as it is configured, if it is configured for something that a shared array can be trained with.

    Raises:
        ValueError: It is not, and why.
    """
    args = arguments.train
    accelerator = Accelerator(
        gradient_accumulation_steps=1,  # Training accumulates by itself
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.torch_compile else None,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.ddp_find_unused_parameters)],
    )
    if args.report_to == "wandb" and not is_wandb_available():
        raise ValueError("report_to='wandb' and wandb is not installed; pip install wandb, or take tensorboard")
    kind, refused = accelerator.distributed_type, None
    if kind == DistributedType.MEGATRON_LM:
        refused = "Megatron-LM splits and rebuilds the layers that RPS replaces; take DDP or FSDP2"
    elif kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        refused = (
            "FSDP1 flattens the parameters of each block, and the shared array belongs to all; set fsdp_version: 2"
        )
    elif kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3 and plugin.zero3_init_flag:
            refused = "it would split the dense weights before they are compressed; set zero3_init_flag: false"
        settings = plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
        settings["gradient_clipping"] = args.max_grad_norm  # in its own step; accelerate's default is 1
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if arguments.rps.mode == "magnitude" and kind in SHARDED:
        refused = "a pruned model's masks are not sharded with it; take DDP for --mode magnitude"
    if refused:
        raise ValueError(f"accelerate is configured for {kind.value}, which this script can't use: {refused}")
    return accelerator


def compress(model: nn.Module, arguments: Arguments):
    """Turn the dense ``model`` into what ``--mode`` says, in place; returns the report of its sizes."""
    args = arguments.rps
    compressed = size_report(model).n > 0
    if compressed and args.mode != "rps":
        raise ValueError(
            f"model_name_or_path={arguments.model.model_name_or_path!r} is compressed and --mode is {args.mode}; give "
            f"--mode rps to train it as it is, or decompress it with hf_rps.to_dense first"
        )
    # ---- RPS begins
    if compressed:
        logger.warning("the checkpoint is compressed already: its own ratio and mapping are kept")
    elif args.mode == "rps":
        get_rps_model(model, args.config(arguments.train.optimizer))
    # ---- RPS ends
    elif args.mode == "magnitude":
        prune_by_magnitude(model, args.ratio, args.config(arguments.train.optimizer))
    return size_report(model)


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


def count_steps(arguments: Arguments, batches: Batches, step: int, epoch: int, position: int) -> int:
    """Optimizer steps of the whole run, of which ``step`` are done, up to sample ``position`` of ``epoch``.

    A resumed run may have another global batch size, so that only the steps to come can be computed.
    """
    args = arguments.train
    if args.max_train_steps:
        return args.max_train_steps
    accumulation = args.gradient_accumulation_steps
    rest = batches.steps_per_epoch(accumulation, min(position, batches.num_samples))
    return step + rest + max(args.num_train_epochs - epoch - 1, 0) * batches.steps_per_epoch(accumulation)


def describe(
    arguments: Arguments,
    argv: list[str],
    training: Training,
    report: SizeReport,
    model: str,
    metrics: dict,
    reduced: int,
) -> dict:
    """What results.json says of a finished run."""
    state, processes = training.state, training.accelerator.num_processes
    return {
        "task": arguments.train.task,
        "mode": arguments.rps.mode,
        "model": model,
        "parameters": {"stored": report.parameters, "dense": report.dense_parameters, "n": report.n, "m": report.m},
        "metrics": metrics,
        "steps": state.step,
        "best_step": state.best[1] if arguments.checkpoint.keep_best and state.best else state.step,
        "epochs": training.epochs,
        "processes": processes,
        "reduced_bytes_per_step": reduced if processes > 1 else 0,
        "train_seconds": state.seconds,
        "command": shlex.join(["finetune.py", *argv]),
        "arguments": arguments.as_dict(),
        "versions": {"hf_rps": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(argv: list[str] | None = None) -> dict:
    """Run the script; returns what it writes to results.json.

    Raises:
        SystemExit: A signal stopped the run, which can be resumed; the status is 128 plus the signal's number.
    """
    argv, start = sys.argv[1:] if argv is None else argv, time.perf_counter()
    arguments = parse_arguments(argv)
    args, output = arguments.train, Path(arguments.train.output_dir)
    accelerator = make_accelerator(arguments)
    main_process = accelerator.is_main_process
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_process else logging.ERROR)
    for library in ("httpx", "accelerate"):  # a line a request to the Hub, a line a file of a checkpoint
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # that tied weights are saved once is no news
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    set_seed(args.seed)
    checkpoint = next(reversed(checkpoints(output).values()), None) if arguments.checkpoint.resume else None
    before = read_run(checkpoint)
    zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    check_resumable(before, arguments, checkpoint, accelerator.num_processes, zero)

    config = load_config(arguments.model)
    with accelerator.main_process_first():  # the others then find tokenized data in the cache
        data = prepare_data(arguments, config)
    model = load_model(arguments.model, args.task, config)
    report = compress(model, arguments)
    teacher = None
    if arguments.distillation.teacher:
        teacher = load_teacher(arguments.distillation, args.task, model).to(accelerator.device)

    use_cache = getattr(model.config, "use_cache", None)
    if use_cache is not None:
        model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    batches = make_batches(arguments, accelerator, data)
    steps = count_steps(arguments, batches["train"], before["step"], before["epoch"], before["position"])
    warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else round(args.warmup_steps)
    names = getattr(model.config, "id2label", None)
    optimizer = make_optimizer(model, args)
    reduced = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # the scheduler is not prepared: it advances once an optimizer step whatever the number of processes
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(args.seed, device_specific=True)  # dropout differs between processes

    if main_process:
        clear(output, keep_checkpoints=checkpoint is not None)
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        flat = {name: value for part in arguments.as_dict().values() for name, value in part.items()}
        plain = {name: value for name, value in flat.items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("hf_rps" if args.report_to != "tensorboard" else "tensorboard", config=plain)

    objective = Objective(TASKS[args.task], arguments.distillation, teacher, accelerator.autocast)
    generate = arguments.data.max_target_length if args.predict_with_generate else 0
    evaluator = Evaluator(accelerator, args.task, objective, data.processor, generate, names)
    training = Training(accelerator, arguments, model, optimizer, scheduler, objective, evaluator, batches, steps)
    if checkpoint:
        training.resume(checkpoint)
    sizes = ", ".join(f"{b.num_samples or 'streamed'} {split}" for split, b in batches.items())
    name = type(accelerator.unwrap_model(model, keep_torch_compile=False)).__name__
    logger.info(
        f"{args.task}, {arguments.rps.mode}: {name} on {sizes} samples, {steps:,} steps, from step "
        f"{training.state.step}\n{report}"
    )
    if accelerator.num_processes > 1:
        logger.info(f"{reduced:,} bytes of gradients are reduced a step over {accelerator.num_processes} processes")

    if not training.run():
        accelerator.end_training()
        logger.info(f"stopped after step {training.state.step}; the same command with --resume goes on from there")
        raise SystemExit(128 + (training.signal or signal.SIGTERM))  # another process may have got it
    training.take_best()
    metrics = {"validation": training.state.evaluated[1]}
    last = "test" if "test" in batches else "validation"
    logits = None
    if "test" in batches or args.save_logits:
        metrics[last], logits = evaluator(model, batches[last], args.save_logits)
        training.check(metrics[last]["loss"], f"the {last} loss is {metrics[last]['loss']}")

    results = describe(arguments, argv, training, report, name, metrics, reduced)
    trained = accelerator.unwrap_model(model, keep_torch_compile=False)
    if use_cache is not None:
        trained.config.use_cache = use_cache
    remove_pruning(trained)  # of a model that is pruned

    def save(folder: Path) -> None:
        state = None
        if accelerator.distributed_type in SHARDED:  # gathered by all processes, written by one
            state = accelerator.get_state_dict(model) or {}
            state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        trained.save_pretrained(folder, is_main_process=main_process, state_dict=state)
        if main_process:
            data.processor.save_pretrained(folder)
            write_card(folder, results, arguments, training.history.rows())

    save_folder(output / "model", save, main_process, accelerator.wait_for_everyone)
    if main_process:
        if logits is not None:
            save_file({"logits": logits}, output / "logits.safetensors")
        results["bytes_on_disk"] = sum(file.stat().st_size for file in (output / "model").glob("*.safetensors"))
        results["total_seconds"] = time.perf_counter() - start
        write_json(output / "results.json", results)
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics[last].items())
        logger.info(f"{last}: {values}; {results['bytes_on_disk']:,} bytes; results are in {output}")
        if arguments.hub.push_to_hub:
            publish(output / "model", arguments.hub)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
