"""The training loop of finetune.py: optimizer steps, logs, evaluations, checkpoints, and how it stops.

A loop of its own, not transformers' Trainer or accelerate's loader: the loss and the gradient must not depend on how a
global batch is dealt out to processes and passes, and a run must be able to go on, bit for bit, after any step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from finetuning.arguments.cli import Arguments
from finetuning.batches import Batches
from finetuning.evaluation import Evaluator
from finetuning.files import History, checkpoints, delete_checkpoints, save_folder, write_json
from finetuning.metrics import LOWER_IS_BETTER
from finetuning.objective import SEQUENCES, TOKENS, Objective
from finetuning.state import State, keep_plain_names
from finetuning.stopping import Signals
from finetuning.tasks import TASKS

logger = logging.getLogger(__name__)


class Training:
    """Trains to the last step, to a signal or to early stopping.

    Args:
        accelerator: Accelerate's, which has prepared ``model`` and ``optimizer``.
        arguments: All arguments.
        model, optimizer, scheduler: What is trained, and how.
        objective: The loss.
        evaluator: Evaluates on the validation split.
        batches: Batches of each split.
        steps: Optimizer steps of the whole run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: Arguments,
        model: nn.Module,
        optimizer,
        scheduler,
        objective: Objective,
        evaluator: Evaluator,
        batches: dict[str, Batches],
        steps: int,
    ):
        self.accelerator, self.arguments, self.args = accelerator, arguments, arguments.train
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.objective, self.evaluator, self.batches, self.steps = objective, evaluator, batches, steps
        self.output = Path(self.args.output_dir)
        self.history = History(self.output / "metrics.jsonl")
        self.unit = "tokens" if TASKS[self.args.task].per_token else "samples"
        self.state = State()
        self.pending: list[Tensor] = []  # losses of the steps since the last log entry, still on the device
        self.items, self.clock, self.learning_rate = 0, time.perf_counter(), self.args.learning_rate
        self.signals = Signals()
        self.stop_flag: Tensor | None = None  # how many processes had got one at the last step
        accelerator.register_for_checkpointing(self)
        accelerator.register_for_checkpointing(scheduler)
        keep_plain_names(accelerator)

    # ---- what a checkpoint holds

    def state_dict(self) -> dict:
        return asdict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = State(**state)

    def save(self) -> None:
        """Save a checkpoint of this step, unless there is one; none of a model that has diverged."""
        self.log_losses()
        path = self.output / f"checkpoint-{self.state.step}"
        if path.exists():
            return
        processes, main = self.accelerator.num_processes, self.accelerator.is_main_process

        def save(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            if main:
                run = {"step": self.state.step, "epoch": self.state.epoch, "position": self.state.position}
                write_json(folder / "run.json", run | {"processes": processes, "arguments": self.arguments.as_dict()})

        save_folder(path, save, main, self.accelerator.wait_for_everyone)
        if main:
            best = self.state.best[1] if self.arguments.checkpoint.keep_best and self.state.best else None
            delete_checkpoints(self.output, self.arguments.checkpoint.save_total_limit, best)
        self.clock = time.perf_counter()  # saving is not training time

    def resume(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``."""
        self.accelerator.load_state(str(path))
        if self.accelerator.is_main_process:
            self.history.cut(self.state.rows)

    def take_best(self) -> None:
        """Load the best checkpoint, if that is what was asked for."""
        if not self.arguments.checkpoint.keep_best or self.state.best is None:
            return
        (_, step, metrics), state = self.state.best, self.state
        if step != state.step:
            path = checkpoints(self.output).get(step)
            if path is None:
                raise ValueError(
                    f"the best model is that of step {step}, but {self.output} has no checkpoint-{step} any more; put "
                    f"it back, or run once more with --resume and without --load_best_model_at_end"
                )
            logger.info(f"the best model is that of step {step}")
            self.accelerator.load_state(str(path))
            self.state = replace(state, evaluated=(step, metrics))

    # ---- the loop

    def run(self) -> bool:
        """Train; returns whether training is over, or was stopped by a signal and can be resumed."""
        progress = tqdm(
            total=self.steps,
            initial=self.state.step,
            desc="train",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        with progress, self.signals.noted():
            self.progress = progress
            while self.state.step < self.steps and not self._is_patience_over():
                if not self._run_epoch():
                    self.save()
                    return False
            self.validate()  # of a run that was resumed at its end
        return True

    def _run_epoch(self) -> bool:
        """The rest of an epoch, or of the run; returns False if a signal came."""
        state, batches = self.state, self.batches["train"]
        self.model.train()
        self.clock = time.perf_counter()
        passes = batches.epoch(state.epoch, state.position)
        while state.step < self.steps and (step := list(islice(passes, self.args.gradient_accumulation_steps))):
            self.optimize(step)
            state.step += 1
            state.position += len(step) * batches.global_batch_size
            self.progress.update()
            if state.step % self.args.logging_steps == 0:
                self.log_losses()
            if self.args.eval_steps and state.step % self.args.eval_steps == 0:
                self.validate()
                if self._is_patience_over():
                    return True
            if self.stop_flag:  # the same in all processes
                return False
            every = self.arguments.checkpoint.save_steps
            if every and state.step % every == 0:
                self.save()
        if not state.position:
            raise ValueError("the training split has no samples left; give more data, or a smaller --max_eval_samples")
        self.validate()
        state.epoch, state.position = state.epoch + 1, 0
        state.epoch_losses.clear()
        return True

    def optimize(self, passes: list[dict]) -> None:
        """One optimizer step: forward and backward passes over ``passes``, of which all processes have as many."""
        counts = [self.objective.counts(batch) for batch in passes]
        totals = torch.tensor(
            [*map(sum, zip(*counts, strict=True)), self.signals.number is not None], dtype=torch.float64
        )
        if self.accelerator.num_processes > 1:
            # float32 is exact to 16 million labels, more than a step has; mps has no float64
            totals = self.accelerator.reduce(totals.float().to(self.accelerator.device), "sum")
        self.stop_flag = totals[3]
        items = totals[:3].clamp(min=1).float().to(self.accelerator.device)
        losses = []
        for batch, own in zip(passes, counts, strict=True):
            with self._accumulation(last=batch is passes[-1]):
                batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
                loss = (self.objective(self.model, batch, own) / items).sum()
                losses.append(loss.detach())
                # data parallelism takes the mean over processes (and backward over passes, where accelerate is
                # configured so), but `items` are those of all
                scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(loss * scale)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
            self.learning_rate = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.pending.append(torch.stack(losses).sum())
        unit = TOKENS if self.unit == "tokens" else SEQUENCES
        self.items += sum(own[unit] for own in counts) * self.accelerator.num_processes

    @contextmanager
    def _accumulation(self, last: bool) -> Iterator[None]:
        """Let gradients add up, and reduce them over the processes in the last pass of a step only."""
        self.accelerator.sync_gradients = last
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED  # which goes by that flag alone
        with nullcontext() if last or deepspeed else self.accelerator.no_sync(self.model):
            yield

    # ---- logs and evaluation

    def log_losses(self) -> None:
        """Sum the losses of the steps since the last entry over the processes, check them, and log them."""
        if not self.pending:
            return
        losses = torch.stack(self.pending).float()
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, "sum")
        self.pending.clear()
        first = self.state.step - len(losses) + 1
        losses = losses.tolist()
        for step, loss in enumerate(losses, first):
            self.check(loss, f"the training loss is {loss} at step {step} of {self.steps}")
        now = time.perf_counter()
        rate, rate_of = self.items / (now - self.clock), f"{self.unit}_per_second"
        self.state.seconds += now - self.clock
        self.items, self.clock = 0, now
        self.state.losses += losses
        self.state.epoch_losses += losses
        if self.state.step % self.args.logging_steps and self.state.step < self.steps:
            return  # a checkpoint between two entries: the entry must be the same in a run without it
        mean = sum(self.state.losses) / len(self.state.losses)
        self.record("train", {"loss": mean, "learning_rate": self.learning_rate, rate_of: rate})
        self.progress.set_postfix(
            {"loss": f"{mean:.4f}", "lr": f"{self.learning_rate:.2e}", f"{self.unit}/s": f"{rate:.0f}"}
        )
        self.state.losses.clear()

    def validate(self) -> None:
        """Evaluate on the validation split, unless this step is evaluated already; remember the best step."""
        self.log_losses()
        state = self.state
        if state.evaluated[0] == state.step:
            return
        metrics, _ = self.evaluator(self.model, self.batches["validation"])
        self.check(metrics["loss"], f"the validation loss is {metrics['loss']} after step {state.step} of {self.steps}")
        state.evaluated = (state.step, metrics)
        losses = state.epoch_losses or [float("nan")]
        self.record("validation", {**metrics, "train_loss": sum(losses) / len(losses)})
        self._compare(metrics)
        self.model.train()
        self.clock = time.perf_counter()  # evaluation is not training time

    def _compare(self, metrics: dict[str, float]) -> None:
        state, name = self.state, self.arguments.checkpoint.metric_for_best_model
        if name not in metrics:
            raise ValueError(f"metric_for_best_model={name!r} is none of the validation metrics {list(metrics)}")
        value = metrics[name]
        better = state.best is None or (value < state.best[0] if name in LOWER_IS_BETTER else value > state.best[0])
        state.best, state.worse = ((value, state.step, metrics), 0) if better else (state.best, state.worse + 1)
        if better and self.arguments.checkpoint.keep_best:
            self.save()

    def check(self, loss: float, message: str) -> None:
        """Stop if ``loss`` is not finite. Every process sees the same number, so all stop together."""
        if not math.isfinite(loss):
            found = list(checkpoints(self.output))
            kept = f"the last checkpoint is that of step {found[-1]}" if found else "no model was saved"
            raise FloatingPointError(
                f"{message} (learning rate {self.learning_rate:.3g}): training diverged, and {kept}. "
                f"Lower --learning_rate, raise --warmup_steps, or train in another --mixed_precision"
            )

    def record(self, split: str, values: dict) -> None:
        """Append a row to metrics.jsonl and send it to the tracker."""
        self.state.rows += 1
        if self.accelerator.is_main_process:
            self.history.append({"step": self.state.step, "epoch": self.epochs, "split": split, **values})
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=self.state.step)

    @property
    def epochs(self) -> float:
        """Epochs done, with their fraction; whole ones only in a stream."""
        samples = self.batches["train"].num_samples
        part = min(self.state.position / samples, 1.0) if samples else 0.0
        return round(self.state.epoch + part, 6)

    # ---- stopping

    def _is_patience_over(self) -> bool:
        patience = self.arguments.checkpoint.early_stopping_patience
        return patience is not None and self.state.worse >= patience
