"""The optimizer, its learning rate over the steps, and how many steps a run has."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import get_scheduler

from finetuning.arguments.training import TrainArguments
from finetuning.batches import Batches


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


def count_steps(args: TrainArguments, batches: Batches, step: int, epoch: int, position: int) -> int:
    """Optimizer steps of the whole run, of which ``step`` are done, up to sample ``position`` of ``epoch``.

    A resumed run may have another global batch size, so that only the steps to come can be computed.
    """
    if args.max_train_steps:
        return args.max_train_steps
    accumulation = args.gradient_accumulation_steps
    rest = batches.steps_per_epoch(accumulation, min(position, batches.num_samples))
    return step + rest + max(args.num_train_epochs - epoch - 1, 0) * batches.steps_per_epoch(accumulation)


def make_scheduler(optimizer: torch.optim.Optimizer, args: TrainArguments, steps: int):
    """The learning rate over ``steps`` optimizer steps."""
    warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else round(args.warmup_steps)
    return get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps)
