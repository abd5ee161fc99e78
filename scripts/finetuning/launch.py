"""The accelerator: accelerate as it is configured, if RPS can be trained with that, and what is logged by whom."""

from __future__ import annotations

import logging

import datasets
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, is_wandb_available

from finetuning.arguments.cli import Arguments
from finetuning.arguments.training import TrainArguments
from finetuning.evaluation import SHARDED


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
        refused = _configure_deepspeed(accelerator.state.deepspeed_plugin, args)
    if arguments.rps.mode == "magnitude" and kind in SHARDED:
        refused = "a pruned model's masks are not sharded with it; take DDP for --mode magnitude"
    if refused:
        raise ValueError(f"accelerate is configured for {kind.value}, which this script can't use: {refused}")
    return accelerator


def _configure_deepspeed(plugin, args: TrainArguments) -> str | None:
    """Give DeepSpeed what it does by itself; returns why it can't be used, if it can't."""
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    settings["gradient_clipping"] = args.max_grad_norm  # in its own step; accelerate's default is 1
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if plugin.zero_stage == 3 and plugin.zero3_init_flag:
        return "it would split the dense weights before they are compressed; set zero3_init_flag: false"
    return None


def set_up_logging(accelerator: Accelerator) -> None:
    """One process tells what happens, and one per machine shows progress."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in ("httpx", "accelerate"):  # a line per request to the Hub, a line per file of a checkpoint
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # that tied weights are saved once is no news
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()


def start_trackers(accelerator: Accelerator, arguments: Arguments) -> None:
    """Tell the trackers, if there are any, the arguments of the run."""
    report_to = arguments.train.report_to
    if report_to == "none":
        return
    flat = {name: value for part in arguments.as_dict().values() for name, value in part.items()}
    plain = {name: value for name, value in flat.items() if isinstance(value, (int, float, str))}
    accelerator.init_trackers("hf_rps" if report_to != "tensorboard" else "tensorboard", config=plain)
