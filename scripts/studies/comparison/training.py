"""One training run of the comparison: its settings, which name it in the cache, and its loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from studies.comparison.tasks import TASKS, Batch, Data

WARMUP = 0.1  # share of the steps
PROTOCOL = 1  # raised when a change of the code changes results, so that cached runs are not taken for new ones


@dataclass(frozen=True)
class Run:
    """All that a training run's result depends on.

    Attributes:
        task, method: See ``tasks.TASKS`` and ``methods.METHODS``.
        compressions: Targeted weights over stored numbers. One, or for lottery tickets all those of one chain.
        learning_rate, optimizer, seed, epochs, batch_size: Of the training; the seed is also that of weights and map.
        train_size: Rows of the training split: images, or sequences of text.
        dataset: Name of the data.
        model: Overrides of the dense model's config.
        init_std: C, the standard deviation of the shared array, or None for RMS(sigma) * c^-init_exponent.
        init_exponent: None for methods without a shared array.
    """

    task: str
    method: str
    compressions: tuple[float, ...]
    learning_rate: float
    optimizer: str
    seed: int
    epochs: float
    batch_size: int
    train_size: int
    dataset: str
    model: tuple[tuple[str, float], ...]
    init_std: float | None = None
    init_exponent: float | None = None

    @property
    def key(self) -> str:
        """Hash of the settings."""
        settings = json.dumps(dataclasses.asdict(self) | {"protocol": PROTOCOL}, sort_keys=True)
        return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return self.train_size // self.batch_size

    @property
    def steps(self) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch))


def make_optimizer(name: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum, without weight decay, which would be another strength for each method."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, nesterov=True)


def train(
    model: nn.Module,
    run: Run,
    split: Batch,
    first_step: int = 0,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> bool:
    """Train ``model`` from ``first_step`` to the last; returns False if the loss stopped being finite.

    A loop of its own because lottery tickets rewind to a step and start there, and because it must be the same for
    every method, in any dtype. The order of the rows depends on the seed alone: every method sees the same batches, and
    a training that starts later (after rewinding) sees those that were left. ``on_step`` gets the number of steps done
    and the last loss.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(run.optimizer, model, run.learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = run.learning_rate  # what a schedule that starts in the middle asks for
    warmup = round(WARMUP * run.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, run.steps, last_epoch=first_step - 1)
    order = torch.Generator().manual_seed(run.seed)
    rows = torch.empty(0)
    model.train()
    for step in range(run.steps):
        start = step % run.steps_per_epoch * run.batch_size
        if start == 0:
            rows = torch.randperm(run.train_size, generator=order)
        if step >= first_step:
            batch = {name: tensor[rows[start : start + run.batch_size]].to(device) for name, tensor in split.items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_step is not None:
                on_step(step + 1, loss.detach())
            # looked at now and then: each look waits for the device
            if (step % 16 == 0 or step + 1 == run.steps) and not torch.isfinite(loss):
                return False
            schedule.step()
    return True


def score(model: nn.Module, run: Run, data: Data, finite: bool) -> dict:
    """Validation and test score of a trained model; those of a guess if its training diverged."""
    task = TASKS[run.task]
    if not finite:
        chance = task.chance(model.config)
        return {"validation": chance, "test": chance, "diverged": True}
    model.eval()
    return {split: task.evaluate(model, getattr(data, split)) for split in ("validation", "test")}
