"""Evaluation of finetune.py: loss and metrics over a split, the same on every process and for any number of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import Tensor, nn

from finetuning.batches import COUNT, NUMBERS, Batches, model_inputs
from finetuning.metrics import Accuracy, Cosine, GeneratedText, TokenLikelihood, WordLabels
from finetuning.objective import Objective, mean_per_sequence, mean_pool
from finetuning.tasks import TASKS

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # forms in which a pass or a save needs all processes


@dataclass
class _Sample:
    """What evaluation keeps of one sample: nats of ``count`` labels, and what the metrics read."""

    nats: float
    count: int
    prediction: object = None
    reference: object = None
    logits: Tensor | None = None


@dataclass
class Evaluator:
    """Evaluates models on one task.

    Args:
        accelerator: Accelerate's.
        task: Name of the task.
        objective: The loss, whose teacher feature-extraction is measured by.
        processor: The tokenizer, which turns generated ids to text.
        generate: Tokens to generate at most, with seq2seq; 0: do not generate.
        names: The names of the classes, for token-classification.
    """

    accelerator: Accelerator
    task: str
    objective: Objective
    processor: object
    generate: int = 0
    names: dict[int, str] | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Batches, keep: int = 0) -> tuple[dict[str, float], Tensor | None]:
        """Loss and metrics of ``model`` over a split, and the logits of its first ``keep`` samples, in its order."""
        model.eval()
        samples: list[tuple[int, _Sample]] = []
        for batch in batches.epoch():
            if not (batch[COUNT] or self._has_collectives()):
                continue
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            found = self._read(model, batch, keep)
            if batch[COUNT]:
                samples += zip(batch[NUMBERS], found, strict=True)
        if self.accelerator.num_processes > 1:
            samples = gather_object(samples)
        ordered = [sample for _, sample in sorted(samples, key=lambda pair: pair[0])]
        metrics = {"loss": sum(s.nats for s in ordered) / max(sum(s.count for s in ordered), 1)}
        for metric in self._metrics(ordered):
            metrics |= metric
        kept = [s.logits for s in ordered[:keep]]
        return metrics, torch.stack(kept).contiguous() if kept else None

    def _has_collectives(self) -> bool:
        """Whether a forward pass needs all processes."""
        return self.accelerator.distributed_type in SHARDED

    def _read(self, model: nn.Module, batch: dict, keep: int) -> list[_Sample]:
        inputs = model_inputs(batch)
        if self.task == "feature-extraction":
            return self._embed(model, inputs)
        logits, labels = model(**inputs).logits.float(), inputs["labels"]
        scored = (logits[:, :-1], labels[:, 1:]) if TASKS[self.task].shifted else (logits, labels)
        samples = self._classify(*scored) if not TASKS[self.task].per_token else self._score_tokens(*scored)
        if self.generate:
            self._generate(model, inputs, samples)
        for number, sample, row in zip(batch[NUMBERS], samples, logits, strict=True):
            if number < keep:
                sample.logits = row.cpu()
        return samples

    def _classify(self, logits: Tensor, labels: Tensor) -> list[_Sample]:
        nats = F.cross_entropy(logits, labels, reduction="none").tolist()
        rows = zip(nats, logits.argmax(-1).tolist(), labels.tolist(), strict=True)
        return [_Sample(nats, 1, prediction, label) for nats, prediction, label in rows]

    def _score_tokens(self, logits: Tensor, labels: Tensor) -> list[_Sample]:
        labelled = labels != -100
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double().sum(1).tolist()
        samples = [_Sample(*pair) for pair in zip(nats, labelled.sum(1).tolist(), strict=True)]
        if self.task == "token-classification":
            for sample, row, truth, where in zip(samples, logits.argmax(-1), labels, labelled, strict=True):
                sample.prediction = [self.names[i] for i in row[where].tolist()]
                sample.reference = [self.names[i] for i in truth[where].tolist()]
        return samples

    def _generate(self, model: nn.Module, inputs: dict, samples: list[_Sample]) -> None:
        labels = inputs["labels"]
        sources = {name: value for name, value in inputs.items() if name != "labels"}
        with self.accelerator.autocast():
            ids = self.accelerator.unwrap_model(model, keep_torch_compile=False).generate(
                **sources, max_new_tokens=self.generate, use_cache=True, synced_gpus=self._has_collectives()
            )
        labels = labels.masked_fill(labels == -100, self.processor.pad_token_id)
        texts = (self.processor.batch_decode(rows, skip_special_tokens=True) for rows in (ids, labels))
        for sample, prediction, reference in zip(samples, *texts, strict=True):
            sample.prediction, sample.reference = prediction, reference

    def _embed(self, model: nn.Module, inputs: dict) -> list[_Sample]:
        """The loss of each sequence, and the cosine of its embedding, the mean of its tokens, to the teacher's."""
        mask = inputs["attention_mask"]
        with self.objective.autocast():
            taught = self.objective.teacher(**inputs).last_hidden_state.float()
        states = model(**inputs).last_hidden_state.float()
        errors = mean_per_sequence((states - taught).square().mean(-1), mask)
        cosines = F.cosine_similarity(mean_pool(states, mask), mean_pool(taught, mask))
        pairs = zip((errors + 1 - cosines).tolist(), cosines.tolist(), strict=True)
        return [_Sample(loss, 1, cosine, 0) for loss, cosine in pairs]

    def _metrics(self, samples: list[_Sample]) -> list[dict[str, float]]:
        predictions = {"predictions": [s.prediction for s in samples], "references": [s.reference for s in samples]}
        if self.task == "token-classification":
            return [WordLabels(keep_in_memory=True).compute(**predictions)]
        if self.task == "feature-extraction":
            return [Cosine(keep_in_memory=True).compute(**predictions)]
        if not TASKS[self.task].per_token:
            return [Accuracy(keep_in_memory=True).compute(**predictions)]
        scored = {"predictions": [s.nats for s in samples], "references": [s.count for s in samples]}
        metrics = [TokenLikelihood(keep_in_memory=True).compute(**scored)]
        if self.generate:
            metrics.append(GeneratedText(keep_in_memory=True).compute(**predictions))
        return metrics
