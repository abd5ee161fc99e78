"""The loss of finetune.py: the task's own, and the terms that learn from a teacher.

Every term is a sum over items (labels, tokens or sequences) divided by the number of such items in the whole global
batch, over all processes and accumulated passes. So the loss, and the gradient, do not depend on how a global batch is
dealt out, also where passes hold unequal numbers of labels.

Distillation: 'Distilling the knowledge in a neural network' (Hinton et al., 2015) for the logits; 'TinyBERT' (EMNLP
2020) for hidden states and attention weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuning.arguments.training import DistillationArguments
from finetuning.batches import COUNT, model_inputs
from finetuning.tasks import TASKS, Task

LABELS, TOKENS, SEQUENCES = range(3)  # what a term is a mean over


class Objective:
    """Sums of the terms of the loss, and what each must be divided by.

    Args:
        task: The task.
        args: Weights and temperature of distillation.
        teacher: A model in evaluation mode, or None.
        autocast: Makes a context for the teacher's forward pass.
    """

    def __init__(
        self,
        task: Task,
        args: DistillationArguments,
        teacher: nn.Module | None = None,
        autocast: type[AbstractContextManager] = nullcontext,
    ):
        self.task, self.args, self.teacher, self.autocast = task, args, teacher, autocast
        self.embeds = task is TASKS["feature-extraction"]
        self.outputs = {}
        if args.distill_hidden_states:
            self.outputs["output_hidden_states"] = True
        if args.distill_attentions:
            self.outputs["output_attentions"] = True

    def counts(self, batch: dict) -> list[int]:
        """Labels, tokens and sequences of a batch (on the CPU) that this process contributes."""
        if not batch[COUNT]:
            return [0, 0, 0]
        mask, ids, labels, sequences = (batch.get(n) for n in ("attention_mask", "input_ids", "labels", COUNT))
        tokens = int(mask.sum()) if mask is not None else ids.numel() if ids is not None else sequences
        if labels is None:
            return [0, tokens, sequences]
        if not self.task.per_token:
            return [len(labels), tokens, sequences]
        return [int(((labels[:, 1:] if self.task.shifted else labels) != -100).sum()), tokens, sequences]

    def __call__(self, model: nn.Module, batch: dict, counts: list[int]) -> Tensor:
        """Sums over labels, over tokens and over sequences, (3,), in float32."""
        inputs = model_inputs(batch)
        outputs = model(**inputs, **self.outputs)
        first = outputs.last_hidden_state if self.embeds else outputs.logits
        sums = [first.new_zeros((), dtype=torch.float32) for _ in range(3)]
        # what has no part in the loss takes part in the backward pass, for which all processes wait: the outputs of a
        # batch that does not count or has no labels, and a pooler beside the embeddings
        idle = [getattr(outputs, "pooler_output", None)] if self.embeds else []
        alpha = self.args.distill_alpha if self.teacher else 0.0
        if not counts[SEQUENCES] or not (counts[LABELS] or self.embeds):
            idle.append(first)
        elif not self.embeds and alpha < 1:
            sums[LABELS] = (1 - alpha) * outputs.loss.float() * counts[LABELS]
        for output in idle:
            if output is not None:
                sums[LABELS] = sums[LABELS] + output.float().sum() * 0.0
        if not counts[SEQUENCES]:
            return torch.stack(sums)
        if self.teacher:
            taught = self._terms(outputs, inputs, alpha)
            sums = [own + other for own, other in zip(sums, taught, strict=True)]
        return torch.stack(sums)

    # ---- the teacher's terms

    def _terms(self, outputs, inputs: dict, alpha: float) -> list[Tensor | float]:
        with torch.no_grad(), self.autocast():
            target = self.teacher(**inputs, **self.outputs)
        mask = inputs.get("attention_mask")
        labels = tokens = sequences = 0.0
        if self.embeds:
            student, teacher = outputs.last_hidden_state.float(), target.last_hidden_state.float()
            tokens = tokens + _masked((student - teacher).square().mean(-1), mask)
            sequences = sequences + (1 - F.cosine_similarity(mean_pool(student, mask), mean_pool(teacher, mask))).sum()
        elif alpha:
            labels = labels + alpha * self._divergence(outputs.logits, target.logits, inputs["labels"])
        if self.args.distill_hidden_states:
            pairs = _matched(_layers(outputs, "hidden_states"), _layers(target, "hidden_states"))
            error = sum(mean_per_sequence((s.float() - t.float()).square().mean(-1), mask) for s, t in pairs)
            sequences = sequences + self.args.distill_hidden_states * error.sum() / len(pairs)
        if self.args.distill_attentions:
            pairs = _matched(_layers(outputs, "attentions"), _layers(target, "attentions"))
            error = sum(mean_per_sequence((s.float() - t.float()).square().sum(-1).mean(1), mask) for s, t in pairs)
            sequences = sequences + self.args.distill_attentions * error.sum() / len(pairs)
        return [labels, tokens, sequences]

    def _divergence(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Summed Kullback-Leibler divergence of softened predictions, times the temperature squared as in the paper."""
        if self.task.per_token:
            if self.task.shifted:
                student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
            student, teacher = student[labels != -100], teacher[labels != -100]
        t = self.args.distill_temperature
        student, teacher = (F.log_softmax(logits.float() / t, -1) for logits in (student, teacher))
        return F.kl_div(student, teacher, reduction="sum", log_target=True) * t * t


def mean_pool(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the tokens' states (batch, tokens, hidden) of each sequence, (batch, hidden)."""
    if mask is None:
        return states.mean(1)
    mask = mask[..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.sum() if mask is None else (values * mask).sum()


def mean_per_sequence(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of each sequence; where ``mask`` is of another length (a decoder's states) over all."""
    if mask is None or mask.shape != values.shape:
        return values.flatten(1).mean(1)
    return (values * mask).sum(1) / mask.sum(1)


def _layers(outputs, name: str) -> tuple[Tensor, ...]:
    """Hidden states or attention weights of all layers; of the encoder and the decoder, where there are both."""
    if getattr(outputs, name, None):
        return getattr(outputs, name)
    return (*getattr(outputs, f"encoder_{name}"), *getattr(outputs, f"decoder_{name}"))


def _matched(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Each of the student's layers with the teacher's at the same relative depth."""
    last = len(teacher) - 1
    return [(state, teacher[round(i * last / max(len(student) - 1, 1))]) for i, state in enumerate(student)]


# ---- the teacher


def load_teacher(args: DistillationArguments, task: str, student: nn.Module) -> nn.Module:
    """The teacher, frozen, in evaluation mode and float32, checked against the student.

    Raises:
        ValueError: The teacher was not trained for the task, or teacher and student do not have the same outputs, or,
            where hidden states or attention weights are to be learned, not the same hidden size or number of heads.
    """
    options = {"attn_implementation": "eager"} if args.distill_attentions else {}
    teacher, loading = TASKS[task].auto_class.from_pretrained(
        args.teacher, revision=args.teacher_revision, dtype=torch.float32, output_loading_info=True, **options
    )
    unused = "pooler" if task == "feature-extraction" else None  # beside the embeddings
    untrained = [name for name in sorted(loading["missing_keys"]) if unused is None or unused not in name]
    if untrained:
        raise ValueError(
            f"the teacher {args.teacher!r} has no weights for {untrained}, which would be random; take a teacher that "
            f"was trained for {task}"
        )
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    same = []
    if task == "feature-extraction" or args.distill_hidden_states:
        same.append("hidden_size")
    if args.distill_attentions:
        same.append("num_attention_heads")
    if "classification" in task:
        same.append("num_labels")
    elif task != "feature-extraction":
        same.append("vocab_size")
    for name in same:
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"the teacher {args.teacher!r} has {name}={getattr(theirs, name)} and the model "
                f"{getattr(ours, name)}; take a teacher of the same {name}"
                + (", or leave out what needs it" if name in ("hidden_size", "num_attention_heads") else "")
            )
    if "classification" in task:
        check_classes(args.teacher, student.config, teacher.config)
    if args.distill_attentions:
        student.set_attn_implementation("eager")
    return teacher.eval().requires_grad_(False)


def check_classes(name: str, student, teacher) -> None:
    """Check that two configurations number the classes alike, if the teacher ``name`` has names for them.

    Raises:
        ValueError: They do not.
    """
    named = any(known != f"LABEL_{index}" for index, known in teacher.id2label.items())
    if named and student.label2id != teacher.label2id:
        raise ValueError(
            f"the teacher {name!r} orders its classes as {teacher.id2label}, the data as {student.id2label}; take a "
            f"teacher trained on these classes"
        )
